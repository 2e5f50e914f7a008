from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.metrics import (
    a_auc,
    a_last,
    accuracy,
    choice_is_correct,
    infer_choice,
    parse_choices,
    token_f1,
)

LETTERS = ("A", "B", "C", "D")
ANIMALS = ("cat", "dog", "blue bird")


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("Q Choice list:[x, y].", ("x", "y")),
        ("Q Choice lists: [x, y].", ("x", "y")),
        ("Q Choice list: [x | y, z]", ("x | y", "z")),
        ("Q Choice list: [Image A is left, Image B is right]", ("Image A", "Image B")),
        ("Q\n[red, green]\nAnswer", ("red", "green")),
        ("Q\nA. red\nB. green\nC. blue", ("A", "B", "C")),
        ("What is this?", ()),
    ],
)
def test_options_are_found_in_the_prompt(prompt: str, choices: tuple[str, ...]) -> None:
    assert parse_choices(prompt) == choices


def test_quotes_stay_if_the_gold_answer_has_them() -> None:
    prompt = "Q Choice list: ['x', 'y']"
    assert parse_choices(prompt, "x") == ("x", "y")
    assert parse_choices(prompt, "'x'") == ("'x'", "'y'")


@pytest.mark.parametrize(
    ("prediction", "choices", "expected"),
    [
        ("B", LETTERS, "B"),
        ("(b)", LETTERS, "B"),
        ("b.", LETTERS, "B"),
        ("The answer is C.", LETTERS, "C"),
        ("Answer: D", LETTERS, "D"),
        ("It must be B because a dog barks", LETTERS, "B"),
        ("A dog is on the left", LETTERS, None),
        ("a dog", LETTERS, None),
        ("E", LETTERS, None),
        ("a bird", ANIMALS, None),
        ("A blue bird", ANIMALS, "blue bird"),
        ("It is a dog, not a cat", ANIMALS, "dog"),
        ("catalogue", ANIMALS, None),
        ("Blue_Bird", ANIMALS, "blue bird"),
        ("c", ANIMALS, "blue bird"),
        ("", ANIMALS, None),
        ("yes, it does", ("Positive", "Negative"), "Positive"),
        ("I know: no", ("Positive", "Negative"), "Negative"),
        ("negative", ("Positive", "Negative"), "Negative"),
        ("4", ("1", "2", "3", "4", "5"), "4"),
        ("Image 10", ("Image 1", "Image 10"), "Image 10"),
        ("anything", (), None),
    ],
)
def test_default_inference(prediction: str, choices: tuple[str, ...], expected: str | None) -> None:
    assert infer_choice(prediction, choices) == expected


def test_modes_differ_on_the_article_and_unknown_modes_are_refused() -> None:
    assert infer_choice("a bird", ("cat", "dog"), "official") == "cat"
    assert infer_choice("a bird", ("cat", "dog")) is None
    with pytest.raises(ConfigError, match="choice mode"):
        infer_choice("a", ("cat", "dog"), "strict")  # type: ignore[arg-type]


@given(st.sampled_from(ANIMALS), st.sampled_from(["default", "official"]))
def test_saying_the_option_is_always_right(gold: str, mode: str) -> None:
    prompt = "Which? Choice list:[cat, dog, blue bird]"
    assert choice_is_correct(prompt, gold.upper(), gold, mode)  # type: ignore[arg-type]
    assert not choice_is_correct(prompt, "fish", gold, mode)  # type: ignore[arg-type]


def test_accuracy_is_a_part() -> None:
    assert accuracy([True, False, True, True]) == 0.75
    with pytest.raises(DataError, match="no answers"):
        accuracy([])


def test_token_f1_sums_over_answers() -> None:
    predictions, golds = [[1, 2, 3], [9]], [[2, 3, 4], [8]]
    assert token_f1(predictions, golds) == pytest.approx(2 * 2 / 8)
    assert token_f1([[0, 5]], [[0, 6]], special=[0]) == 0.0
    assert token_f1([[0, 5]], [[0, 6]], special=[0], mode="official") == pytest.approx(4 / 5)
    assert token_f1([["a"]], [["a"]]) == 1.0
    assert token_f1([[]], [[]]) == 0.0
    with pytest.raises(DataError, match="1 predictions for 2"):
        token_f1([[1]], [[1], [2]])


def test_curve_summaries() -> None:
    assert a_last([0.1, 0.4, 0.3]) == 0.3
    assert a_auc([0.1, 0.4, 0.4]) == pytest.approx(0.3)
    for summary in (a_last, a_auc):
        with pytest.raises(DataError, match="never evaluated"):
            summary([])
