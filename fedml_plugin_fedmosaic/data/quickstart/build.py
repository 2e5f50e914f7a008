"""Writes the quickstart as a folder in the published DRAKE layout.

The folder is a pure function of the package: its name says so, it is written under a temporary
name and renamed, and a second process that comes too late discards its own copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.quickstart.images import ImageRef, read_png
from fedml_plugin_fedmosaic.data.quickstart.tasks import TASKS, UNSEEN, Question, QuickTask

LOG = logging.getLogger(__name__)

VERSION = "2"
"""Version of the content; raise it with any change of tasks, rows or images."""

TRAIN_ROWS = 60
"""Training rows of one client in one task."""

TEST_ROWS = 150
"""Test rows of one task."""

SCENARIO = "quickstart"
_SEED = 0


def scenario_json() -> list[dict[str, Any]]:
    """The bundled scenario, in the published format."""
    assets = resources.files("fedml_plugin_fedmosaic") / "assets" / "scenarios"
    text = (assets / f"{SCENARIO}.json").read_text(encoding="utf-8")
    scenario: list[dict[str, Any]] = json.loads(text)
    return scenario


def _folder_name() -> str:
    """Names the content: another version, scenario or size is another folder."""
    content = json.dumps([VERSION, TRAIN_ROWS, TEST_ROWS, scenario_json()])
    digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
    return f"quickstart-v{VERSION}-{digest}"


def holders(scenario: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Task name -> clients that have it, ascending."""
    result: dict[str, list[int]] = {}
    for client in scenario:
        for entry in client["datasets"]:
            name = f"{entry['dataset']}-{entry['subset_id']}"
            result.setdefault(name, []).append(int(client["client_id"]))
    return {name: sorted(ids) for name, ids in result.items()}


def _image_path(dataset: str, ref: ImageRef) -> str:
    return f"dataset/{dataset}/images/{ref.filename}"


def to_sample(root: Path, dataset: str, task: str, row_id: str, row: Question) -> Sample:
    """The row as the loader would read it from a folder with its images.

    Args:
        root: folder above ``dataset``.
        dataset: data set whose folder holds the images.
        task: name of the task.
        row_id: unique inside the task.
        row: the row.
    """
    return Sample(
        sample_id=f"{task}-{row_id}",
        task=task,
        turns=(row.prompt, row.answer),
        images=tuple(root / _image_path(dataset, ref) for ref in row.images),
    )


def write_images(root: Path, dataset: str, rows: Iterable[Question]) -> None:
    """Writes the images of some rows below ``root``."""
    (root / "dataset" / dataset / "images").mkdir(parents=True, exist_ok=True)
    for row in rows:
        for ref in row.images:
            target = root / _image_path(dataset, ref)
            if not target.exists():
                target.write_bytes(read_png(ref))


def _write_split(
    root: Path, task: QuickTask, split: Literal["train", "test"], rows: Sequence[Question]
) -> None:
    """Writes one split of a task in the published sample format, with its images."""
    write_images(root, task.dataset, rows)
    records = [
        {
            "id": f"{task.name}-{split}-{index}",
            # Relative to the folder, as in the published files.
            "image": [_image_path(task.dataset, ref) for ref in row.images],
            "conversations": [
                {"from": "human", "value": row.prompt},
                {"from": "gpt", "value": row.answer},
            ],
        }
        for index, row in enumerate(rows)
    ]
    target = root / "dataset" / task.dataset / split / f"dataset-{task.subset_id}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(records, indent=1), encoding="utf-8")


def evaluation_samples(root: Path, task: QuickTask) -> tuple[Sample, ...]:
    """The test set of a task, seen or unseen, in a folder of :func:`ensure_built`."""
    rows = task.questions("test", TEST_ROWS, _SEED)
    return tuple(
        to_sample(root, task.dataset, task.name, f"test-{index}", row)
        for index, row in enumerate(rows)
    )


def _write_all(root: Path) -> None:
    clients = holders(scenario_json())
    for task in (*TASKS, *UNSEEN):
        # Every client of a task gets rows of its own; an unseen task has rows for one newcomer.
        count = TRAIN_ROWS * len(clients.get(task.name, [0]))
        _write_split(root, task, "train", list(task.questions("train", count, _SEED)))
        _write_split(root, task, "test", list(task.questions("test", TEST_ROWS, _SEED)))
    target = root / "scenarios" / f"{SCENARIO}.json"
    target.parent.mkdir()
    target.write_text(json.dumps(scenario_json(), indent=1), encoding="utf-8")
    listing = [
        {
            "dataset": task.dataset,
            "subset_id": task.subset_id,
            "type": "multi-choice",
            "Desc": task.description,
            "unseen": task in UNSEEN,
        }
        for task in (*TASKS, *UNSEEN)
    ]
    (root / "tasks.json").write_text(json.dumps(listing, indent=1), encoding="utf-8")


def ensure_built(cache: Path | None = None) -> Path:
    """The quickstart's folder, built on first use (a few seconds).

    Args:
        cache: folder to build in; the user cache when omitted.

    Raises:
        DataError: the folder cannot be written.
    """
    parent = cache or cache_dir()
    folder = parent / _folder_name()
    if folder.is_dir():
        return folder
    LOG.info("building the quickstart data in %s (once, a few seconds)", folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".quickstart-"))
    except OSError as error:
        raise DataError(
            f"the quickstart data cannot be written to {parent}: {error.strerror}",
            hint="set the environment variable FEDMOSAIC_CACHE to a writable folder",
        ) from error
    try:
        _write_all(temporary)
        temporary.rename(folder)
    except OSError as error:
        # Another process was faster: its folder has the same content.
        if not folder.is_dir():
            raise DataError(
                f"the quickstart data cannot be written to {parent}: {error.strerror}",
                hint="free some space or set FEDMOSAIC_CACHE to another folder",
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
