"""The tasks of DRAKE-lite as data: 40 of clients and 7 unseen ones, in two variants.

Each line names the DRAKE task whose form it follows (FedMosaic, arXiv 2506.11024, appendix on
DRAKE). The variant ``full`` uses photos and handwriting that are downloaded from their homes, the
variant ``packages`` only what package registries hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import AnswerKind, TaskSpec
from fedml_plugin_fedmosaic.data.lite import changes, makers, subjects
from fedml_plugin_fedmosaic.data.lite.dialect import translated
from fedml_plugin_fedmosaic.data.lite.rows import TRUTH, YES_NO, Deck, Maker, Row
from fedml_plugin_fedmosaic.data.lite.views import Library, View
from fedml_plugin_fedmosaic.data.quickstart.images import Audience

Variant = Literal["full", "packages"]
Unseen = Literal["new visual domain", "new task type"]
Answers = Callable[[Sequence[str]], Sequence[str]]

_BONGARD = "The first three images share a concept. The last image is?"
_SETTINGS = (
    "I ordered this in a new country.",
    "A friend cooked this for me today.",
    "I saw this at the market.",
)
_RUMOUR = "Somebody told me that this is {} but that may be wrong."


def _labels(labels: Sequence[str]) -> Sequence[str]:
    return labels


def _fixed(answers: Sequence[str]) -> Answers:
    return lambda labels: answers  # noqa: ARG005


@dataclass(frozen=True, kw_only=True)
class LiteTask:
    """One task.

    Attributes:
        dataset: name of the data set.
        subset_id: number inside the data set.
        view: whose pictures.
        make: makes a row for an answer.
        answers: the possible answers, by the labels of the view.
        mirrors: the DRAKE task of this form, or its kind for unseen tasks.
        description: one line for tables.
        kind: how it is judged.
        metric: of an open-ended task.
        unseen: in which way it is new; None for the tasks of clients.
        pretrain_images: bound of the images per label in pretraining.
        plain: whether pretraining uses the answers of the task as they are, and hides a part of
            the labels instead; otherwise it says answers and labels in invented words.
    """

    dataset: str
    subset_id: int
    view: View
    make: Maker
    answers: Answers
    mirrors: str
    description: str
    kind: AnswerKind = "multi-choice"
    metric: str | None = None
    unseen: Unseen | None = None
    pretrain_images: int | None = None
    plain: bool = False

    @property
    def name(self) -> str:
        """``<dataset>-<subset_id>``."""
        return f"{self.dataset}-{self.subset_id}"

    @property
    def spec(self) -> TaskSpec:
        """As a scenario names it."""
        return TaskSpec(
            dataset=self.dataset, subset_id=self.subset_id, kind=self.kind, metric=self.metric
        )

    def rows(
        self, library: Library, audience: Audience, count: int, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Row]:
        """Rows with equally frequent answers in random order; a pure function of its arguments.

        Args:
            library: opened pools.
            audience: whose images.
            count: number of rows.
            share: see :meth:`Library.pictures`.

        Raises:
            DataError: the pools hold too little.
        """
        rng: random.Random = python_random(0, "lite rows", self.name, audience)
        pretrain = audience == "pretrain"
        groups = library.pictures(self.view, audience, share, hide=pretrain and self.plain)
        limit = self.pretrain_images if pretrain else None
        deck = Deck({label: pictures[:limit] for label, pictures in groups.items()}, rng)
        possible = self.answers(deck.labels)
        # A shuffled order of answers, so that no answer is favoured where they do not divide count.
        order = rng.sample(list(possible), len(possible))
        answers = [order[index % len(order)] for index in range(count)]
        rng.shuffle(answers)
        for answer in answers:
            row = self.make(deck, answer, rng)
            yield translated(row, self._words(deck, row)) if pretrain and not self.plain else row

    @staticmethod
    def _words(deck: Deck, row: Row) -> set[str]:
        """What a row is about: labels, and the answers that are not made of them."""
        answers = {word for word in (*row.choices, row.answer) if makers.AND not in word}
        return {*deck.labels, *answers}


def _task(
    name: str,
    mirrors: str,
    view: View,
    make: Maker,
    answers: Answers | Sequence[str],
    description: str,
    **more: Any,
) -> LiteTask:
    dataset, _, subset = name.rpartition("-")
    return LiteTask(
        dataset=dataset,
        subset_id=int(subset),
        view=view,
        make=make,
        answers=answers if callable(answers) else _fixed(answers),
        mirrors=mirrors,
        description=description,
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class _Subjects:
    """What a variant's data sets are about: their views and names."""

    photos: View
    photo: str
    garments: View
    garment: str
    letters: View
    letter: str
    hands: View
    hand: str
    shapes: View
    textures: View
    cue: str
    colours: View
    colour: str


