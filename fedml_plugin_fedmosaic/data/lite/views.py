"""Views: which images of which pools carry which label, and who may see them.

Every image belongs to one audience for good: ``pretrain`` (base models; no client sees it),
``train`` (clients) or ``test``. Emoji are split by what they show. The concepts of the group
``names`` exist in two styles, of which clients train on the first (Noto) and are tested on the
second (Twemoji), so that tasks about single concepts have no image in both splits either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.lite.pools import Facts, Picture, Pool
from fedml_plugin_fedmosaic.data.quickstart.images import AUDIENCES, Audience

SHARES: tuple[float, float, float] = (0.30, 0.45, 0.25)
"""Shares of pretraining, training and test images of every label."""

MIN_SHARE = 8
"""Images per label that every part of divided training images has at least."""

STYLES = ("noto", "twemoji")
"""Pools that show the same concepts in two styles."""

CONCEPT_SHARES: Mapping[str, float] = {"pretrain": 0.25, "names": 0.35, "train": 0.2, "test": 0.2}
"""Shares of the groups of emoji concepts."""

Labels = Callable[[Facts], str | None]
"""The label of an image by its facts; None leaves it out."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Labelled images.

    Attributes:
        name: unique among the views.
        pools: where they are from.
        label: see :data:`Labels`.
        concepts: for emoji, which of them clients see: ``names`` have one picture per style, the
            first for training and the second for testing; ``pairs`` have both in one split.
        own_images: whether tasks over this view divide its training images among them.
        hidden: share of the labels that pretraining does not show in tasks whose words it uses.
        max_labels: bound of the labels that clients see.
        min_images: labels with fewer images in a split are left out.
    """

    name: str
    pools: tuple[str, ...]
    label: Labels
    concepts: Literal["all", "names", "pairs"] = "all"
    own_images: bool = True
    hidden: float = 0.0
    max_labels: int | None = None
    min_images: int = 1


@dataclass(slots=True)
class Library:
    """All opened pools, and the audience of each of their images.

    Args:
        pools: by name.
    """

    pools: Mapping[str, Pool]
    _audiences: dict[str, dict[str, str]] = field(default_factory=dict)

    def audience_of(self, pool: str, name: str) -> str:
        """``pretrain``, ``train`` or ``test``; for emoji the concept's group."""
        if pool not in self._audiences:
            self._audiences[pool] = self._split(pool)
        return self._audiences[pool][name]

    def content(self, picture: Picture) -> bytes:
        """The bytes of a picture's file."""
        return self.pools[picture.pool].content(picture)

    def _split(self, pool: str) -> dict[str, str]:
        shares: dict[str, float] = dict(zip(AUDIENCES, SHARES, strict=True))
        key = pool
        if pool in STYLES:
            # Both styles: a concept's group must not depend on the style.
            shares, key = dict(CONCEPT_SHARES), "concepts"
        strata: dict[str, list[str]] = {}
        for name, facts in self.pools[pool].facts.items():
            stratum = facts.get("stratum") or facts.get("label") or ""
            strata.setdefault(stratum, []).append(name)
        result: dict[str, str] = {}
        for stratum, names in sorted(strata.items()):
            names.sort()
            python_random(0, "lite split", key, stratum).shuffle(names)
            cuts = [round(part * len(names)) for part in accumulate(shares.values(), initial=0.0)]
            for audience, start, stop in zip(shares, cuts[:-1], cuts[1:], strict=True):
                result.update(dict.fromkeys(names[start:stop], audience))
        return result

    def pictures(
        self,
        view: View,
        audience: Audience,
        share: tuple[int, int] = (0, 1),
        *,
        hide: bool = False,
    ) -> dict[str, tuple[Picture, ...]]:
        """One audience's images of a view by label, labels sorted.

        Args:
            view: which images.
            audience: who is going to see them.
            share: ``(k, n)``: the k-th of n disjoint parts of the training images, where the view
                divides them.
            hide: leaves out the labels that pretraining does not show.

        Raises:
            DataError: fewer than two labels are left.
        """
        groups: dict[str, list[Picture]] = {}
        for pool in view.pools:
            for name, facts in self.pools[pool].facts.items():
                # Of images that are the same file under several names, one is used.
                label = None if "twin" in facts else view.label(facts)
                if label is not None and self._visible(view, pool, name, audience):
                    groups.setdefault(label, []).append(Picture(pool, name))
        part, parts = share if audience == "train" and view.own_images else (0, 1)
        # Tasks see the same images rather than next to none.
        parts = max(1, min(parts, min(map(len, groups.values()), default=0) // MIN_SHARE))
        part %= parts
        if view.max_labels is not None and audience != "pretrain":
            kept = python_random(0, "lite labels", view.name).sample(
                sorted(groups), view.max_labels
            )
            groups = {label: groups[label] for label in kept}
        chosen = {}
        for label, pictures in sorted(groups.items()):
            pictures.sort()
            python_random(0, "lite shares", view.name, label).shuffle(pictures)
            chosen[label] = tuple(sorted(pictures[part::parts]))
        hidden = self.hidden_labels(view, chosen) if hide else frozenset()
        result = {
            label: pictures
            for label, pictures in chosen.items()
            if len(pictures) >= view.min_images and label not in hidden
        }
        if len(result) < 2:
            raise DataError(
                f"view {view.name}: expected at least two labels with {view.min_images} images for "
                f"{audience}, got {len(result)}",
                hint="a pool is smaller than it should be; fetch its source again",
            )
        return result

    @staticmethod
    def hidden_labels(view: View, labels: Iterable[str]) -> frozenset[str]:
        """The labels that pretraining does not show."""
        names = sorted(labels)
        count = round(view.hidden * len(names))
        return frozenset(python_random(0, "lite hidden", view.name).sample(names, count))

    def _visible(self, view: View, pool: str, name: str, audience: Audience) -> bool:
        place = self.audience_of(pool, name)
        if pool not in STYLES:
            return place == audience
        if audience == "pretrain":
            return place == "pretrain"
        if place != "names":
            return place == audience and view.concepts != "names"
        # One picture per style: the first style is for training, the second one for testing.
        return view.concepts != "pairs" and (pool == STYLES[0]) == (audience == "train")
