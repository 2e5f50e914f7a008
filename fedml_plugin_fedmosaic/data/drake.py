"""Loader of the published DRAKE layout: scenario JSON plus ``dataset/<name>/<split>`` files.

Layout below ``root``::

    dataset/<name>/{train,test}/dataset-<subset_id>.json
    scenarios/<name>.json                                  (or any path)

A sample is ``{"conversations": [{"value": text}, ...], "image": path | [path, ...]}``: even turns
are the user's, odd ones the assistant's; further keys with a text or a number become the sample's
attributes. Nothing is decoded here: reading tens of thousands of rows takes seconds, and an image
that does not decode is reported when it is first used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.data.prompt import IMAGE_MARK
from fedml_plugin_fedmosaic.data.scenario import (
    DUMMY,
    ScenarioClient,
    find_scenario,
    read_scenario,
)

_MAX_REPORTED = 5
_OWN_FIELDS = {"id", "conversations", "image"}

Split = Literal["train", "test"]


def load_drake(config: DataConfig) -> FederatedData:
    """Reads a scenario and the samples of all its clients.

    Every file is read once, also when several clients share a task. Upper bounds on the number of
    samples keep a random subset drawn from the task's name only, in the order of the file, so that
    the choice depends neither on the run's seed nor on other tasks.

    Args:
        config: ``root`` and ``scenario`` are required here. A scenario is a path (absolute, below
            the working directory or below ``root``) or a name in ``<root>/scenarios``.

    Returns:
        All clients. A data set called ``dummy`` gives a task without training samples that is
        absent from ``tasks`` and ``test``.

    Raises:
        DataError: a folder, file or sample is missing or wrong; up to five problems of one file
            are reported together.
    """
    root = _root_folder(config.root)
    scenario_path = find_scenario(config.scenario, root)
    clients = read_scenario(scenario_path)
    reader = _Reader(root)
    tasks: dict[str, TaskSpec] = {}
    train: dict[str, tuple[Sample, ...]] = {}
    test: dict[str, tuple[Sample, ...]] = {}
    for task in (task for client in clients for task in client.tasks):
        if task.dataset == DUMMY or task.name in tasks:
            continue
        tasks[task.name] = task
        train[task.name] = _subset(
            reader.read(task, "train"), config.max_train_samples, task, "train"
        )
        test[task.name] = _subset(reader.read(task, "test"), config.max_test_samples, task, "test")
    return FederatedData(
        name=scenario_path.stem,
        clients=tuple(_client(client, train) for client in clients),
        test=test,
        tasks=tasks,
    )


def open_scenario(config: DataConfig) -> tuple[Path, tuple[ScenarioClient, ...]]:
    """The data root and the scenario's clients, without reading samples.

    Raises:
        DataError: the root or the scenario is missing or wrong.
    """
    root = _root_folder(config.root)
    return root, read_scenario(find_scenario(config.scenario, root))


def sample_file(root: Path, task: TaskSpec, split: Split) -> Path:
    """Where the samples of one task and split are."""
    return root / "dataset" / task.dataset / split / f"dataset-{task.subset_id}.json"


def read_file(path: Path, root: Path, task: str) -> tuple[Sample, ...]:
    """The samples of one file outside any scenario, with all their turns.

    Args:
        path: JSON list of samples.
        root: folder that image paths are relative to.
        task: name that the samples get.

    Raises:
        DataError: the file or a sample is missing or wrong.
    """
    return _Reader(root).read_file(path, task, "train")


def _client(client: ScenarioClient, train: Mapping[str, tuple[Sample, ...]]) -> ClientData:
    return ClientData(
        client_id=client.client_id,
        model_id=client.model_id,
        tasks=client.tasks,
        train=tuple(train.get(task.name, ()) for task in client.tasks),
    )


def _root_folder(root: str | None) -> Path:
    if root is None:
        raise DataError(
            "the drake data set needs data_args: {data: {root: FOLDER}}, but no root is set",
            hint="set root to the folder that holds dataset/<name>/{train,test}/",
        )
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DataError(
            f"data root {str(path)!r}: expected a folder, got "
            + ("a file" if path.exists() else "nothing"),
            hint="set data_args: {data: {root: FOLDER}} to the folder that holds dataset/",
        )
    if not (path / "dataset").is_dir():
        raise DataError(
            f"data root {str(path)!r}: expected a folder 'dataset' inside, got none",
            hint="root is the folder above dataset/, not dataset/ itself",
        )
    return path


def _subset(
    samples: tuple[Sample, ...], limit: int | None, task: TaskSpec, split: Split
) -> tuple[Sample, ...]:
    if limit is None or len(samples) <= limit:
        return samples
    drawn = python_random(0, "subset", task.name, split).sample(range(len(samples)), limit)
    return tuple(samples[index] for index in sorted(drawn))


@dataclass(frozen=True, slots=True)
class _Problem:
    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}"


@dataclass(slots=True)
class _Reader:
    """Reads sample files; remembers which image files exist."""

    root: Path
    known_images: dict[str, Path | None] = field(default_factory=dict)

    def read(self, task: TaskSpec, split: Split) -> tuple[Sample, ...]:
        """All samples of one task and split, checked."""
        return self.read_file(sample_file(self.root, task, split), task.name, split)

    def read_file(self, path: Path, task: str, split: Split) -> tuple[Sample, ...]:
        """All samples of one file, checked."""
        rows = _read_rows(path, task)
        samples: list[Sample] = []
        problems: list[_Problem] = []
        used_ids: set[str] = set()
        for index, row in enumerate(rows):
            sample = self._sample(row, index, task, split, used_ids)
            if isinstance(sample, _Problem):
                problems.append(sample)
            else:
                samples.append(sample)
        if problems:
            _report(path, problems)
        return tuple(samples)

    def _sample(
        self, row: object, index: int, task: str, split: Split, used_ids: set[str]
    ) -> Sample | _Problem:
        where = f"sample {index}"
        if not isinstance(row, dict):
            return _Problem(where, "an object", _kind(row))
        if "id" in row:
            where += f" (id {row['id']!r})"
        turns = _turns(row.get("conversations"), split, where)
        if isinstance(turns, _Problem):
            return turns
        images = row.get("image", [])
        names = [images] if isinstance(images, str) else images
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return _Problem(where, "'image' to be a path or a list of paths", _kind(images))
        marks = sum(turn.count(IMAGE_MARK) for turn in turns)
        if marks != len(names):
            return _Problem(
                where,
                f"as many {IMAGE_MARK} marks as images",
                f"{marks} marks, {len(names)} images",
            )
        paths = [self._image(name) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        if missing:
            return _Problem(where, f"image file {missing[0]!r} below the data root", "no such file")
        return Sample(
            sample_id=_unique_id(row.get("id"), index, used_ids),
            task=task,
            turns=turns,
            images=tuple(path for path in paths if path is not None),
            attributes=_attributes(row),
        )

    def _image(self, name: str) -> Path | None:
        if name not in self.known_images:
            path = self.root / name
            # os.path is several times cheaper than Path.is_file for tens of thousands of rows.
            exists = os.path.isfile(path)  # noqa: PTH113
            self.known_images[name] = path if exists else None
        return self.known_images[name]


def _unique_id(value: object, index: int, used: set[str]) -> str:
    """The row's own id, or its position when the id is missing or taken."""
    text = str(value) if isinstance(value, str | int) else ""
    if not text or text in used:
        text = f"row-{index}"
    used.add(text)
    return text


