"""Scenario files: which client owns which model and tasks, read as they were published.

A scenario is a JSON list with one object per client: ``client_id`` (its position in the list),
``model_id`` and ``datasets``, a list of ``{"dataset", "subset_id", "type", "metric"}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from fedml_plugin_fedmosaic.config.loader import bundled_config
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.registry import METRICS
from fedml_plugin_fedmosaic.data.base import TaskSpec

DUMMY = "dummy"
"""Data set name of a time slot without data."""

_CLIENT_FIELDS = {"client_id", "model_id", "datasets"}
_TASK_FIELDS = {"dataset", "subset_id", "type", "metric", "Desc"}
_KINDS = ("multi-choice", "open-ended")
OTHER_METRICS = ("F1", "Judge")
"""Metrics of open-ended tasks that need more than two texts; the others are on their shelf."""


@dataclass(frozen=True, slots=True)
class ScenarioClient:
    """One client of a scenario, without samples."""

    client_id: int
    model_id: str
    tasks: tuple[TaskSpec, ...]


def bundled_scenarios() -> Mapping[str, Path]:
    """Scenarios that come with the configurations, by name: those of the paper's experiments."""
    folder = bundled_config().parent
    return {path.stem: path for path in sorted(folder.glob("*/scenarios/*.json"))}


def find_scenario(scenario: str | None, root: Path | None = None) -> Path:
    """The file that a configuration's scenario means.

    Args:
        scenario: a path, absolute, below the working directory or below ``root``; or the name of a
            file in ``<root>/scenarios`` or of a bundled scenario.
        root: folder of the data, if there is one.

    Raises:
        DataError: there is no such file.
    """
    if scenario is None:
        raise DataError(
            "this data set needs a scenario, but none is set",
            hint="set data_args: {data: {scenario: FILE.json}}",
        )
    name = scenario if scenario.endswith(".json") else f"{scenario}.json"
    places = [Path(scenario).expanduser()]
    if root is not None:
        places += [root / scenario, root / "scenarios" / name]
    for place in places:
        if place.is_file():
            return place
    bundled = bundled_scenarios()
    if scenario in bundled:
        return bundled[scenario]
    known = {*bundled}
    if root is not None:
        known |= {path.stem for path in (root / "scenarios").glob("*.json")}
    raise DataError(
        f"scenario {scenario!r}: no such file; looked at " + ", ".join(str(p) for p in places),
        hint=f"known scenarios: {', '.join(sorted(known))}"
        if known
        else "give the path of a scenario",
    )


def read_scenario(path: Path) -> tuple[ScenarioClient, ...]:
    """Reads and checks a scenario file.

    Args:
        path: JSON file.

    Returns:
        The clients, ascending by id.

    Raises:
        DataError: the file is not a scenario; all problems are listed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"scenario {path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: expected valid JSON, got: {error.msg}",
            hint="a scenario is a JSON list with one object per client",
        ) from error
    if not isinstance(value, list) or not value:
        raise DataError(
            f"scenario {path}: expected a list of at least one client, got {type(value).__name__}",
            hint="a scenario is a JSON list with one object per client",
        )
    problems: list[str] = []
    for position, entry in enumerate(value):
        problems += _client_problems(entry, position)
    if problems:
        _raise(path, problems)
    clients = tuple(_client(entry) for entry in value)
    problems = _conflicts(clients)
    if problems:
        _raise(path, problems)
    return clients


def _raise(path: Path, problems: list[str]) -> NoReturn:
    shown = problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else [])
    raise DataError(
        f"scenario {path}:\n" + "\n".join(f"  {problem}" for problem in shown),
        hint="client_id counts 0, 1, 2, .. in list order; a data set needs 'dataset' and "
        "'subset_id', 'type' is multi-choice or open-ended",
    )


def _client_problems(entry: object, position: int) -> list[str]:
    where = f"client at position {position}"
    if not isinstance(entry, dict):
        return [f"{where}: expected an object, got {type(entry).__name__}"]
    problems = _field_problems(entry, _CLIENT_FIELDS, _CLIENT_FIELDS, where)
    if "client_id" in entry and not _is_int(entry["client_id"], position):
        problems.append(f"{where}: expected client_id {position}, got {entry['client_id']!r}")
    model = entry.get("model_id", "-")
    if not isinstance(model, str) or not model:
        problems.append(f"{where}: expected model_id to be a name, got {model!r}")
    datasets = entry.get("datasets", [{}])
    if not isinstance(datasets, list) or not datasets:
        problems.append(f"{where}: expected datasets to be a list of tasks, got {datasets!r}")
    elif "datasets" in entry:
        for number, task in enumerate(datasets):
            problems += _task_problems(task, f"{where}, datasets[{number}]")
    return problems


def _task_problems(task: object, where: str) -> list[str]:
    if not isinstance(task, dict):
        return [f"{where}: expected an object, got {type(task).__name__}"]
    problems = _field_problems(task, {"dataset", "subset_id"}, _TASK_FIELDS, where)
    name = task.get("dataset", "-")
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name == "..":
        problems.append(f"{where}: expected dataset to be a folder's name, got {name!r}")
    subset = task.get("subset_id", 0)
    if not _is_int(subset) or subset < 0:
        problems.append(f"{where}: expected subset_id to be a number from 0, got {subset!r}")
    for key, allowed in (("type", _KINDS), ("metric", (*OTHER_METRICS, *METRICS))):
        if key in task and task[key] not in allowed:
            problems.append(f"{where}: expected {key} in {', '.join(allowed)}, got {task[key]!r}")
    return problems


def _field_problems(
    entry: Mapping[Any, Any], required: set[str], known: set[str], where: str
) -> list[str]:
    missing = sorted(required - entry.keys())
    foreign = sorted(str(key) for key in entry.keys() - known)
    problems = [f"{where}: expected a field {key!r}, got none" for key in missing]
    if foreign:
        problems.append(
            f"{where}: expected only {', '.join(sorted(known))}, got {', '.join(foreign)}"
        )
    return problems


def _is_int(value: object, equal_to: int | None = None) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and (equal_to is None or value == equal_to)


def _client(entry: Mapping[str, Any]) -> ScenarioClient:
    return ScenarioClient(
        client_id=entry["client_id"],
        model_id=entry["model_id"],
        tasks=tuple(
            TaskSpec(
                dataset=task["dataset"],
                subset_id=task["subset_id"],
                kind=cast(Literal["multi-choice", "open-ended"], task.get("type", "open-ended")),
                metric=task.get("metric"),
            )
            for task in entry["datasets"]
        ),
    )


def _conflicts(clients: tuple[ScenarioClient, ...]) -> list[str]:
    """Tasks that are repeated inside a client or described differently by two clients."""
    problems: list[str] = []
    first: dict[str, tuple[int, TaskSpec]] = {}
    for client in clients:
        own: set[str] = set()
        for task in client.tasks:
            if task.dataset == DUMMY:
                continue
            if task.name in own:
                problems.append(
                    f"client {client.client_id}: expected each task once, got {task.name} twice"
                )
            own.add(task.name)
            owner, known = first.setdefault(task.name, (client.client_id, task))
            if known != task:
                problems.append(
                    f"client {client.client_id}: expected type and metric of {task.name} as for "
                    f"client {owner} ({known.kind}, {known.metric}), got {task.kind}, {task.metric}"
                )
    return problems