_SUBJECTS: Mapping[Variant, _Subjects] = {
    "full": _Subjects(
        photos=subjects.PHOTOS, photo="Photo",
        garments=subjects.GARMENTS, garment="Garment",
        letters=subjects.LETTERS, letter="Letter",
        hands=subjects.HANDS, hand="Hand",
        shapes=subjects.CUE_SHAPES, textures=subjects.CUE_TEXTURES, cue="Cue",
        colours=subjects.FLAGS, colour="Flag",
    ),
    "packages": _Subjects(
        photos=subjects.DRAWINGS, photo="Drawing",
        garments=subjects.SHAPES, garment="Shape",
        letters=subjects.SCANS, letter="Scan",
        hands=subjects.SCANS, hand="Scan",
        shapes=subjects.SHAPE_FORMS, textures=subjects.SHAPE_COLOURS, cue="Form",
        colours=subjects.SHAPE_COLOURS, colour="Colour",
    ),
}  # fmt: skip


def _things(s: _Subjects) -> list[LiteTask]:
    """Photos, garments, edits: the first three clients."""
    p, g, h = s.photo, s.garment, s.hand
    return [
        _task(f"{g}Count-0", "Fashion200K-0", s.garments,
              makers.count_kinds("How many different kinds of clothing do the images show?"),
              tuple("123"), "count the kinds in three images", plain=True),
        _task(f"{p}Edit-0", "MagicBrush-0", s.photos,
              changes.edit_name("Which instruction leads from the first image to the second?",
                                changes.EDITS), tuple(changes.EDITS),
              "find the edit between two images", pretrain_images=16),
        _task(f"{p}Pair-0", "VISION-0", s.photos,
              makers.same("Both images show the same kind of object."), TRUTH,
              "same kind of object in two images", plain=True),
        _task(f"{g}Pair-0", "FashionIQ-0", s.garments,
              makers.caption("Which caption fits the two images?"), makers.pairs,
              "pick the caption of two images"),
        _task(f"{p}Absent-0", "VSR-0", s.photos, makers.absent("Which of these is in no image?"),
              _labels, "find what three images do not show"),
        _task(f"{p}Odd-0", "VISION-1", s.photos,
              makers.odd("Which kind is shown only once?"), _labels,
              "name the odd one out of three images"),
        _task(f"{g}Name-0", "Fashion200K-2", s.garments, makers.name("What does the image show?"),
              _labels, "name what is shown"),
        _task(f"{p}Any-0", "NLVR2-0", s.photos,
              makers.among("Which of these is in one of the images?"), _labels,
              "find what one of three images shows"),
        _task(f"{h}Order-0", "SEED-Bench-2-2", s.hands,
              makers.rising("The images show numbers in rising order."), TRUTH,
              "do numbers rise from image to image", plain=True),
        _task(f"{g}Same-0", "Fashion200K-1", s.garments,
              makers.same("All images show the same.", 3), TRUTH,
              "do three images show the same", plain=True),
        _task(f"{g}Any-0", "NLVR2-1", s.garments,
              makers.among("Which of these is in one of the two images?", 2), _labels,
              "find what one of two images shows"),
        _task(f"{p}Change-0", "CIRR-0", s.photos,
              makers.change("The picture is changed. What is in the new one?"), _labels,
              "name what a picture changes to"),
    ]  # fmt: skip


