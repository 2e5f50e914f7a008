"""Synonyms from WordNet's plain database files, in the form that NLTK's METEOR asks for them.

Formats: WordNet's manual pages wndb(5WN) for the files and morphy(7WN) for base forms. The files
are those of WordNet's own distribution, which Debian packages as wordnet-base; NLTK's reader takes
only NLTK's own download of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_POS = ("noun", "verb", "adj", "adv")
_ENDINGS = {
    "noun": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
             ("shes", "sh"), ("men", "man"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""),
             ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip
"""Rules of detachment: an ending and what takes its place."""


@dataclass(frozen=True, slots=True)
class Lemma:
    """A word of a synset."""

    text: str

    def name(self) -> str:
        """The word; parts of a compound are joined by underscores."""
        return self.text


@dataclass(frozen=True, slots=True)
class Synset:
    """Words with one meaning."""

    words: tuple[str, ...]

    def lemmas(self) -> list[Lemma]:
        """Its words."""
        return [Lemma(word) for word in self.words]


class WordNet:
    """WordNet's database in memory.

    Args:
        folder: holds ``index.<pos>``, ``data.<pos>`` and ``<pos>.exc`` for noun, verb, adj, adv.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._index = {pos: dict(_index(folder / f"index.{pos}")) for pos in _POS}
        self._data = {pos: dict(_data(folder / f"data.{pos}")) for pos in _POS}
        self._exceptions = {pos: dict(_exceptions(folder / f"{pos}.exc")) for pos in _POS}

    def synsets(self, word: str) -> list[Synset]:
        """All meanings of a word and of its base forms."""
        found: list[Synset] = []
        for pos in _POS:
            offsets: dict[str, None] = {}
            for form in self._forms(word.lower(), pos):
                offsets.update(dict.fromkeys(self._index[pos].get(form, ())))
            found += [Synset(self._data[pos][offset]) for offset in offsets]
        return found

    def _forms(self, word: str, pos: str) -> list[str]:
        irregular = self._exceptions[pos].get(word)
        if irregular is not None:
            return [word, *irregular]
        cut = [
            word.removesuffix(ending) + instead
            for ending, instead in _ENDINGS[pos]
            if word.endswith(ending)
        ]
        return [word, *cut]


def _lines(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("  "):  # the licence
                yield line.split()


def _index(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for parts in _lines(path):
        yield parts[0], tuple(parts[-int(parts[2]) :])


def _data(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for parts in _lines(path):
        count = int(parts[3], 16)
        # Adjectives may carry a mark of their position, such as good(p).
        yield parts[0], tuple(word.partition("(")[0] for word in parts[4 : 4 + 2 * count : 2])


def _exceptions(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for parts in _lines(path):
        yield parts[0], tuple(parts[1:])


@cache
def wordnet(folder: str) -> WordNet:
    """The database of a folder, read once."""
    return WordNet(Path(folder))
