"""Event sinks that write into the run folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from fedml_plugin_fedmosaic.core.events import TRANSIENT, Event, EventSink, to_record
from fedml_plugin_fedmosaic.runtime.treefile import write_error


class JsonLines:
    """Appends every lasting event to a file, one JSON object a line, flushed at once.

    Args:
        path: created with the first event.
        everything: False leaves out what every rank sees (events that name no client).
    """

    def __init__(self, path: Path, *, everything: bool = True) -> None:
        self.path = path
        self._everything = everything
        self._stream: TextIO | None = None

    def __call__(self, event: Event) -> None:
        """Writes the event unless it is for the screen only.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if isinstance(event, TRANSIENT):
            return
        if not self._everything and not hasattr(event, "client_id"):
            return
        line = json.dumps(to_record(event)) + "\n"
        try:
            if self._stream is None:
                self._stream = self.path.open("a", encoding="utf-8")
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            self._abandon()
            raise write_error(self.path, error) from error

    def sync(self) -> None:
        """Makes what was written outlive a power cut.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self._stream is None:
            return
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Closes the file; a later event opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _abandon(self) -> None:
        """Closes the file without writing what is still buffered: it would fail again."""
        if self._stream is not None:
            # The first error is the one that is reported.
            with contextlib.suppress(OSError):
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


class Recorder:
    """Hands events on and remembers the lasting ones.

    Args:
        sink: takes every event.
    """

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Remembers the event and hands it on."""
        if not isinstance(event, TRANSIENT):
            self.events.append(event)
        self._sink(event)
