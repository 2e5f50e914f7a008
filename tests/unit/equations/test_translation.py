"""A teacher's answers in the words of a student with another tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.lexicon import Lexicon
from fedml_plugin_fedmosaic.equations.translation import END, Wording, translated


def logits_of(wording: Wording, rows: Sequence[Mapping[str, float]]) -> Tensor:
    """Logits whose softmax has these probabilities."""
    made = torch.full((len(rows), len(wording.texts)), -math.inf)
    for row, wanted in zip(made, rows, strict=True):
        for text, probability in wanted.items():
            row[list(wording.texts).index(text)] = math.log(probability)
    return made


def ids_of(wording: Wording, texts: Sequence[str]) -> list[int]:
    return [list(wording.texts).index(text) for text in texts]


def taught(
    teacher: Wording,
    said: Sequence[str],
    rows: Sequence[Mapping[str, float]],
    student: Wording,
    own: Sequence[str],
    top_k: int = 128,
    width: int | None = None,
) -> list[dict[str, float]]:
    """What the student hears, per token: text -> probability."""
    found = translated(
        logits_of(teacher, rows),
        teacher,
        ids_of(teacher, said),
        ids_of(student, own),
        Lexicon(student.texts),
        student,
        width=width or len(student.texts),
        top_k=top_k,
    )
    return [{student.texts[i]: float(p) for i, p in enumerate(row.exp()) if p > 0} for row in found]


def test_equal_tokens_keep_their_probabilities() -> None:
    teacher = Wording(texts=["cat", "dog", "bird", END])
    student = Wording(texts=[END, "bird", "dog", "cat", "fish"])
    rows = [{"cat": 0.5, "dog": 0.3, END: 0.2}, {END: 0.9, "cat": 0.1}]
    found = taught(teacher, ["cat", END], rows, student, ["cat", END])
    assert found == [pytest.approx(row) for row in rows]


def test_a_token_becomes_the_nearest_one_and_probabilities_add_up() -> None:
    teacher = Wording(texts=["colour", "colours", "xyzzy", "red"])
    student = Wording(texts=["red", "color"])
    rows = [{"red": 0.4, "colour": 0.2, "colours": 0.1, "xyzzy": 0.3}]
    (found,) = taught(teacher, ["red"], rows, student, ["red"])
    # What has no near token is left out; the rest sums to 1.
    assert found == pytest.approx({"red": 4 / 7, "color": 3 / 7})


def test_only_the_most_probable_tokens_are_translated_and_the_answer() -> None:
    teacher = Wording(texts=["a", "b", "c", "d"])
    rows = [{"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}]
    (found,) = taught(teacher, ["a"], rows, teacher, ["a"], top_k=2)
    assert found == pytest.approx({"a": 0.1 / 0.8, "c": 0.3 / 0.8, "d": 0.4 / 0.8})


def test_spaces_in_front_of_words_follow_the_students_token() -> None:
    spaced = Wording(texts=[" cat", " dog", "cat", "dog", " "])
    bare = Wording(texts=["dog", "cat"])
    rows = [{" cat": 0.7, " dog": 0.3}]
    assert taught(spaced, [" cat"], rows, bare, ["cat"]) == [
        pytest.approx({"cat": 0.7, "dog": 0.3})
    ]
    # Both forms exist: the one that the student's own token has is taught.
    assert taught(spaced, [" cat"], rows, spaced, ["cat"]) == [
        pytest.approx({"cat": 0.7, "dog": 0.3})
    ]
    back = taught(bare, ["cat"], [{"cat": 0.7, "dog": 0.3}], spaced, [" cat"])
    assert back == [pytest.approx({" cat": 0.7, " dog": 0.3})]


def test_several_tokens_of_the_teacher_are_one_of_the_students() -> None:
    teacher = Wording(texts=["bl", "ue", "ack", "red", END])
    student = Wording(texts=["blue", "black", "red", END])
    rows = [{"bl": 0.8, "red": 0.2}, {"ue": 0.25, "ack": 0.75}, {END: 1.0}]
    found = taught(teacher, ["bl", "ue", END], rows, student, ["blue", END])
    # 0.8 * 0.25, 0.8 * 0.75, and what leaves the run at its first token.
    assert found[0] == pytest.approx({"blue": 0.2, "black": 0.6, "red": 0.2})
    assert found[1] == pytest.approx({END: 1.0})


def test_one_token_of_the_teacher_is_several_of_the_students() -> None:
    teacher = Wording(texts=["blue", "black", "red", END])
    student = Wording(texts=["bl", "ue", "ack", "red", END])
    rows = [{"blue": 0.5, "red": 0.3, "black": 0.2}, {END: 1.0}]
    found = taught(teacher, ["blue", END], rows, student, ["bl", "ue", END])
    # "black" is nearer to "ack" than to "bl"; after "bl" only "blue" and "black" go on.
    assert found[0] == pytest.approx({"bl": 0.5, "red": 0.3, "ack": 0.2})
    assert found[1] == pytest.approx({"ue": 0.5 / 0.7, "ack": 0.2 / 0.7})
    assert found[2] == pytest.approx({END: 1.0})


def test_nothing_is_said_where_the_texts_differ_or_a_token_has_none() -> None:
    teacher = Wording(texts=["cat", "dog", "", END])
    student = Wording(texts=["cat", "", "bird", END])
    rows = [{"cat": 1.0}, {"dog": 1.0}, {END: 1.0}]
    found = taught(teacher, ["cat", "dog", END], rows, student, ["cat", "bird", END])
    assert found == [{"cat": 1.0}, {}, {END: 1.0}]
    # Two tokens without a text are no pair.
    assert taught(teacher, [""], [{"": 1.0}], student, [""]) == [{}]


def test_ids_beyond_the_tokenizer_say_nothing() -> None:
    wording = Wording(texts=["cat", "dog"])
    logits = torch.tensor([[1.0, 0.0, 9.0]])
    lexicon = Lexicon(wording.texts)
    (row,) = translated(logits, wording, [0], [0], lexicon, wording, width=4, top_k=3)
    assert torch.allclose(row.exp()[:2], torch.tensor([1.0, 0.0]).softmax(0))
    assert row[2:].tolist() == [-math.inf, -math.inf]


def test_a_silent_row_is_minus_infinity() -> None:
    wording, other = Wording(texts=["cat"]), Wording(texts=["dog"])
    (row,) = translated(
        torch.zeros(1, 1), wording, [0], [0], Lexicon(other.texts), other, width=1, top_k=1
    )
    assert row.tolist() == [-math.inf]


def test_logits_of_another_answer_are_refused() -> None:
    wording = Wording(texts=["cat"])
    with pytest.raises(AdapterError, match=r"2 tokens .* has 1"):
        translated(
            torch.zeros(2, 1), wording, [0], [0], Lexicon(["cat"]), wording, width=1, top_k=1
        )