def _attributes(row: Mapping[str, Any]) -> tuple[tuple[str, str | int | float], ...]:
    """The row's further fields with a text or a number."""
    return tuple(
        (str(name), value)
        for name, value in row.items()
        if name not in _OWN_FIELDS and isinstance(value, str | int | float)
    )


def _turns(value: object, split: Split, where: str) -> tuple[str, ...] | _Problem:
    if not isinstance(value, list):
        return _Problem(where, "'conversations' to be a list", _kind(value))
    turns: Sequence[Any] = value[:2] if split == "test" else value
    if len(turns) < 2 or len(turns) % 2:
        expected = "a conversation of user and assistant turns in pairs"
        return _Problem(where, expected, f"{len(turns)} turns")
    texts: list[str] = []
    for position, turn in enumerate(turns):
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            return _Problem(where, f"a text under 'value' in turn {position}", _kind(turn))
        if position % 2 and not text.strip():
            return _Problem(where, f"an answer in turn {position}", "an empty text")
        texts.append(text)
    return tuple(texts)


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _read_rows(path: Path, task: str) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"task {task!r}: expected file {str(path)!r}, got nothing there",
            hint="check the data root and the scenario's dataset and subset_id",
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: expected valid JSON, got: {error.msg}",
            hint="the file may be cut off; fetch it again",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} "
            f"at position {error.start}",
            hint="convert the file to UTF-8",
        ) from error
    if not isinstance(rows, list) or not rows:
        raise DataError(
            f"{path}: expected a list of at least one sample, got {_kind(rows)}",
            hint="a sample file is a JSON list of objects with 'conversations'",
        )
    return rows


def _report(path: Path, problems: Sequence[_Problem]) -> NoReturn:
    lines = [f"{path}: {len(problems)} wrong samples"]
    lines += [f"  {problem}" for problem in problems[:_MAX_REPORTED]]
    if len(problems) > _MAX_REPORTED:
        lines.append(f"  ... and {len(problems) - _MAX_REPORTED} more")
    raise DataError("\n".join(lines), hint="correct or remove these samples, then run again")