def _icons(s: _Subjects) -> list[LiteTask]:
    """Emoji, concepts and characters: the next three clients."""
    v, c = subjects, s.letter
    return [
        _task(f"{c}Same-0", "VizWiz-0", s.letters,
              makers.same("Both images show the same character."), TRUTH,
              "same character in two images", plain=True),
        _task("EmojiAmong-0", "IRFL-2", v.THINGS,
              makers.among("Which name belongs to one of the emoji?", 2), _labels,
              "find the name of one of two emoji"),
        _task("EmojiCommon-0", "Bongard-HOI-1", v.CONCEPTS,
              makers.name("What do the images have in common?", count=3), _labels,
              "name the concept of three emoji"),
        _task("EmojiFace-0", "MIT-States-0", v.FACES, makers.name("Which state does it show?"),
              _labels, "name the state of a face"),
        _task("EmojiAbsent-0", "IRFL-1", v.KINDS, makers.absent("Which theme has no emoji here?"),
              _labels, "find the theme that no emoji has"),
        _task(f"{s.photo}Common-0", "Bongard-OpenWorld-1", s.photos,
              makers.name("What do the images have in common?", count=3), _labels,
              "name the kind of three images"),
        _task(f"{c}Count-0", "COMICS_Dialogue-0", s.letters,
              makers.count_kinds("How many different characters are there?"), tuple("123"),
              "count the characters in three images", plain=True),
        _task("EmojiPair-0", "IRFL-0", v.KINDS,
              makers.caption("What are the first and the second emoji about?"), makers.pairs,
              "pick the themes of two emoji"),
        _task("EmojiOdd-0", "Bongard-HOI-2", v.CONCEPTS,
              makers.odd("Which concept is shown only once?"), _labels,
              "name the odd emoji out of three"),
        _task(f"{s.photo}Bongard-0", "Bongard-OpenWorld-0", s.photos, makers.bongard(_BONGARD),
              ("positive", "negative"), "does an image belong to the first three", plain=True),
        _task("EmojiName-0", "IRFL-3", v.THINGS, makers.name("What is this emoji called?"),
              _labels, "name an emoji"),
        _task("EmojiBongard-0", "Bongard-HOI-0", v.CONCEPTS, makers.bongard(_BONGARD),
              ("positive", "negative"), "does an emoji belong to the first three", plain=True),
    ]  # fmt: skip


def _readings(s: _Subjects) -> list[LiteTask]:
    """Dishes, numbers, quality, cues: the last four clients."""
    v = subjects
    quality: dict[str, Any] = {"pretrain_images": 16}
    number: dict[str, Any] = {"kind": "open-ended", "metric": "F1"}
    dish = "What is this dish called?"
    return [
        _task("Dish-0", "WCVQA-0", v.DISHES, makers.name(dish), _labels, "name a dish"),
        _task("Digits-0", "iconqa-2", v.DIGITS, makers.total("What is the sum of the two digits?"),
              makers.sums, "sum of two digits (open)", **number),
        _task("Quality-0", "Co-Instruct-DB-2", s.photos,
              changes.defect_of_last("What is wrong with the second image?"), changes.DEFECTS,
              "name the defect of the second image", **quality),
        _task("Style-0", "SEED-Bench-2-1", v.STYLED_CONCEPTS, makers.matched("noto ", "twemoji "),
              YES_NO, "same thing drawn by two designers", plain=True),
        _task(f"{s.cue}Shape-0", "TQA-0", s.shapes,
              makers.name("Which object has this shape?",
                          choices=() if s.shapes is v.CUE_SHAPES
                          else ("circle", "rectangle", "triangle")), _labels, "name a shape"),
        _task(f"{s.colour}Absent-0", "WCVQA-3", s.colours,
              makers.absent("Which colour do none of the images mostly have?"), _labels,
              "find the colour that no image has"),
        _task(f"{s.hand}Largest-0", "iconqa-1", s.hands,
              makers.largest("Which is the largest number?"), lambda labels: labels[1:],
              "name the larger of two numbers"),
        _task("Quality-1", "Co-Instruct-DB-1", s.photos,
              changes.defect_level("Which grade has the quality of the image?"), changes.GRADES,
              "grade the quality of an image", **quality),
        _task("Quality-2", "Co-Instruct-DB-0", s.photos,
              changes.defect_name("What is wrong with the image?"), changes.DEFECTS,
              "name a defect", **quality),
        _task(f"{s.cue}Texture-0", "dvqa-0", s.textures,
              makers.name("Which thing has this texture?"), _labels, "name a texture or colour"),
        _task("Dish-1", "WCVQA-1", v.DISHES, makers.name(dish, settings=_SETTINGS), _labels,
              "name a dish after a story"),
        _task("Digits-1", "iconqa-3", v.DIGITS,
              makers.next_number("The numbers count up by {}. Which comes next?"), _labels,
              "continue two digits (open)", **number),
        _task(f"{s.hand}Number-0", "iconqa-0", s.hands, makers.name("Which number is shown?"),
              _labels, "name a number"),
        _task("Quality-3", "Co-Instruct-DB-3", s.photos,
              changes.defect_absent("Which defect has none of the images?"), changes.DEFECTS,
              "find the defect that three images do not have", **quality),
        _task("Style-1", "SEED-Bench-2-0", v.STYLED_KINDS,
              changes.designer("Which set is the icon from?"), changes.DESIGNERS,
              "name the designer of an emoji"),
        _task("Dish-2", "WCVQA-2", v.DISHES, makers.name("What is it really?", rumour=_RUMOUR),
              _labels, "name a dish against a rumour"),
    ]  # fmt: skip


