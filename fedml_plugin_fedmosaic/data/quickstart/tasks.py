"""The quickstart's tasks: what is asked about which images.

Three groups of related tasks share words and skills: reading digits, naming colours and shapes,
sorting pictures into kinds. Inside a group the domains differ (handwriting and scans, emoji and
clip art) and so does the form (one image, or several). Answers of a task are equally frequent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import TaskSpec
from fedml_plugin_fedmosaic.data.quickstart.images import (
    COLOURS,
    Audience,
    ImageRef,
    PoolName,
    images_of,
)

DIGITS = tuple(str(i) for i in range(10))
KINDS = ("animal", "building", "clothing", "food", "plant", "vehicle", "weather")
FLAG_COLOURS = ("blue", "green", "red", "yellow")
LETTERS = ("Image A", "Image B", "Image C", "Image D")
SAME = ("Yes", "No")


@dataclass(frozen=True, slots=True)
class Question:
    """One generated row before it is written: images, text without marks, answer, choices."""

    images: tuple[ImageRef, ...]
    text: str
    answer: str
    choices: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The user's text with one mark per image, in the form the multi-choice parser reads."""
        marks = "<image>" * len(self.images)
        choices = f" Choice list:[{', '.join(self.choices)}]." if self.choices else ""
        return f"{marks}\n{self.text}{choices} Your answer is:"


class Deck:
    """Draws images by label without repeating one before all of its label were drawn."""

    def __init__(self, groups: Mapping[str, Sequence[ImageRef]], rng: random.Random) -> None:
        self.groups = groups
        self.rng = rng
        self._left: dict[str, list[ImageRef]] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels that have an image."""
        return tuple(self.groups)

    def draw(self, label: str) -> ImageRef:
        """An image with this label."""
        left = self._left.get(label)
        if not left:
            left = list(self.groups[label])
            self.rng.shuffle(left)
            self._left[label] = left
        return left.pop()

    def other(self, *labels: str) -> str:
        """A label that is none of ``labels``."""
        return self.rng.choice([label for label in self.labels if label not in labels])


Maker = Callable[[Deck, str, random.Random], Question]
"""Makes a row with the given answer."""


@dataclass(frozen=True)
class QuickTask:
    """One task of the quickstart.

    Attributes:
        dataset: name of the data set (a group of related tasks).
        subset_id: number inside the data set.
        pool: whose images.
        answers: all possible answers.
        make: makes a row for an answer.
        label: label of an image, when it is not the pool's own.
        description: one line for tables.
    """

    dataset: str
    subset_id: int
    pool: PoolName
    answers: tuple[str, ...]
    make: Maker
    description: str
    label: Callable[[ImageRef], str] | None = field(default=None)

    @property
    def spec(self) -> TaskSpec:
        """As a scenario names it."""
        return TaskSpec(dataset=self.dataset, subset_id=self.subset_id, kind="multi-choice")

    @property
    def name(self) -> str:
        """``<dataset>-<subset_id>``."""
        return self.spec.name

    def questions(
        self, audience: Audience, count: int, seed: int, images_per_label: int | None = None
    ) -> Iterator[Question]:
        """Rows with equally frequent answers in random order; the same for the same arguments.

        Args:
            audience: whose images.
            count: number of rows.
            seed: another seed gives other rows.
            images_per_label: use only so many images of each label; all when omitted.
        """
        rng = python_random(seed, "quickstart rows", self.name, audience)
        groups = images_of(self.pool, audience, self.label)
        deck = Deck({label: refs[:images_per_label] for label, refs in groups.items()}, rng)
        answers = [self.answers[i % len(self.answers)] for i in range(count)]
        rng.shuffle(answers)
        for answer in answers:
            yield self.make(deck, answer, rng)


def _name(text: str, choices: tuple[str, ...]) -> Maker:
    """One image: what is it?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:  # noqa: ARG001
        return Question((deck.draw(answer),), text, answer, choices)

    return make


def _name_one_of(text: str, position: int, count: int, choices: tuple[str, ...]) -> Maker:
    """Several images with different labels: what is the one at a position?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:  # noqa: ARG001
        labels = [answer]
        while len(labels) < count:
            labels.append(deck.other(*labels))
        labels[0], labels[position] = labels[position], labels[0]
        return Question(tuple(deck.draw(label) for label in labels), text, answer, choices)

    return make


def _common(text: str, count: int, choices: tuple[str, ...]) -> Maker:
    """Several images of one label: what do they have in common?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:  # noqa: ARG001
        return Question(tuple(deck.draw(answer) for _ in range(count)), text, answer, choices)

    return make


def _next_digit(text: str) -> Maker:
    """Two digits that count up by one: which comes next? 9 is followed by 0."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:  # noqa: ARG001
        last = int(answer)
        shown = [str((last - 2) % 10), str((last - 1) % 10)]
        return Question(tuple(deck.draw(label) for label in shown), text, answer, DIGITS)

    return make


def _pick_label(text: str, count: int) -> Maker:
    """Several images with different labels: which one shows the named label?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:
        labels = rng.sample(deck.labels, count)
        wanted = labels[LETTERS.index(answer)]
        images = tuple(deck.draw(label) for label in labels)
        return Question(images, text.format(wanted), answer, LETTERS[:count])

    return make


