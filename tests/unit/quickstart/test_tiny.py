"""The small architectures, their tokenizer and the shipped base models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from fedml_plugin_fedmosaic.config.sections import EvalConfig, ModelSpec
from fedml_plugin_fedmosaic.data.quickstart.build import ensure_built, evaluation_samples
from fedml_plugin_fedmosaic.data.quickstart.tasks import BY_NAME, TASKS, UNSEEN, captions
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.scoring import score_task
from fedml_plugin_fedmosaic.engine.tiny import (
    ARCHITECTURES,
    build_model,
    build_tokenizer,
    words_of,
)

MODELS = Path(str(resources.files("fedml_plugin_fedmosaic"))) / "assets" / "models"
NAMES = sorted(ARCHITECTURES)


def test_words() -> None:
    text = "<image>\nWhich one? Choice list:[red, Image A]. Your answer is:"
    assert words_of([text]) == ("?", "A", "Image", "Which", "one", "red")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tokenizer_round_trip(family, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["Which", "one", "?", "Image", "A", "B"], family)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "<image>\nWhich one? Choice list:[A, B]. Your answer is:"},
        {"role": "assistant", "content": "Image A"},
    ]
    text = loaded.apply_chat_template(messages, tokenize=False)
    ids = loaded(text, add_special_tokens=False).input_ids
    assert loaded.unk_token_id not in ids
    assert len(ids) == 15
    assert ids[-1] == loaded.eos_token_id
    assert loaded.decode(ids[-3:], skip_special_tokens=True) == "Image A"
    parts = [{"type": "image"}, {"type": "text", "text": "Which one?"}]
    listed = loaded.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert "<image>Which one?" in listed


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    arch = ARCHITECTURES[name]
    tokenizer = build_tokenizer(["a", "b"], arch.family)
    state = torch.random.get_rng_state()
    model = build_model(arch, tokenizer, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.config.text_config.model_type == arch.family
    linears = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7 * arch.layers
    assert min(min(m.in_features, m.out_features) for m in linears) >= 32
    again = build_model(arch, tokenizer, seed=1).get_decoder().state_dict()
    for key, tensor in model.get_decoder().state_dict().items():
        assert torch.equal(tensor, again[key])


@pytest.mark.parametrize("name", NAMES)
def test_shipped_tokenizer_covers_all_words(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    rows = [
        row
        for task in (*TASKS, *UNSEEN)
        for audience in ("train", "test", "pretrain")
        for row in task.questions(audience, 60, 7)
    ]
    rows += [row for shown in captions(2).values() for row in shown]
    texts = [text for row in rows for text in (row.prompt, row.answer)]
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        assert tokenizer.unk_token_id not in ids
    answers = {answer for task in BY_NAME.values() for answer in task.answers}
    for answer in answers:
        assert tokenizer.decode(tokenizer(answer).input_ids, skip_special_tokens=True) == answer


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_knows_a_part(name: str) -> None:
    """Above chance, and far below what training reaches: there is something left to learn."""
    bundle = load_model(name, ModelSpec(path=f"bundled:{name}"), torch.device("cpu"))
    assert (MODELS / name / "README.md").is_file()
    assert (MODELS / name / "alignment.safetensors").is_file()
    root = ensure_built()
    scores = []
    for task_name in ("Digits-0", "Colours-0", "Pictures-2"):
        task = BY_NAME[task_name]
        score = score_task(
            bundle.model,
            bundle.processor,
            evaluation_samples(root, task)[:60],
            task.spec,
            EvalConfig(mode="likelihood"),
            share_prompt=True,
        )
        scores.append(score.value)
    assert 0.2 < sum(scores) / len(scores) < 0.7
