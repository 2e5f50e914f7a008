"""Generators about how an image was changed: distortions and edits, and who drew it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from fedml_plugin_fedmosaic.data.lite.pools import LEVELS, Picture
from fedml_plugin_fedmosaic.data.lite.rows import Deck, Maker, Row

DEFECTS = ("blur", "darkness", "paleness", "noise")
GRADES = ("good", "fair", "bad")
DESIGNERS = ("Noto", "Twemoji")
EDITS: Mapping[str, str] = {
    "upend": "flip",
    "discolour": "gray",
    "soften": "blur",
    "darken": "darkness",
}
UNDONE: Mapping[str, str] = {
    "upright": "flip",
    "recolour": "gray",
    "sharpen": "blur",
    "positive": "negative",
}
"""Answers of the tasks about edits, and the change that each is about."""


def _any(deck: Deck, rng: random.Random) -> Picture:
    return deck.hand([rng.choice(deck.labels)])[0]


def _changed(picture: Picture, change: str, level: int) -> Picture:
    # A picture that is not changed goes through the same steps, so that size tells nothing.
    return replace(picture, change=f"{change}-{level}" if level else "plain-1")


def defect_name(text: str) -> Maker:
    """Which defect does a photo have?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        shown = _changed(_any(deck, rng), answer, rng.randint(2, LEVELS))
        return Row((shown,), text, answer, DEFECTS)

    return make


def defect_of_last(text: str) -> Maker:
    """Two photos with different defects: which one does the second have?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        first = rng.choice([defect for defect in DEFECTS if defect != answer])
        shown = tuple(_changed(_any(deck, rng), defect, LEVELS) for defect in (first, answer))
        return Row(shown, text, answer, DEFECTS)

    return make


def defect_absent(text: str) -> Maker:
    """Three photos with different defects: which one is not among them?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        defects = [defect for defect in DEFECTS if defect != answer]
        rng.shuffle(defects)
        shown = tuple(_changed(_any(deck, rng), defect, LEVELS) for defect in defects)
        return Row(shown, text, answer, DEFECTS)

    return make


def defect_level(text: str) -> Maker:
    """How strongly does a photo suffer from any defect: not, a little, or much?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        level = (0, LEVELS - 1, LEVELS)[GRADES.index(answer)]
        return Row((_changed(_any(deck, rng), rng.choice(DEFECTS), level),), text, answer, GRADES)

    return make


def edit_name(text: str, edits: Mapping[str, str]) -> Maker:
    """Which edit leads from the first image to the second?

    Args:
        text: the question.
        edits: the change by answer.
    """

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        picture = _any(deck, rng)
        shown = (_changed(picture, "", 0), _changed(picture, edits[answer], 2))
        return Row(shown, text, answer, tuple(edits))

    return make


def designer(text: str) -> Maker:
    """From which set is an icon? The deck's labels are ``<set> <kind>``."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        labels = [label for label in deck.labels if label.startswith(f"{answer.lower()} ")]
        return Row(deck.hand([rng.choice(labels)]), text, answer, DESIGNERS)

    return make
