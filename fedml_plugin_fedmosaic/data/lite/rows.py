"""Rows before they are written, and the deck that deals their pictures."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedml_plugin_fedmosaic.data.lite.pools import Picture

TRUTH = ("True", "False")
YES_NO = ("Yes", "No")
ANSWER = " Your answer is:"

_A_VOWEL = re.compile(r"\ba(?= [aeiou])")


@dataclass(frozen=True, slots=True)
class Row:
    """One generated question.

    Attributes:
        pictures: in the order of the marks.
        text: the question.
        answer: the gold answer.
        choices: what the prompt offers; empty for an open question.
    """

    pictures: tuple[Picture, ...]
    text: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The user's text with one mark per image, in the form the multi-choice parser reads."""
        choices = f" Choice list:[{', '.join(self.choices)}]." if self.choices else ""
        text = _A_VOWEL.sub("an", self.text)
        return f"{'<image>' * len(self.pictures)}\n{text}{choices}{ANSWER}"


class Deck:
    """Deals pictures by label; all of a label's are dealt before one comes again.

    Args:
        groups: pictures by label.
        rng: shuffles them.
    """

    def __init__(self, groups: Mapping[str, Sequence[Picture]], rng: random.Random) -> None:
        self.groups = groups
        self.labels = tuple(groups)
        self._rng = rng
        self._left: dict[str, list[Picture]] = {}

    def hand(self, labels: Sequence[str]) -> tuple[Picture, ...]:
        """Different pictures, one per label."""
        dealt: list[Picture] = []
        for label in labels:
            dealt.append(self._draw(label, dealt))
        return tuple(dealt)

    def others(self, label: str, count: int) -> list[str]:
        """Different labels that are not ``label``, in random order."""
        return self._rng.sample([name for name in self.labels if name != label], count)

    def other(self, label: str) -> str:
        """Another label."""
        return self.others(label, 1)[0]

    def rich(self, count: int) -> tuple[str, ...]:
        """Labels with at least so many pictures; all if there are none."""
        return tuple(k for k in self.labels if len(self.groups[k]) >= count) or self.labels

    def _draw(self, label: str, taken: Sequence[Picture]) -> Picture:
        for _ in range(2):
            left = self._left.get(label)
            if not left:
                left = list(self.groups[label])
                self._rng.shuffle(left)
                self._left[label] = left
            for position in range(len(left) - 1, -1, -1):
                if left[position] not in taken:
                    return left.pop(position)
            # What is left was dealt in this row already: the label is shuffled anew.
            self._left[label] = []
        # A label with fewer pictures than the row asks of it.
        return self._rng.choice(self.groups[label])


Maker = Callable[[Deck, str, random.Random], Row]
"""Makes a row with the given answer."""
