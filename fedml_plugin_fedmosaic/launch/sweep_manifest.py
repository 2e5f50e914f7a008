"""``sweep.json``: what a sweep is, and what has become of each of its runs.

The file is replaced in one step after every change, so that a reader (and the next start of the
same command) always finds a whole one::

    SWEEP/sweep.json        this record
    SWEEP/runs/<name>/      one run folder per run
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.launch.base import JobStatus, now, write_text_atomic
from fedml_plugin_fedmosaic.launch.sweep_space import Point

MANIFEST_FILE = "sweep.json"
LOCK_FILE = ".sweep.lock"
RUNS_FOLDER = "runs"
MISSING = "MISSING"
"""Status of a run that no job has been submitted for."""
_VERSION = 1
_MAX_SHOWN = 12


@dataclass(slots=True, kw_only=True)
class Entry:
    """One run of the manifest.

    Attributes:
        name: as in :class:`~fedml_plugin_fedmosaic.launch.sweep_space.Point`.
        levels: axis name -> label.
        changes: full key path -> value.
        folder: run folder, relative to the sweep's.
        status: a :class:`JobStatus` name, or ``MISSING``.
        launcher: who started it last.
        job_id: its last job.
        attempts: jobs that were submitted for it.
        value: the objective's value, for tpe.
    """

    name: str
    levels: Mapping[str, Any]
    changes: Mapping[str, Any]
    folder: str
    status: str = MISSING
    launcher: str | None = None
    job_id: str | None = None
    attempts: int = 0
    value: float | None = None

    @property
    def point(self) -> Point:
        """The run as the expansion made it."""
        return Point(self.name, self.levels, self.changes)

    @property
    def is_open(self) -> bool:
        """Whether a job for it may be waiting or running."""
        return self.status in ("PENDING", "RUNNING", "UNKNOWN")

    @property
    def needs_start(self) -> bool:
        """Whether it has never run, or has ended without reaching its end."""
        return not self.is_open and self.status != JobStatus.COMPLETED.value


def entry_of(point: Point) -> Entry:
    """The entry of a run that has not started."""
    return Entry(
        name=point.name,
        levels=dict(point.levels),
        changes=dict(point.changes),
        folder=f"{RUNS_FOLDER}/{point.name}",
    )


@dataclass(slots=True, kw_only=True)
class Manifest:
    """``sweep.json``.

    Attributes:
        identity: what may not differ when the sweep is started again.
        runs: in the order of the expansion.
        created: ISO time, UTC.
        updated: ISO time of the last change, UTC.
    """

    identity: dict[str, Any]
    runs: list[Entry] = field(default_factory=list)
    created: str = ""
    updated: str = ""

    def counts(self) -> dict[str, int]:
        """Number of runs per status, in alphabetical order."""
        found: dict[str, int] = {}
        for entry in self.runs:
            found[entry.status] = found.get(entry.status, 0) + 1
        return dict(sorted(found.items()))

    @property
    def seed_axis(self) -> bool:
        """Whether the seed is varied."""
        return any("seed" in entry.levels for entry in self.runs)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``sweep.json`` in one step."""
    manifest.updated = now()
    manifest.created = manifest.created or manifest.updated
    record = {"version": _VERSION, **asdict(manifest)}
    write_text_atomic(folder / MANIFEST_FILE, json.dumps(record, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Reads ``sweep.json``; None if the folder has none.

    Raises:
        DataError: the file is damaged, or of a version that this package does not know.
    """
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != _VERSION:
            raise DataError(
                f"{path}: expected version {_VERSION}, got {raw['version']!r}",
                hint="read it with the version of this package that wrote it",
            )
        return Manifest(
            identity=raw["identity"],
            runs=[Entry(**entry) for entry in raw["runs"]],
            created=raw["created"],
            updated=raw["updated"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is damaged: {type(error).__name__}: {error}",
            hint="move it away; the runs' folders are still there for 'fedmosaic compare'",
        ) from error


def require_manifest(folder: Path) -> Manifest:
    """Like :func:`read_manifest`, for a folder that must be a sweep's.

    Raises:
        DataError: it is not, or the file is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            f"{folder}: expected the folder of a sweep, but there is no {MANIFEST_FILE}",
            hint="give the folder that 'fedmosaic sweep' printed",
        )
    return manifest


def check_identity(folder: Path, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses another sweep in the same folder.

    Raises:
        ConfigError: they differ; every difference is named.
    """
    # Through JSON, so that a tuple and the list that was read back are the same.
    differences = list(_differences("", known, json.loads(json.dumps(asked))))
    if differences:
        rest = len(differences) - _MAX_SHOWN
        lines = [f"{folder / MANIFEST_FILE}: {text}" for text in differences[:_MAX_SHOWN]]
        if rest > 0:
            lines.append(f"... and {rest} more")
        raise ConfigError(
            "\n".join(lines),
            hint="the folder holds another sweep: choose another --dir, or ask for the same again",
        )


def check_entry(
    folder: Path, known: Entry, asked: Mapping[str, Any], free: Collection[str] = ()
) -> None:
    """Refuses a run that is there under the same name with other values.

    Args:
        folder: of the sweep.
        known: the run that is there.
        asked: full key path -> value.
        free: keys that may differ.

    Raises:
        ConfigError: they differ; every difference is named.
    """
    old = {key: value for key, value in known.changes.items() if key not in free}
    new = {key: value for key, value in asked.items() if key not in free}
    changed = [
        f"{folder / known.folder}: {key}: there {_text(old.get(key))}, "
        f"asked for {_text(new.get(key))}"
        for key in sorted({*old, *new})
        if old.get(key) != json.loads(json.dumps(new.get(key)))
    ]
    if changed:
        raise ConfigError(
            "\n".join(changed),
            hint="choose another folder, remove that of the run, or ask for the same again",
        )


def _differences(path: str, known: Any, asked: Any) -> Iterator[str]:
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in [*known, *(key for key in asked if key not in known)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(inner, known.get(key), asked.get(key))
    elif isinstance(known, list) and isinstance(asked, list) and path == "grid":
        for number in range(max(len(known), len(asked))):
            old = known[number] if number < len(known) else None
            new = asked[number] if number < len(asked) else None
            inner = path if max(len(known), len(asked)) == 1 else f"{path}[{number}]"
            yield from _differences(inner, old, new)
    elif known != asked:
        yield f"{path}: there {_text(known)}, asked for {_text(asked)}"


def _text(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second command from starting runs of the same sweep at the same time.

    Raises:
        ConfigError: another command holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another 'fedmosaic sweep' is starting runs of this sweep",
                hint="wait for it, or end it",
            ) from error
        except OSError:
            # Some network file systems have no locks; the runs' job.json still protects them.
            yield
            return
        yield


def is_locked(folder: Path) -> bool:
    """Whether another command is starting or following runs of this sweep."""
    try:
        with (folder / LOCK_FILE).open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
