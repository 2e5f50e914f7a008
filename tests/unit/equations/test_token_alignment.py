"""Token alignment against a plain transcription of its definition, and on batches."""

from __future__ import annotations

import random

import pytest
import torch

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.equations.token_alignment import (
    aligned_positions,
    matching_spans,
    pooled_rows,
)

Spans = list[tuple[tuple[int, int], tuple[int, int]]]


def _span_lengths(first: list[str], second: list[str], floor: int) -> tuple[int, int] | None:
    """Shortest suffixes of both lists with strings of equal length, if these are equal."""
    if first[-1] == second[-1]:
        return 1, 1
    a, b = 1, 1
    while len(first) - a >= floor and len(second) - b >= floor:
        one, two = "".join(first[-a:]), "".join(second[-b:])
        if len(one) == len(two):
            return (a, b) if one == two else None
        a, b = (a + 1, b) if len(one) < len(two) else (a, b + 1)
    return None


def _plain(first: list[str], second: list[str], official: bool) -> Spans:
    """Every pair of tokens, every cell of the table."""
    n, m = len(first), len(second)
    table = [[0] * (m + 1) for _ in range(n + 1)]
    step: dict[tuple[int, int], tuple[int, int]] = {}
    if official:
        table[0] = [1] * (m + 1)
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            best, move = table[i - 1][j], (1, 0)
            if table[i][j - 1] >= best:
                best, move = table[i][j - 1], (0, 1)
            found = _span_lengths(first[:i], second[:j], int(official))
            if found and table[i - found[0]][j - found[1]] + found[0] >= best:
                best, move = table[i - found[0]][j - found[1]] + found[0], found
            table[i][j], step[i, j] = best, move
    spans: Spans = []
    i, j = n, m
    while i and j:
        a, b = step[i, j]
        if a and b:
            spans.append(((i - a, i), (j - b, j)))
        i, j = i - a, j - b
    return spans[::-1]


def _cut(text: str, numbers: random.Random) -> list[str]:
    tokens = []
    while text:
        size = numbers.randint(0 if numbers.random() < 0.1 else 1, 4)
        tokens.append(text[:size])
        text = text[size:]
    return tokens


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("alphabet", ["a", "ab", "abcdefgh"])
def test_fast_and_plain_alignment_agree(alphabet: str, official: bool) -> None:
    numbers = python_random(0, alphabet, int(official))
    matched = 0
    for _ in range(60):
        text = "".join(numbers.choices(alphabet, k=numbers.randint(1, 24)))
        other = text
        if numbers.random() < 0.5:
            place = numbers.randrange(len(text))
            other = text[:place] + numbers.choice("xab") + text[place + 1 :]
        first, second = _cut(text, numbers), _cut(other, numbers)
        expected = _plain(first, second, official)
        assert matching_spans(first, second, official=official) == expected
        matched += len(expected)
    assert matched > 60


def test_all_of_a_text_is_aligned_whatever_the_cuts() -> None:
    first, second = ["\u0120hello", "\u0120wor", "ld", "!"], ["\u2581hel", "lo", "\u2581world", "!"]
    assert aligned_positions(first, second) == [[0, 1], [2], [2], [3]]
    assert aligned_positions(["a", "b"], []) == [[], []]
    assert aligned_positions([], ["a"]) == []
    assert aligned_positions(["<s>", "a", "b"], ["ab", "</s>"]) == [[], [0], [0]]


def test_long_sequences_are_aligned_completely() -> None:
    numbers = python_random(0, "long")
    text = "".join(numbers.choices("etaoin ", k=3000))
    first, second = _cut(text, numbers), _cut(text, numbers)
    spans = matching_spans(first, second)
    for (a, b), (c, d) in spans:
        assert "".join(first[a:b]) == "".join(second[c:d])
    covered = sum(len("".join(first[a:b])) for (a, b), _ in spans)
    assert covered == len(text)


def test_rows_are_pooled_over_samples_of_a_batch() -> None:
    hidden = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)
    rows, kept = pooled_rows(hidden, [[[0, 2], []], [[], [1], [0, 1, 2]]])
    assert kept.tolist() == [[0, 0], [1, 1], [1, 2]]
    assert rows.tolist() == [[2.0, 3.0], [8.0, 9.0], [8.0, 9.0]]
    nothing, kept = pooled_rows(hidden, [[[]], []])
    assert (nothing.shape, kept.shape) == ((0, 2), (0, 2))


def test_positions_that_do_not_fit_are_refused() -> None:
    hidden = torch.zeros(1, 3, 2)
    with pytest.raises(AdapterError, match="position 3 of 3"):
        pooled_rows(hidden, [[[3]]])
    with pytest.raises(AdapterError, match="2 samples for a batch of 1"):
        pooled_rows(hidden, [[[0]], [[0]]])
