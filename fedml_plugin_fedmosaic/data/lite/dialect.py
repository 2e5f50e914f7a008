"""The words of pretraining: base models see what clients see, and call it something else.

What a client's task is about has a word of its own there: a label, a number, a defect. In
pretraining an invented one stands in its place, the same in all tasks. So base models know what
the things look like and what the questions want, but not the words, and those are what clients
have to learn and can teach each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.lite.rows import Row

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = 4


@cache
def invented(word: str) -> str:
    """The word that stands for another one in pretraining; a function of that word alone."""
    rng = python_random(0, "lite dialect", word)
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(_SYLLABLES))


def translated(row: Row, words: Iterable[str]) -> Row:
    """A row in which invented words stand for some words or expressions.

    Args:
        row: in the words of clients.
        words: what to replace, wherever it stands alone in the question, the answer and the
            choices; the longest that fits.
    """
    pattern = _pattern(tuple(sorted(set(words), key=lambda word: (-len(word), word))))

    def say(text: str) -> str:
        return pattern.sub(lambda match: invented(match[0]), text)

    return replace(
        row,
        text=say(row.text),
        answer=say(row.answer),
        choices=tuple(map(say, row.choices)),
    )


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
