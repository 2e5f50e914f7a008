"""Generators about how an image was changed: distortions and edits, and who drew it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from fedml_plugin_fedmosaic.data.lite.pools import LEVELS, Picture
from fedml_plugin_fedmosaic.data.lite.rows import LETTERS, YES_NO, Deck, Maker, Row

DEFECTS = ("blur", "darkness", "paleness", "noise")
EDITS: Mapping[str, str] = {
    "flip": "turn it upside down",
    "gray": "remove all colour",
    "blur": "make it blurry",
    "darkness": "make it darker",
}
NEW_EDITS = ("flipped", "gray", "blurred", "inverted")
_EDIT_WORDS = dict(zip(NEW_EDITS, ("flip", "gray", "blur", "negative"), strict=True))


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


def defect_present(text: str) -> Maker:
    """Does a photo have the named defect? Otherwise it has another one."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        asked = rng.choice(DEFECTS)
        others = [defect for defect in DEFECTS if defect != asked]
        real = asked if answer == YES_NO[0] else rng.choice(others)
        shown = _changed(_any(deck, rng), real, rng.randint(1, LEVELS))
        return Row((shown,), text.format(asked), answer, YES_NO)

    return make


def defect_strongest(text: str, count: int) -> Maker:
    """Which of several photos suffers most from the named defect?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        asked = rng.choice(DEFECTS)
        levels = sorted(rng.sample(range(LEVELS + 1), count))
        top = levels.pop()
        rng.shuffle(levels)
        levels.insert(LETTERS.index(answer), top)
        shown = tuple(_changed(_any(deck, rng), asked, level) for level in levels)
        return Row(shown, text.format(asked), answer, LETTERS[:count])

    return make


def edit_direction(text: str) -> Maker:
    """Does the named edit lead from the first image to the second?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        change = rng.choice(sorted(EDITS))
        picture = _any(deck, rng)
        pair = (_changed(picture, change, 0), _changed(picture, change, 2))
        shown = pair if answer == YES_NO[0] else _not_by(pair, change, rng)
        return Row(shown, text.format(EDITS[change]), answer, YES_NO)

    return make


def _not_by(
    pair: tuple[Picture, Picture], change: str, rng: random.Random
) -> tuple[Picture, Picture]:
    """The pair that another edit makes, or the right one backwards where that can be seen."""
    if change != "flip" and rng.random() < 0.5:
        return pair[::-1]
    other = rng.choice([name for name in sorted(EDITS) if name != change])
    return pair[0], _changed(pair[0], other, 2)


def edit_name(text: str) -> Maker:
    """What was done to the first image to get the second?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        picture = _any(deck, rng)
        shown = (_changed(picture, "", 0), _changed(picture, _EDIT_WORDS[answer], 2))
        return Row(shown, text, answer, NEW_EDITS)

    return make


def same_designer(text: str) -> Maker:
    """Are two icons of one style? The deck's labels are ``<style> <kind>``."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        styles = sorted({label.split(" ", 1)[0] for label in deck.labels})
        first = rng.choice(styles)
        second = first
        while answer == YES_NO[1] and second == first:
            second = rng.choice(styles)
        labels = [
            rng.choice([label for label in deck.labels if label.startswith(f"{style} ")])
            for style in (first, second)
        ]
        return Row(deck.hand(labels), text, answer, YES_NO)

    return make
