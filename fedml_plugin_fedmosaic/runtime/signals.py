"""Signals that ask a run to stop after the current optimizer step, saved and ready to resume.

Schedulers send SIGTERM before they kill a job, or SIGUSR1 some minutes earlier (Slurm's
``--signal=USR1@300``). Only the doors install handlers; everything below asks ``should_stop``.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LOG = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def never() -> bool:
    """The answer of a run that nobody stops."""
    return False


class StopRequest:
    """Whether someone asked the run to stop; call it to ask.

    Attributes:
        name: the signal's name; None before it came.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.name is not None

    def handle(self, number: int, frame: FrameType | None = None) -> None:  # noqa: ARG002
        """Notes the request; nothing else is safe inside a signal handler."""
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Listens to SIGTERM and SIGUSR1 while the block runs; the old handlers come back after it.

    Outside the main thread Python cannot listen; the request then stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        LOG.info("not in the main thread: SIGTERM and SIGUSR1 are not caught")
        yield request
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, request.handle)
        yield request
    finally:
        for number, handler in before.items():
            # None: a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
