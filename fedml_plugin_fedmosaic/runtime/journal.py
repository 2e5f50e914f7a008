"""``metrics.jsonl`` over several lives of a run: what a resumed run keeps, and the final order.

While a run goes on, every rank group appends its events to a file of its own. A resumed run puts
the files together and keeps what belongs to work that it will not do again; at the end all files
become one, in an order that does not depend on ranks or interruptions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import CheckpointError
from fedml_plugin_fedmosaic.runtime.treefile import write_atomic, write_error

METRICS_FILE = "metrics.jsonl"

ScoreKey = tuple[str, int, int, str, str, bool]
"""Strategy, round, client, view, task, final: which score an ``Evaluated`` event is."""

_PHASES = {
    "RoundStarted": 0,
    "ClientTrained": 1,
    "ClientProbed": 1,
    "ClientReported": 1,
    "ClientDropped": 1,
    "RoundSkipped": 2,
    "PlanMade": 3,
    "RoundFinished": 4,
    "Evaluated": 5,
}


def rank_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its events."""
    return run_dir / (METRICS_FILE if rank == 0 else f"metrics.rank{rank}.jsonl")


def _rank_files(run_dir: Path) -> list[Path]:
    """The files of all ranks, also of an earlier life with more ranks; rank 0's first."""
    others = [
        (int(path.name.removeprefix("metrics.rank").removesuffix(".jsonl")), path)
        for path in run_dir.glob("metrics.rank*.jsonl")
    ]
    first = run_dir / METRICS_FILE
    return [*([first] if first.exists() else []), *(path for _, path in sorted(others))]


def _records(path: Path) -> list[dict[str, Any]]:
    """The file's records; a torn last line (a killed process) is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["strategy"], str):
                raise TypeError("strategy is not a text")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                f"{path}:{number}: not an event: {error}",
                hint="remove the damaged line; its scores are then computed again",
            ) from error
        records.append(record)
    return records


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a resumed run does not do again.

    Attributes:
        finished: strategies that are done.
        rounds: strategy -> newest 0-based round that is saved; -1 before the first.
    """

    finished: frozenset[str] = frozenset()
    rounds: Mapping[str, int] = field(default_factory=dict)

    def holds(self, record: Mapping[str, Any], base: str) -> bool:
        """Whether an event belongs to work that is not done again."""
        strategy = record["strategy"]
        if strategy == base or strategy in self.finished:
            return True
        newest = self.rounds.get(strategy)
        return newest is not None and "round_idx" in record and record["round_idx"] <= newest


def take_up(run_dir: Path, kept: Kept, base: str) -> None:
    """Makes one ``metrics.jsonl`` of all ranks' files with what is kept; rank 0 calls it.

    Args:
        run_dir: the run folder.
        kept: what the resumed run does not do again.
        base: name under which the base models are evaluated.

    Raises:
        CheckpointError: a file is damaged before its last line, or the folder cannot be written.
    """
    files = _rank_files(run_dir)
    found = [record for path in files for record in _records(path)]
    _replace(run_dir, files, [record for record in found if kept.holds(record, base)])


def settle(run_dir: Path, strategies: Sequence[str]) -> None:
    """Makes one ``metrics.jsonl`` in its final order; rank 0 calls it when all ranks are done.

    Args:
        run_dir: the run folder.
        strategies: in the order in which they ran, the base models first.

    Raises:
        CheckpointError: a file is damaged, or the folder cannot be written.
    """
    files = _rank_files(run_dir)
    place = {name: index for index, name in enumerate(strategies)}

    def order(record: Mapping[str, Any]) -> tuple[float, ...]:
        kind = record["event"]
        ends = {"RunStarted": -math.inf, "RunFinished": math.inf}
        return (
            place.get(record["strategy"], len(place)),
            ends.get(kind, record.get("round_idx", math.inf)),
            _PHASES.get(kind, _PHASES["RoundSkipped"]),
            record.get("client_id", -1),
        )

    _replace(run_dir, files, sorted((r for path in files for r in _records(path)), key=order))


def _replace(run_dir: Path, files: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
    # A process killed between the two steps leaves lines twice; equal lines are the same event.
    lines = dict.fromkeys(json.dumps(record) for record in records)
    if not lines and not files:
        return
    target = run_dir / METRICS_FILE
    write_atomic(target, "".join(f"{line}\n" for line in lines).encode())
    for path in files:
        if path != target:
            try:
                path.unlink()
            except OSError as error:
                raise write_error(path, error) from error


def known_scores(run_dir: Path) -> frozenset[ScoreKey]:
    """The scores that ``metrics.jsonl`` holds."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return frozenset()
    return frozenset(
        (
            record["strategy"],
            record["round_idx"],
            record["client_id"],
            record["view"],
            record["task"],
            record["final"],
        )
        for record in _records(path)
        if record["event"] == "Evaluated"
    )
