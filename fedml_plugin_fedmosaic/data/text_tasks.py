"""Real text tasks in the published layout: public classification sets as multi-choice questions.

A task is a data set and a way to ask: the same set can give several related tasks (grades or just
the polarity of a review; the headline or the body of a news item). Rows are divided so that a text
that belongs to two tasks of one set is in one of them only. Beside ``train`` and ``test`` there is
``public``: training rows that no client owns, for the alignment of models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.data.drake import load_drake
from fedml_plugin_fedmosaic.data.sources import DrakeSource
from fedml_plugin_fedmosaic.data.text_files import (
    TEXT_SETS,
    TextRow,
    TextSet,
    read_rows,
)

VERSION = 1
"""Of the questions and the division of rows."""
_ORIGIN = "origin.json"
Change = Callable[[TextRow], TextRow | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """A way to ask about the rows of a data set.

    Attributes:
        source: name of the data set, which is also the task's.
        subset_id: number among the tasks of the data set.
        group: what the tasks of a group have in common.
        question: comes before the text.
        choices: the answers offered.
        change: row to row of this task, or None to leave it out.
        share: this task takes the rows whose number leaves one of these when divided by 4.
        cut: whether a long text is cut rather than left out; not where its end may decide.
    """

    source: str
    subset_id: int
    group: str
    question: str
    choices: tuple[str, ...]
    change: Change | None = None
    share: tuple[int, ...] = (0, 1, 2, 3)
    cut: bool = False

    @property
    def name(self) -> str:
        """``<source>-<subset_id>``."""
        return f"{self.source}-{self.subset_id}"


def _polarity(row: TextRow) -> TextRow | None:
    word = row.label.rpartition(" ")[2]
    return None if word == "neutral" else replace(row, label=word)


def _without_marks(row: TextRow) -> TextRow:
    return replace(row, text=row.text.removeprefix("Text:").strip())


def _review(row: TextRow) -> TextRow | None:
    polar = _polarity(row)
    return None if polar is None else replace(polar, text=_body(polar.text))


def _body(text: str) -> str:
    return text.partition("\nText:")[2].strip() or text.strip()


def _headline(row: TextRow) -> TextRow:
    return replace(row, text=row.text.partition("\nText:")[0].removeprefix("Title:").strip())


def _article(row: TextRow) -> TextRow:
    return replace(row, text=_body(row.text))


def _plain(name: str, group: str, question: str) -> TextTask:
    return TextTask(
        source=name, subset_id=0, group=group, question=question, choices=TEXT_SETS[name].labels
    )


_TOPIC = "What is this news about?"
TEXT_TASKS: Mapping[str, TextTask] = {
    task.name: task
    for task in (
        replace(
            _plain("sst2", "sentiment", "Is this opinion of a film good or bad?"),
            change=_without_marks, cut=True,
        ),
        replace(
            _plain("amazon", "sentiment", "How does the customer feel about the product?"),
            share=(0,), cut=True,
        ),
        TextTask(
            source="amazon", subset_id=1, group="sentiment",
            question="Is this opinion of a product negative or positive?",
            choices=("negative", "positive"), change=_review, share=(1, 2, 3), cut=True,
        ),
        replace(
            _plain("agnews", "topic", _TOPIC), change=_article, share=(0, 1), cut=True
        ),
        replace(
            _plain("agnews", "topic", _TOPIC), subset_id=1, change=_headline, share=(2, 3), cut=True
        ),
        _plain("mnli", "inference", "Does sentence 2 follow from sentence 1?"),
        _plain("rte", "inference", "Does sentence 2 follow from sentence 1?"),
        _plain("cb", "inference", "Does sentence 2 follow from sentence 1?"),
        _plain("qqp", "meaning", "Do the two questions mean the same?"),
        _plain("wic", "meaning", "Has the word the same meaning in both sentences?"),
        _plain("copa", "reasoning", "Answer the question."),
        _plain("boolq", "reasoning", "Answer the question from the passage."),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Sizes of what is built; longer texts than ``max_words`` words are cut or left out."""

    train: int = 400
    test: int = 200
    public: int = 50
    max_words: int = 32


def default_root() -> Path:
    """Where the tasks are built and looked for unless a folder is named."""
    return cache_dir() / f"text-tasks-v{VERSION}"


