"""Checks every sample of a folder in the published layout, and says all that is wrong.

A loader stops at the first wrong file and decodes nothing; this looks at everything: images exist
and decode, marks match the images, multi-choice prompts have choices, the gold answer is among
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import AnswerKind
from fedml_plugin_fedmosaic.data.metrics import parse_choices
from fedml_plugin_fedmosaic.data.prompt import IMAGE_MARK
from fedml_plugin_fedmosaic.data.scenario import DUMMY, ScenarioClient

SPLITS = ("train", "test")
_FILE = re.compile(r"dataset-(\d+)\.json")

Progress = Callable[[int, int], object]
"""Told samples done and samples in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: sample file.
        index: 0-based position of the sample in it; None if the file itself is wrong.
        sample_id: of the sample, if it has one.
        message: what was expected and what is there.
    """

    path: Path
    index: int | None
    sample_id: str
    message: str

    def __str__(self) -> str:
        where = str(self.path)
        if self.index is not None:
            where += f", sample {self.index}"
        if self.sample_id:
            where += f" (id {self.sample_id!r})"
        return f"{where}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was looked at, and what is wrong with it."""

    num_files: int
    num_samples: int
    num_images: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    split: str
    kind: AnswerKind | None


def verify(
    root: Path,
    clients: Sequence[ScenarioClient] = (),
    progress: Progress = lambda _done, _total: None,
) -> Verified:
    """Checks all samples of a scenario's tasks, or of all files below ``root/dataset``.

    Args:
        root: folder that holds ``dataset``; image paths are relative to it.
        clients: of the scenario; its tasks' kinds decide whether choices are required. Without
            clients, a prompt without choices is taken as open-ended.
        progress: called after every sample.

    Raises:
        DataError: there is nothing to check.
    """
    files = list(_scenario_files(root, clients) if clients else _all_files(root))
    if not files:
        raise DataError(
            f"{root}: expected files dataset/<name>/{{train,test}}/dataset-<subset>.json, got none",
            hint="name the folder above dataset/",
        )
    checker = _Checker(root)
    contents = [(file, checker.rows(file)) for file in files]
    total = sum(len(rows) for _, rows in contents)
    done = 0
    for file, rows in contents:
        for index, row in enumerate(rows):
            checker.sample(file, index, row)
            done += 1
            progress(done, total)
    return Verified(
        num_files=len(files),
        num_samples=total,
        num_images=len(checker.images),
        problems=tuple(checker.problems),
    )


def _scenario_files(root: Path, clients: Sequence[ScenarioClient]) -> Iterator[_File]:
    seen = set()
    for task in (task for client in clients for task in client.tasks):
        if task.dataset == DUMMY or task.name in seen:
            continue
        seen.add(task.name)
        for split in SPLITS:
            path = root / "dataset" / task.dataset / split / f"dataset-{task.subset_id}.json"
            yield _File(path, split, task.kind)


def _all_files(root: Path) -> Iterator[_File]:
    for path in sorted(root.glob("dataset/*/*/dataset-*.json")):
        if path.parent.name in SPLITS and _FILE.fullmatch(path.name):
            yield _File(path, path.parent.name, None)


@dataclass(slots=True)
class _Checker:
    root: Path
    problems: list[Problem] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    """What is wrong with an image, by its path as written; empty if nothing."""

    def rows(self, file: _File) -> list[Any]:
        """The file's samples; none if it cannot be read."""
        try:
            rows = json.loads(file.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._no_rows(file, "expected a file, got nothing there")
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            return self._no_rows(file, f"expected readable JSON, got: {error}")
        if not isinstance(rows, list) or not rows:
            return self._no_rows(file, "expected a list of at least one sample")
        return rows

    def _no_rows(self, file: _File, message: str) -> list[Any]:
        self.problems.append(Problem(path=file.path, index=None, sample_id="", message=message))
        return []

    def sample(self, file: _File, index: int, row: object) -> None:
        """Notes everything that is wrong with one sample."""
        sample_id = str(row.get("id", "")) if isinstance(row, dict) else ""
        self.problems += [
            Problem(path=file.path, index=index, sample_id=sample_id, message=message)
            for message in self._wrong(file, row)
        ]

    def _wrong(self, file: _File, row: object) -> Iterator[str]:
        if not isinstance(row, dict):
            yield f"expected an object, got {type(row).__name__}"
            return
        turns = _turns(row)
        if turns is None:
            yield "expected 'conversations' with a question and an answer, each with a 'value'"
            return
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            yield "expected 'image' to be a path or a list of paths"
            return
        read = turns[:2] if file.split == "test" else turns
        marks = sum(turn.count(IMAGE_MARK) for turn in read)
        if marks != len(names):
            yield f"expected as many {IMAGE_MARK} marks as images, got {marks} and {len(names)}"
        for name in dict.fromkeys(names):
            problem = self._image(name)
            if problem:
                yield problem
        yield from _choice_problems(turns[0], turns[1], file.kind)

    def _image(self, name: str) -> str:
        if name not in self.images:
            self.images[name] = _image_problem(self.root / name, name)
        return self.images[name]


def _turns(row: Mapping[str, Any]) -> list[str] | None:
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    found = [text for text in texts if isinstance(text, str)]
    return found if len(found) == len(texts) and found[1].strip() else None


def _image_problem(path: Path, name: str) -> str:
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        return f"expected image {name!r}, got no such file"
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return f"expected image {name!r} to decode, got: {error}"
    return ""


def _choice_problems(prompt: str, gold: str, kind: AnswerKind | None) -> Iterator[str]:
    choices = parse_choices(prompt, gold) if kind != "open-ended" else ()
    if kind == "multi-choice" and not any(choice.strip() for choice in choices):
        yield "expected choices in the prompt of a multi-choice task, got none that can be read"
    elif choices and gold.strip().lower() not in {choice.strip().lower() for choice in choices}:
        shown = ", ".join(repr(choice) for choice in choices[:6])
        yield f"expected the answer {gold!r} among the choices, got {shown}"
