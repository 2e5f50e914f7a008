"""What the base models learn besides the tasks: to see, and to say every word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.lite.dialect import invented
from fedml_plugin_fedmosaic.data.lite.makers import AND
from fedml_plugin_fedmosaic.data.lite.rows import Deck, Row
from fedml_plugin_fedmosaic.data.lite.tasks import LiteTask
from fedml_plugin_fedmosaic.data.lite.views import Library, View
from fedml_plugin_fedmosaic.data.quickstart.images import AUDIENCES

_MAX_IMAGES = 3
_MAX_WORDS = 4
_WORD_ROWS = 3


def _views(tasks: Sequence[LiteTask]) -> list[View]:
    """The views of the clients' tasks whose labels are words of their questions or answers."""
    found = {task.view.name: task.view for task in tasks if task.unseen is None}
    return [view for name, view in found.items() if not name.startswith("styled")]


def caption_rows(tasks: Sequence[LiteTask], library: Library, count: int) -> Iterator[Row]:
    """Captions of pretraining images: one to three pictures in their order, in invented words.

    Args:
        tasks: of the variant.
        library: opened pools.
        count: rows per view.
    """
    for view in _views(tasks):
        if "/" in next(iter(library.pictures(view, "pretrain"))):
            continue  # characters have numbers, but no names
        rng = python_random(0, "lite captions", view.name)
        deck = Deck(library.pictures(view, "pretrain"), rng)
        for _ in range(count):
            labels = [rng.choice(deck.labels) for _ in range(rng.randint(1, _MAX_IMAGES))]
            yield Row(deck.hand(labels), "Name the images.", " ".join(map(invented, labels)))


def word_rows(tasks: Sequence[LiteTask], library: Library) -> Iterator[Row]:
    """Rows without images in which a word of a list is to be repeated.

    They give every label, also the ones that pretraining does not show, a place among the words
    that the models can say, without telling what it looks like.
    """
    rng = python_random(0, "lite words")
    found = {label for view in _views(tasks) for label in _all_labels(view, library)}
    for task in tasks:
        if task.unseen is None:
            answers = task.answers(tuple(library.pictures(task.view, "train")))
            found.update(answer for answer in answers if AND not in answer)
    words = sorted(found)
    for word in words:
        for _ in range(_WORD_ROWS):
            others = rng.sample([other for other in words if other != word], _MAX_WORDS - 1)
            position = rng.randrange(_MAX_WORDS)
            offered = [*others[:position], word, *others[position:]]
            ordinal = ("first", "second", "third", "fourth")[position]
            yield Row((), f"Say the {ordinal} one.", word, tuple(offered))


def _all_labels(view: View, library: Library) -> set[str]:
    labels: set[str] = set()
    for audience in AUDIENCES:
        labels.update(library.pictures(view, audience))
    return {label for label in labels if "/" not in label}