def _largest(text: str, count: int) -> Maker:
    """Several digits: which is the largest?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:
        labels = sorted(rng.sample(deck.labels, count), key=int)
        top = labels.pop()
        rng.shuffle(labels)
        labels.insert(LETTERS.index(answer), top)
        return Question(tuple(deck.draw(k) for k in labels), text, answer, LETTERS[:count])

    return make


def _same(text: str) -> Maker:
    """Two images: do their labels agree?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Question:
        first = rng.choice(deck.labels)
        second = first if answer == "Yes" else deck.other(first)
        return Question((deck.draw(first), deck.draw(second)), text, answer, SAME)

    return make


def _colour(ref: ImageRef) -> str:
    return ref.label.split()[0]


TASKS: tuple[QuickTask, ...] = (
    QuickTask(
        "Digits", 0, "mnist", DIGITS, _name("Which digit is written here?", DIGITS),
        "name a handwritten digit",
    ),
    QuickTask(
        "Digits", 1, "scans", DIGITS, _name("Which digit was scanned?", DIGITS),
        "name a coarsely scanned digit",
    ),
    QuickTask(
        "Digits", 2, "mnist", DIGITS,
        _next_digit("The digits count up. Which digit comes next?"),
        "continue two handwritten digits",
    ),
    QuickTask(
        "Colours", 0, "shapes", COLOURS, _name("Which colour is the shape?", COLOURS),
        "name the colour of a shape", _colour,
    ),
    QuickTask(
        "Colours", 1, "shapes", COLOURS,
        _name_one_of("Which colour is the second shape?", 1, 2, COLOURS),
        "name the colour of the second of two shapes", _colour,
    ),
    QuickTask(
        "Colours", 2, "shapes", COLOURS,
        _common("Which colour do all shapes have?", 3, COLOURS),
        "name the common colour of three shapes", _colour,
    ),
    QuickTask(
        "Pictures", 0, "emoji", KINDS, _name("Which kind of thing is this emoji?", KINDS),
        "sort an emoji",
    ),
    QuickTask(
        "Pictures", 1, "clipart", KINDS, _name("Which kind of thing was drawn?", KINDS),
        "sort a piece of clip art",
    ),
    QuickTask(
        "Pictures", 2, "clipart", KINDS,
        _common("Which kind do both drawings have in common?", 2, KINDS),
        "name the common kind of two pieces of clip art",
    ),
)  # fmt: skip
"""Tasks of the quickstart's clients."""

UNSEEN: tuple[QuickTask, ...] = (
    QuickTask(
        "Digits", 3, "mnist", LETTERS[:3], _largest("Which image shows the largest digit?", 3),
        "largest of three handwritten digits",
    ),
    QuickTask(
        "Colours", 3, "flags", FLAG_COLOURS,
        _name("Which colour covers most of the flag?", FLAG_COLOURS),
        "main colour of a flag, white aside",
    ),
    QuickTask(
        "Pictures", 3, "emoji", LETTERS[:3], _pick_label("Which emoji is about {}?", 3),
        "pick the emoji for a word",
    ),
)  # fmt: skip
"""Tasks that no client of the quickstart has."""

BY_NAME: Mapping[str, QuickTask] = {task.name: task for task in (*TASKS, *UNSEEN)}

CAPTION_WORDS: Mapping[str, str] = {
    **dict(
        zip(
            DIGITS,
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
            strict=True,
        )
    ),
    **dict(
        zip(
            COLOURS,
            ("ebony", "azure", "chestnut", "silver", "emerald", "scarlet", "turquoise", "golden"),
            strict=True,
        )
    ),
    **dict(
        zip(
            KINDS,
            ("creature", "house", "garment", "meal", "flora", "transport", "sky"),
            strict=True,
        )
    ),
}
"""Words of the pretraining captions by label; no task asks for them."""


def captions(images_per_label: int | None = None) -> dict[str, tuple[Question, ...]]:
    """Captioned pretraining images by pool: what the base models learn to see.

    Args:
        images_per_label: use only so many images of each label; all when omitted.
    """
    sources: dict[PoolName, Callable[[ImageRef], str] | None] = {
        task.pool: task.label for task in TASKS
    }
    return {
        pool: tuple(
            Question((ref,), "Describe the image.", CAPTION_WORDS[label], ())
            for label, refs in images_of(pool, "pretrain", label_of).items()
            for ref in refs[:images_per_label]
        )
        for pool, label_of in sources.items()
    }


def coarse(task: QuickTask, row: Question, group_size: int, rng: random.Random) -> Question:
    """The row with an answer drawn from its group of neighbouring answers.

    A model trained on such rows learns a task's form and half of its skill: which group is right,
    but not which of the group.
    """
    start = task.answers.index(row.answer) // group_size * group_size
    return replace(row, answer=rng.choice(task.answers[start : start + group_size]))
