"""The text of a vocabulary that is nearest to another text, by edit distance.

Source: vocabulary mapping by minimum edit distance (MinED) of FuseLLM (Wan et al. 2024,
arXiv 2401.10491) and FedMKT (Fan et al., COLING 2025, arXiv 2406.02224).

The published code compares a text with every text of the vocabulary. Here most of them are ruled
out first: one edit changes at most two of the pairs of neighbouring characters (Ukkonen 1992), ends
included. So a text that is d edits away has k of any 2 d + k different pairs of the asked text, of
which the rarest are looked up; for d = 1, 2, ... until one is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SHIFT = 21  # code points have 21 bits
_END = "\0"


def edit_distances(text: str, others: Sequence[str]) -> Tensor:
    """Levenshtein distances: insertions, deletions and substitutions of single characters.

    Args:
        text: n characters.
        others: texts to compare with.

    Returns:
        int64 ``(len(others),)``.
    """
    starts, lengths = _places(others)
    return _distances(text, _characters("".join(others)), starts, lengths)


def _characters(text: str) -> Tensor:
    """Code points, int32 ``(n,)``."""
    if not text:
        return torch.zeros(0, dtype=torch.int32)
    encoded = text.encode("utf-32-le", "surrogatepass")
    return torch.frombuffer(bytearray(encoded), dtype=torch.int32)


def _places(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Where each text begins in all of them written one after the other, and how long it is."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    return lengths.cumsum(0) - lengths, lengths


def _distances(text: str, characters: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Rows of the usual table, for all texts at once."""
    if not len(lengths):
        return lengths
    width = int(lengths.max())
    places = starts[:, None] + torch.arange(width)
    # What lies behind a text's end is never read: its distance stands in an earlier column.
    others = characters[places.clamp(max=max(len(characters) - 1, 0))] if width else places
    columns = torch.arange(width + 1, dtype=torch.int32)
    row = columns.expand(len(lengths), -1)
    for number, character in enumerate(_characters(text), start=1):
        change = torch.minimum(row[:, 1:] + 1, row[:, :-1] + (others != character).int())
        first = torch.full((len(lengths), 1), number, dtype=torch.int32)
        # An insertion costs 1 per column: a running minimum of what is left without these costs.
        row = (torch.cat([first, change], 1) - columns).cummin(1).values + columns
    return row.gather(1, lengths[:, None])[:, 0].to(torch.int64)


class Lexicon:
    """The texts of a vocabulary, to be asked for the nearest one.

    Building takes about a second for 260,000 texts; an answer for a text that is not among them
    some milliseconds, and is remembered.

    Args:
        texts: text of each id; empty for ids that are never an answer.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._exact: dict[str, int] = {}
        for number, text in enumerate(texts):
            if text:
                self._exact.setdefault(text, number)
        self._near: dict[str, int | None] = {}
        joined = list(self._exact)
        self._ids = torch.tensor(list(self._exact.values()), dtype=torch.int64)
        self._characters = _characters("".join(joined))
        self._starts, self._lengths = _places(joined)
        pairs = _pairs(_characters(_END + "".join(text + _END for text in joined)))
        owners = torch.repeat_interleave(torch.arange(len(joined)), self._lengths + 1)
        self._pairs, order = pairs.sort(stable=True)
        self._owners = owners[order]

    def exact(self, text: str) -> int | None:
        """The first id of exactly this text; None if there is none."""
        return self._exact.get(text)

    def nearest(self, text: str) -> int | None:
        """The id of the same text, or else of the one with the smallest edit distance.

        Of several the smallest id, which in vocabularies made by merging is the oldest.

        Returns:
            None for an empty text, and if even the nearest is further away than half of the asked
            text's characters (rounded up), or shares no character with it.
        """
        if text in self._exact:
            return self._exact[text]
        if text not in self._near:
            self._near[text] = self._search(text)
        return self._near[text]

    def _search(self, text: str) -> int | None:
        if not len(self._ids):
            return None
        length = len(text)
        rarest = self._postings(text)
        for distance in range(1, (length + 1) // 2 + 1):
            places = self._candidates(rarest, length, distance)
            lengths = self._lengths[places]
            values = _distances(text, self._characters, self._starts[places], lengths)
            near = places[(values <= distance) & (values < lengths.clamp(min=length))]
            if len(near):
                return int(self._ids[near].min())
        return None

    def _postings(self, text: str) -> list[Tensor]:
        """For each different pair of a text, the texts that have it; the rarest pair first."""
        wanted: Tensor = torch.unique(_pairs(_characters(_END + text + _END)))
        begins = torch.searchsorted(self._pairs, wanted).tolist()
        ends = torch.searchsorted(self._pairs, wanted, right=True).tolist()
        return sorted((self._owners[a:b] for a, b in zip(begins, ends, strict=True)), key=len)

    def _candidates(self, rarest: Sequence[Tensor], length: int, distance: int) -> Tensor:
        """All texts that can be so near, and others."""
        spared = 2 * distance
        if spared >= len(rarest):
            return ((self._lengths - length).abs() <= distance).nonzero()[:, 0]
        needed = 2 if spared + 2 <= len(rarest) else 1
        found = torch.cat(list(rarest[: spared + needed]))
        found = found[(self._lengths[found] - length).abs() <= distance]
        places: Tensor
        places, counts = torch.unique(found, return_counts=True)
        return places[counts >= needed]


def _pairs(characters: Tensor) -> Tensor:
    """Neighbouring characters as one number each, int64 ``(n - 1,)``."""
    wide = characters.to(torch.int64)
    return (wide[:-1] << _SHIFT) | wide[1:]
