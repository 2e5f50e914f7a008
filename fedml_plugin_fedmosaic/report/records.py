"""Reads the files of a run folder into typed records.

A run folder holds ``metrics.jsonl`` (one event per line, see ``core.events.to_record``),
``clients.json``, ``config.yaml`` and ``environment.json``. Only the first two are required.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.core.errors import DataError

_LOG = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CLIENTS_FILE = "clients.json"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
RESUMES_FILE = "resumes.jsonl"
SCHEDULE_FILE = "schedule.json"
BASE = "base"
"""Name under which the untouched base models are evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientInfo:
    """One entry of ``clients.json``."""

    client_id: int
    model: str
    family: str
    size: str
    signature: str
    tasks: tuple[str, ...]
    num_examples: int

    @property
    def label(self) -> str:
        """Family and size, as tables show a model."""
        return f"{self.family} {self.size}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """One line of ``resumes.jsonl``: a new life of the run.

    Attributes:
        time: when it began, ISO 8601.
        strategy: the one that it went on with.
        rounds_done: rounds of that strategy that earlier lives had saved.
        ranks: of the new life.
    """

    time: str
    strategy: str
    rounds_done: int
    ranks: int


def read_resumptions(path: Path) -> tuple[Resumption, ...]:
    """Reads ``resumes.jsonl``; a run that was never resumed has none.

    Raises:
        DataError: a line is damaged.
    """
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            found.append(
                Resumption(
                    time=str(record["time"]),
                    strategy=str(record["strategy"]),
                    rounds_done=int(record["rounds_done"]),
                    ranks=int(record["ranks"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: not a resumption ({type(error).__name__}: {error}); "
                f"found {line[:80]!r}",
                hint="remove the damaged line; it is for people only",
            ) from error
    return tuple(found)


def read_events(path: Path) -> list[ev.Event]:
    """Reads ``metrics.jsonl``; a torn last line (a killed run) is left out.

    Args:
        path: the file.

    Returns:
        The events in file order, without types that this version does not know.

    Raises:
        DataError: the file is missing, or a line before the last is not an event record.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected the metrics of a run",
            hint="give a run folder, the one that `fedml run --algo ...` printed",
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    events: list[ev.Event] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            event = ev.from_record(record)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            if number == last and not text.endswith("\n"):
                _LOG.warning("%s:%d: torn last line left out", path, number + 1)
                break
            raise DataError(
                f"{path}:{number + 1}: not an event record "
                f"({type(error).__name__}: {error}); found {line[:80]!r}",
                hint="remove the damaged line, or rerun",
            ) from error
        if event is not None:
            events.append(event)
    return events


def read_json(path: Path, *, required: bool) -> Any:
    """Reads a JSON file of a run folder.

    Args:
        path: the file.
        required: whether a missing file is an error; None is returned otherwise.

    Raises:
        DataError: the file is missing although required, or is not JSON (file and line).
    """
    if not path.is_file():
        if required:
            raise DataError(
                f"{path}: no such file; expected it in a run folder",
                hint="give the folder that `fedml run --algo ...` printed",
            )
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error


def read_clients(path: Path) -> tuple[ClientInfo, ...]:
    """Reads ``clients.json``, ascending by client id.

    Raises:
        DataError: the file is missing, or an entry lacks a field.
    """
    records = read_json(path, required=True)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of clients, got {type(records).__name__}")
    clients = []
    for position, record in enumerate(records):
        try:
            values = {item.name: record[item.name] for item in fields(ClientInfo)}
            values["tasks"] = tuple(values["tasks"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: client at position {position} lacks {error}") from error
        clients.append(ClientInfo(**values))
    return tuple(sorted(clients, key=lambda client: client.client_id))


Schedule = Mapping[int, tuple[tuple[int, int] | None, ...]]
"""Client id -> for each task the first and the last 0-based round in which its samples arrive."""


def read_schedule(path: Path, clients: Sequence[ClientInfo]) -> Schedule:
    """Reads ``schedule.json``; empty for a run folder without it.

    Args:
        path: of the file.
        clients: of the run; each has as many tasks as the file says.

    Raises:
        DataError: the file is damaged, or belongs to other clients.
    """
    hint = "remove the file; forgetting and forward transfer will not be shown"
    record = read_json(path, required=False)
    try:
        schedule = {
            int(client_id): tuple(
                None if rounds is None else (int(rounds[0]), int(rounds[1])) for rounds in tasks
            )
            for client_id, tasks in (record or {}).items()
        }
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{path}: expected two rounds per task and client ({type(error).__name__}: {error})",
            hint=hint,
        ) from error
    for client in clients:
        found = len(schedule.get(client.client_id, client.tasks))
        if found != len(client.tasks):
            raise DataError(
                f"{path}: client {client.client_id}: expected {len(client.tasks)} tasks as in "
                f"clients.json, got {found}",
                hint=hint,
            )
    return schedule
