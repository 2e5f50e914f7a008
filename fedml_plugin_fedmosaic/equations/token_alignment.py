"""Which tokens of two tokenizers stand for the same text.

Source: the greedy matching by dynamic programming of FedMKT (Fan et al., arXiv 2406.02224, code in
FATE-LLM), as used for cross-family alignment by FedMosaic (arXiv 2506.11024). A pair of spans that
ends at tokens i and j matches if it is the shortest one with strings of equal length, and the
strings are equal. Among the matches, those are kept, in order, that cover most tokens of the first
sequence.

The published code visits all pairs (i, j). Here only pairs are visited of which one token ends with
the other, found by looking suffixes up; and the recurrence runs over whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError

WORD_MARKS = ("\u0120", "\u2581")
"""Marks of a space before a word: byte-level BPE and SentencePiece."""

Span = tuple[int, int]
"""First token and the one after the last."""


def matching_spans(
    first: Sequence[str],
    second: Sequence[str],
    *,
    marks: Sequence[str] = WORD_MARKS,
    official: bool = False,
) -> list[tuple[Span, Span]]:
    """Spans of two token sequences that hold the same text, in order.

    Time is about the number of tokens times the number of tokens with a shared ending, plus
    ``n m`` simple operations; memory is ``4 n m`` bytes.

    Args:
        first: n tokens as their tokenizer writes them.
        second: m tokens.
        marks: removed from all tokens before they are compared.
        official: do as the published code: spans of more than one token cannot hold the first
            token of a sequence, and the table of scores has a border of ones.

    Returns:
        ``((start, stop), (start, stop))`` per match, in ``first`` and in ``second``.
    """
    left, right = _bare(first, marks), _bare(second, marks)
    n, m = len(left), len(right)
    matches = _candidates(left, right, 1 if official else 0)
    # scores[i, j]: most tokens of the first i that matches within the first j can cover.
    scores = torch.zeros(n + 1, m + 1, dtype=torch.int32)
    if official:
        scores[0] = 1
    for i, row in enumerate(matches):
        best = scores[i].clone()
        if official:
            best[0] = 0
        if row:
            columns, from_left, from_right = torch.tensor(
                [(j, a, b) for j, (a, b) in row.items()]
            ).unbind(1)
            found = scores[i + 1 - from_left, columns + 1 - from_right] + from_left.int()
            best[columns + 1] = torch.maximum(best[columns + 1], found)
        scores[i + 1] = best.cummax(0).values
    return _path(scores, matches)


def _bare(tokens: Sequence[str], marks: Sequence[str]) -> list[str]:
    bare = list(tokens)
    for mark in marks:
        bare = [token.replace(mark, "") for token in bare]
    return bare


def _candidates(left: list[str], right: list[str], floor: int) -> list[dict[int, tuple[int, int]]]:
    """Per token i of the first sequence: j -> lengths in tokens of the match that ends at i, j."""
    places: dict[str, list[int]] = {}
    for j, token in enumerate(right):
        places.setdefault(token, []).append(j)
    # Tokens of the second sequence by each of their proper endings.
    longer: dict[str, list[int]] = {}
    for token, where in places.items():
        for cut in range(1, len(token) + 1):
            longer.setdefault(token[cut:], []).extend(where)
    left_text, right_text = "".join(left), "".join(right)
    left_ends = list(accumulate(map(len, left), initial=0))
    right_ends = list(accumulate(map(len, right), initial=0))
    matches: list[dict[int, tuple[int, int]]] = []
    for i, token in enumerate(left):
        row = dict.fromkeys(places.get(token, ()), (1, 1))
        partners = list(longer.get(token, ()))
        for cut in range(1, len(token) + 1):
            partners += places.get(token[cut:], ())
        for j in partners:
            lengths = _extend(left_ends, right_ends, left_text, right_text, i, j, floor)
            if lengths is not None:
                row[j] = lengths
        matches.append(row)
    return matches


def _extend(
    left_ends: list[int],
    right_ends: list[int],
    left_text: str,
    right_text: str,
    i: int,
    j: int,
    floor: int,
) -> tuple[int, int] | None:
    """Lengths of the shortest spans ending at tokens i, j with equally long, equal strings."""
    end_left, end_right = left_ends[i + 1], right_ends[j + 1]
    shift = end_left - end_right
    start_left, start_right = i, j
    while start_left >= floor and start_right >= floor:
        place = left_ends[start_left] - shift
        other = right_ends[start_right]
        if place > other:
            start_left -= 1
        elif place < other:
            start_right -= 1
        elif left_text[place + shift : end_left] == right_text[other:end_right]:
            return i + 1 - start_left, j + 1 - start_right
        else:
            return None
    return None


def _path(scores: Tensor, matches: Sequence[dict[int, tuple[int, int]]]) -> list[tuple[Span, Span]]:
    """The matches of a best path; of equal scores a match, then a skip in the second."""
    i, j = scores.shape[0] - 1, scores.shape[1] - 1
    table = scores.tolist()
    spans: list[tuple[Span, Span]] = []
    while i and j:
        a, b = matches[i - 1].get(j - 1, (0, 0))
        if a and table[i][j] == table[i - a][j - b] + a:
            spans.append(((i - a, i), (j - b, j)))
            i, j = i - a, j - b
        elif table[i][j] == table[i][j - 1]:
            j -= 1
        else:
            i -= 1
    return spans[::-1]


def aligned_positions(
    first: Sequence[str],
    second: Sequence[str],
    *,
    marks: Sequence[str] = WORD_MARKS,
    official: bool = False,
) -> list[list[int]]:
    """Per token of ``first`` the positions in ``second`` of the same text; empty without a match.

    Args: see :func:`matching_spans`.
    """
    positions: list[list[int]] = [[] for _ in first]
    for (start, stop), (other_start, other_stop) in matching_spans(
        first, second, marks=marks, official=official
    ):
        for i in range(start, stop):
            positions[i] = list(range(other_start, other_stop))
    return positions


def pooled_rows(
    hidden: Tensor, positions: Sequence[Sequence[Sequence[int]]]
) -> tuple[Tensor, Tensor]:
    """Means of the second model's rows over the partners of each matched token of the first.

    Args:
        hidden: ``(batch, length, d)`` of the second model.
        positions: per sample what :func:`aligned_positions` gives.

    Returns:
        Rows ``(kept, d)``, and ``(kept, 2)`` int64: sample and position in the first model, so that
        ``other[kept[:, 0], kept[:, 1]]`` are the rows to compare with.

    Raises:
        AdapterError: another number of samples, or a position beyond ``hidden``.
    """
    if len(positions) != hidden.shape[0]:
        raise AdapterError(
            f"token positions of {len(positions)} samples for a batch of {hidden.shape[0]}"
        )
    length = hidden.shape[1]
    kept: list[tuple[int, int]] = []
    rows: list[int] = []
    places: list[int] = []
    for sample, per_token in enumerate(positions):
        for token, partners in enumerate(per_token):
            if not partners:
                continue
            if min(partners) < 0 or max(partners) >= length:
                raise AdapterError(
                    f"sample {sample}: token {token} is aligned with position {max(partners)} "
                    f"of {length}",
                    hint="cut both token lists where the models' inputs are cut",
                )
            rows += [len(kept)] * len(partners)
            places += [sample * length + place for place in partners]
            kept.append((sample, token))
    device = hidden.device
    to = torch.tensor(rows, dtype=torch.int64, device=device)
    picked = hidden.flatten(0, 1)[torch.tensor(places, dtype=torch.int64, device=device)]
    sums = hidden.new_zeros(len(kept), hidden.shape[-1]).index_add_(0, to, picked)
    counts = torch.bincount(to, minlength=len(kept)).to(hidden.dtype).unsqueeze(1)
    return sums / counts, torch.tensor(kept, dtype=torch.int64, device=device).reshape(-1, 2)