_NEW_DOMAIN: dict[str, Any] = {"unseen": "new visual domain"}
_NEW_KIND: dict[str, Any] = {"unseen": "new task type"}


def _new_domains() -> list[LiteTask]:
    """Kinds of images that no client has."""
    v, new = subjects, _NEW_DOMAIN
    name = makers.name("What does the image show?")
    return [
        _task("Clipart-0", "DreamSim", v.DRAWINGS, name, _labels,
              "name a piece of clip art", **new),
        _task("Silhouette-0", "Mantis caption 0", v.SILHOUETTES, name, _labels,
              "name a silhouette", **new),
        _task("Edges-0", "imagecode", v.EDGES, name, _labels, "name an edge drawing", **new),
        _task("Shape-0", "imagecode", v.SHAPE_COLOURS,
              makers.name("Which colour does the image show?"), _labels,
              "name the colour of a rendered shape", **new),
    ]  # fmt: skip


def _new_package_domains() -> list[LiteTask]:
    """The same from packages only."""
    v, new = subjects, _NEW_DOMAIN
    colours = ("red", "blue", "green", "yellow")
    return [
        _task("Flag-0", "DreamSim", v.FLAGS,
              makers.absent("Which colour do none of the images mostly have?"), _labels,
              "find the colour that no flag has", **new),
        _task("Flag-1", "Mantis caption 0", v.FLAGS,
              makers.name("Which colour does the flag show most?", choices=colours), _labels,
              "name the colour of a flag", **new),
        _task("Flag-2", "imagecode", v.FLAGS, makers.same("Both are mostly of one colour."), TRUTH,
              "same colour of two flags", **new),
        _task("Written-0", "imagecode", v.DIGITS, makers.largest("Which is the largest number?"),
              lambda labels: labels[1:], "name the larger of two written digits", **new),
    ]  # fmt: skip


def _unseen(variant: Variant, s: _Subjects) -> list[LiteTask]:
    v = subjects
    kind = _NEW_KIND
    domains = _new_domains() if variant == "full" else _new_package_domains()
    return [
        *domains,
        _task("Coherence-0", "RecipeQA coherence", s.hands,
              makers.sequence_break("Two of the numbers follow each other. Which is the third?"),
              _labels, "find the break of a sequence", **kind),
        _task("Cloze-0", "RecipeQA cloze", v.DIGITS,
              makers.missing_number("Which number is missing between the two?"), _labels,
              "find the missing number", **kind),
        _task("EditName-0", "HQ_Edit", s.photos,
              changes.edit_name("How can the second image be made like the first?",
                                changes.UNDONE), tuple(changes.UNDONE),
              "find what undoes an edit", **kind),
    ]  # fmt: skip


def tasks_of(variant: Variant) -> tuple[LiteTask, ...]:
    """All tasks of a variant: the clients' forty in DRAKE's order, then the unseen seven."""
    s = _SUBJECTS[variant]
    return (*_things(s), *_icons(s), *_readings(s), *_unseen(variant, s))


TASKS_PER_CLIENT = 4


def clients_of(variant: Variant) -> tuple[tuple[LiteTask, ...], ...]:
    """The tasks of the ten clients in time order, as DRAKE assigns those that they mirror."""
    seen = [task for task in tasks_of(variant) if task.unseen is None]
    starts = range(0, len(seen), TASKS_PER_CLIENT)
    return tuple(tuple(seen[start : start + TASKS_PER_CLIENT]) for start in starts)
