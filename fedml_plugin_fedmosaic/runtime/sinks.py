"""Event sinks that write into the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from fedml_plugin_fedmosaic.core.events import TRANSIENT, Event, EventSink, to_record


class JsonLines:
    """Appends every lasting event to a file, one JSON object a line, flushed at once.

    Args:
        path: created with the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None

    def __call__(self, event: Event) -> None:
        """Writes the event unless it is for the screen only."""
        if isinstance(event, TRANSIENT):
            return
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        self._stream.write(json.dumps(to_record(event)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file; a later event opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class FanOut:
    """Hands each event to several sinks in order."""

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks = tuple(sinks)

    def __call__(self, event: Event) -> None:
        """Hands the event on."""
        for sink in self._sinks:
            sink(event)


def merge_rank_files(run_dir: Path, size: int) -> None:
    """Appends the other ranks' ``metrics.rankN.jsonl`` to ``metrics.jsonl`` and deletes them."""
    target = run_dir / "metrics.jsonl"
    for rank in range(1, size):
        part = run_dir / f"metrics.rank{rank}.jsonl"
        if not part.exists():
            continue
        with target.open("a", encoding="utf-8") as stream:
            stream.write(part.read_text(encoding="utf-8"))
        part.unlink()