def build_text_tasks(
    root: Path,
    tasks: Sequence[str] = (),
    options: BuildOptions | None = None,
    *,
    sources: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[tuple[TextTask, dict[str, int]]]:
    """Writes ``dataset/<name>/{train,test,public}/dataset-<subset>.json`` and ``origin.json``.

    The rows are a function of the sources and the options: a subset is drawn from the task's name
    only.

    Args:
        root: folder to write; other tasks in it stay.
        tasks: names such as ``sst2-0``; all when empty.
        options: sizes.
        sources: see :func:`~fedml_plugin_fedmosaic.data.text_files.read_rows`.
        say: is told about downloads.

    Returns:
        The tasks with their rows per split.

    Raises:
        DataError: an unknown task, or rows that cannot be had.
    """
    options = options or BuildOptions()
    if unknown := [name for name in tasks if name not in TEXT_TASKS]:
        raise DataError(
            f"no text task {unknown[0]!r}; known: {', '.join(TEXT_TASKS)}",
            hint="correct the name, or leave it out to build all",
        )
    built = []
    for name in tasks or TEXT_TASKS:
        task = TEXT_TASKS[name]
        rows = _split(task, options, sources, say)
        for split, part in rows.items():
            _write(root / "dataset" / task.source / split, task, part)
        built.append((task, {split: len(part) for split, part in rows.items()}))
    _write_origin(root, built, options)
    return built


def _split(
    task: TextTask, options: BuildOptions, sources: Path | None, say: Callable[[str], None]
) -> dict[str, list[TextRow]]:
    item = TEXT_SETS[task.source]
    trained = _usable(task, read_rows(item, "train", sources, say), options.max_words)
    tested = _usable(task, read_rows(item, "test", sources, say), options.max_words)
    drawn = python_random(0, "text-tasks", task.name, "train").sample(
        range(len(trained)), min(len(trained), options.train + options.public)
    )
    # Few rows: the public part must not eat up what clients learn from.
    public = sorted(drawn[: min(options.public, len(drawn) // 5)])
    train = sorted(drawn[len(public) :])
    test = sorted(
        python_random(0, "text-tasks", task.name, "test").sample(
            range(len(tested)), min(len(tested), options.test)
        )
    )
    return {
        "train": [trained[index] for index in train],
        "test": [tested[index] for index in test],
        "public": [trained[index] for index in public],
    }


def _usable(task: TextTask, rows: Sequence[TextRow], max_words: int) -> list[TextRow]:
    found = []
    for number, row in enumerate(rows):
        changed = row if task.change is None else task.change(row)
        if changed is None or number % 4 not in task.share:
            continue
        words = changed.text.split()
        if task.cut and len(words) > max_words:
            changed = replace(changed, text=" ".join(words[:max_words]) + " ...")
            words = words[:max_words]
        if 0 < len(words) <= max_words:
            found.append(changed)
    if not found:
        raise DataError(
            f"text task {task.name}: no row has at most {max_words} words",
            hint="raise --max-words",
        )
    return found


def _write(folder: Path, task: TextTask, rows: Sequence[TextRow]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"dataset-{task.subset_id}.json"
    samples = [_sample(task, row, f"{folder.name}-{index}") for index, row in enumerate(rows)]
    path.write_text(json.dumps(samples, indent=1, ensure_ascii=False), encoding="utf-8")


def _sample(task: TextTask, row: TextRow, sample_id: str) -> dict[str, Any]:
    # A mark of our own inside a text would be taken for an image or for the choices.
    text = row.text.replace("<image>", " ").replace("Choice list:", " ").strip()
    prompt = f"{task.question}\n{text}\nChoice list:[{', '.join(task.choices)}]"
    return {
        "id": sample_id,
        "conversations": [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": row.label},
        ],
    }


def _write_origin(
    root: Path, built: Sequence[tuple[TextTask, Mapping[str, int]]], options: BuildOptions
) -> None:
    """What lies in the folder, where it comes from and under which terms."""
    path = root / _ORIGIN
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tasks": {}}
    for task, counts in built:
        item: TextSet = TEXT_SETS[task.source]
        known["tasks"][task.name] = {
            "group": task.group,
            "rows": dict(counts),
            "max_words": options.max_words,
            "origin": item.home,
            "licence": item.licence,
        }
    known["version"] = VERSION
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def load_text(config: DataConfig) -> FederatedData:
    """Reads a scenario over built text tasks.

    Args:
        config: ``root`` is the folder that was built; the default one when omitted.

    Raises:
        DataError: it was not built, or a file is wrong.
    """
    return load_drake(_placed(config))


def _placed(config: DataConfig) -> DataConfig:
    root = default_root() if config.root is None else Path(config.root).expanduser()
    if not (root / "dataset").is_dir():
        raise DataError(
            f"text tasks: expected them in {root}, got nothing there",
            hint="build them once: fedmosaic data build text-tasks",
        )
    return replace(config, root=str(root))


class TextSource(DrakeSource):
    """Text tasks: built from downloads or from the folder ``FEDMOSAIC_DATA_SOURCES``."""

    def missing(self, config: DataConfig) -> list[str]:
        """The sample files of the scenario's tasks."""
        try:
            return super().missing(_placed(config))
        except DataError as error:
            return error.message.splitlines()

    def models(self, config: DataConfig) -> frozenset[str] | None:
        """Those of the scenario's clients."""
        try:
            return super().models(_placed(config))
        except DataError:
            return None

    def fetch(self, config: DataConfig, repository: str | None, say: Callable[[str], None]) -> Path:
        """Builds all tasks."""
        if repository is not None:
            raise DataError("text tasks come from their own repository; leave --repo out")
        root = default_root() if config.root is None else Path(config.root).expanduser()
        for task, counts in build_text_tasks(root, say=say):
            say(f"{task.name}: {counts['train']} to train, {counts['test']} to test")
        return root
