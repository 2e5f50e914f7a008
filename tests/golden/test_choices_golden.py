from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedml_plugin_fedmosaic.data.metrics import choice_is_correct, infer_choice, parse_choices

ROWS = np.load(Path(__file__).parent / "align_choices.npz", allow_pickle=False)[
    "choices/prompt_pred_gold_choices_inferred_correct"
].tolist()


@pytest.mark.parametrize(("prompt", "prediction", "gold", "choices", "inferred", "correct"), ROWS)
def test_multi_choice_scorer_equals_the_reference(
    prompt: str, prediction: str, gold: str, choices: str, inferred: str, correct: str
) -> None:
    parsed = parse_choices(prompt, gold)
    assert list(parsed) == json.loads(choices)
    expected = None if inferred == "False" else inferred
    assert infer_choice(prediction, parsed, "official") == expected
    assert choice_is_correct(prompt, prediction, gold, "official") == (correct == "True")
