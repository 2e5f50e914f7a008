"""Writes DRAKE-lite as a folder in the published DRAKE layout.

Below the folder::

    dataset/<name>/{train,test}/dataset-<subset>.json   rows of clients and of the unseen tasks
    dataset/<name>/pretrain/dataset-<subset>.json       rows for the base models
    images/<pool>/<file>                                shared by all tasks
    scenarios/*.json, tasks.json, sources.json          who has what, what it is, where it is from

The content is a function of the pools only: the same pools give the same bytes. The folder is
written under a temporary name and renamed, so that a reader sees all of it or nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.lite.captions import caption_rows, word_rows
from fedml_plugin_fedmosaic.data.lite.pools import Picture
from fedml_plugin_fedmosaic.data.lite.rows import Row
from fedml_plugin_fedmosaic.data.lite.scenarios import scenarios_of
from fedml_plugin_fedmosaic.data.lite.tasks import LiteTask, Variant, tasks_of
from fedml_plugin_fedmosaic.data.lite.views import Library
from fedml_plugin_fedmosaic.data.quickstart.images import Audience

VERSION = "2"
"""Version of the content; raise it with any change of tasks, rows or images."""

PRETRAIN: Literal["pretrain"] = "pretrain"

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows of every task, by split."""

    pretrain: int = 2400
    train: int = 240
    test: int = 120


@dataclass(slots=True)
class _Writer:
    """Writes rows and, once each, their images."""

    root: Path
    library: Library
    written: set[Picture] = field(default_factory=set)

    def split(self, dataset: str, subset: int, split: str, rows: Iterable[Row]) -> list[Row]:
        """Writes one split of a task in the published sample format; returns its rows."""
        kept = list(rows)
        records = [
            {
                "id": f"{dataset}-{subset}-{split}-{index}",
                "image": [f"images/{picture.filename}" for picture in row.pictures],
                "conversations": [
                    {"from": "human", "value": row.prompt},
                    {"from": "gpt", "value": row.answer},
                ],
            }
            for index, row in enumerate(kept)
        ]
        target = self.root / "dataset" / dataset / split / f"dataset-{subset}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(records, indent=0), encoding="utf-8")
        for row in kept:
            for picture in row.pictures:
                self._image(picture)
        return kept

    def _image(self, picture: Picture) -> None:
        if picture in self.written:
            return
        self.written.add(picture)
        target = self.root / "images" / picture.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.library.content(picture))


def build_folder(
    folder: Path,
    library: Library,
    variant: Variant,
    *,
    sources: Sequence[Mapping[str, Any]] = (),
    sizes: Sizes | None = None,
    say: Say = lambda _: None,
) -> None:
    """Builds a variant; a folder that is there is replaced.

    Args:
        folder: where to.
        library: the opened pools of the variant.
        variant: which tasks.
        sources: where the pools are from, for ``sources.json``.
        sizes: rows per task.
        say: is told about every task.

    Raises:
        DataError: the folder cannot be written, or a pool is too small.
    """
    sizes = sizes or Sizes()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            _write(temporary, library, variant, sizes, sources, say)
            temporary.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror}",
            hint="name another folder with --out, or free some space",
        ) from error


def _write(
    root: Path,
    library: Library,
    variant: Variant,
    sizes: Sizes,
    sources: Sequence[Mapping[str, Any]],
    say: Say,
) -> None:
    writer = _Writer(root, library)
    tasks = tasks_of(variant)
    shares = owners(tasks)
    listing = []
    for number, task in enumerate(tasks):
        say(f"{task.name} ({number + 1} of {len(tasks)})")
        rows = {
            "train": writer.split(
                task.dataset, task.subset_id, "train",
                task.rows(library, "train", sizes.train, shares[task.name]),
            ),
            "test": writer.split(
                task.dataset, task.subset_id, "test", task.rows(library, "test", sizes.test)
            ),
        }  # fmt: skip
        if task.unseen is None:
            writer.split(
                task.dataset, task.subset_id, PRETRAIN,
                task.rows(library, PRETRAIN, sizes.pretrain),
            )  # fmt: skip
        listing.append(_listed(task, rows))
    say("captions")
    extra = {"Captions": caption_rows(tasks, library, sizes.pretrain // 2)}
    extra["Words"] = word_rows(tasks, library)
    for name, made in extra.items():
        writer.split(name, 0, PRETRAIN, made)
    (root / "scenarios").mkdir()
    for name, scenario in scenarios_of(variant).items():
        _dump(root / "scenarios" / f"{name}.json", scenario)
    _dump(root / "tasks.json", listing)
    _dump(root / "sources.json", list(sources))
    _dump(root / "build.json", {"name": "drake-lite", "variant": variant, "version": VERSION})


def owners(tasks: Sequence[LiteTask]) -> dict[str, tuple[int, int]]:
    """Which part of its view's training images each task gets: ``(k, n)`` by task name.

    The tasks of clients that share a view divide its images; unseen ones have a view's all, which
    no client sees if the view is new, and which belong to clients otherwise.
    """
    sharers: dict[str, list[str]] = {}
    for task in tasks:
        if task.unseen is None:
            sharers.setdefault(task.view.name, []).append(task.name)
    result = {}
    for task in tasks:
        names = sharers.get(task.view.name, []) if task.unseen is None else []
        result[task.name] = (names.index(task.name), len(names)) if names else (0, 1)
    return result


def _listed(task: LiteTask, rows: Mapping[Audience | str, Sequence[Row]]) -> dict[str, Any]:
    return {
        "dataset": task.dataset,
        "subset_id": task.subset_id,
        "type": task.kind,
        **({"metric": task.metric} if task.metric else {}),
        "Desc": task.description,
        "mirrors": task.mirrors,
        "unseen": task.unseen,
        "images": max(len(row.pictures) for row in rows["test"]),
        "rows": {split: len(made) for split, made in rows.items()},
        "majority": round(majority(rows["test"]), 4),
    }


def majority(rows: Sequence[Row]) -> float:
    """Share of the most frequent answer."""
    return max(Counter(row.answer for row in rows).values()) / len(rows)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
