"""One run folder, one run: rank 0 holds a lock on a file in it for as long as the run lives."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import RunInUse
from fedml_plugin_fedmosaic.launch.base import LOCK_FILE
from fedml_plugin_fedmosaic.runtime.treefile import write_error

LOG = logging.getLogger(__name__)

WAIT_S = 3.0
"""Seconds that a new life waits for the old one's process to be gone."""

_POLL_S = 0.1
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_CANNOT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def check_unlocked(run_dir: Path, *, wait_s: float | None = None) -> None:
    """Whether no process runs in a folder now; takes and writes nothing.

    Raises:
        RunInUse: one does.
    """
    path = run_dir / LOCK_FILE
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        # None was made yet, or the folder cannot be written, which the run itself will say.
        return
    try:
        if _take(handle, path, wait_s):
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


@contextmanager
def holding(run_dir: Path, *, wait_s: float | None = None) -> Iterator[None]:
    """Keeps other processes out of a run folder, which is made if need be.

    The system lets go of the lock when the process ends, however it ends. The file stays: if it
    were deleted, two processes could hold locks on two files of one name. On a file system without
    locks there is a warning instead.

    Args:
        run_dir: the run folder.
        wait_s: how long to wait for another process; ``WAIT_S`` when None.

    Raises:
        RunInUse: another process holds the lock; nothing has been written.
        CheckpointError: the folder cannot be written.
    """
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        taken = _take(handle, path, wait_s)
        try:
            _sign(handle, path)
            yield
        finally:
            if taken:
                # Not by closing alone: a forked process may have the same file open.
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _take(handle: int, path: Path, wait_s: float | None) -> bool:
    """Whether the lock is ours; False where there are no locks."""
    deadline = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _CANNOT:
                LOG.warning(
                    "%s cannot be locked (%s): see to it that no second process runs or resumes "
                    "this folder",
                    path,
                    error.strerror,
                )
                return False
            if error.errno not in _HELD:
                raise write_error(path, error) from error
            if time.monotonic() >= deadline:
                raise _in_use(handle, path) from error
            time.sleep(_POLL_S)
        else:
            return True


def _sign(handle: int, path: Path) -> None:
    """Says who holds the lock, for the message that others get."""
    entry = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(entry).encode() + b"\n", 0)
    except OSError as error:
        raise write_error(path, error) from error


def _in_use(handle: int, path: Path) -> RunInUse:
    try:
        entry = json.loads(os.pread(handle, 4096, 0))
        holder = f"process {entry['pid']} on {entry['host']}, since {entry['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # Between taking the lock and signing.
        holder = "another process"
    return RunInUse(
        f"{path.parent} is in use by {holder}",
        hint="wait for its end, or stop it with SIGTERM; if its machine is gone and the file "
        f"system does not notice, delete {path.name}",
    )


__all__ = ["WAIT_S", "check_unlocked", "holding"]
