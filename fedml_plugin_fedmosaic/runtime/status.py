"""A run's own word about itself: ``status.json`` in its run folder.

Schedulers know processes; a run knows whether it reached its end. Rank 0 says when it starts and
ends; whichever rank fails says so before the job dies.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import asdict, replace
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import LAUNCH_FILES, STATUS_FILE, now, read_record
from fedml_plugin_fedmosaic.launch.env import incarnation
from fedml_plugin_fedmosaic.launch.status import (
    EXIT_INTERRUPTED,
    RunState,
    RunStatus,
    read_status,
)
from fedml_plugin_fedmosaic.runtime.treefile import write_atomic

LOG = logging.getLogger(__name__)


def say_running(run_dir: Path) -> None:
    """This incarnation has started; replaces the word of any older one."""
    _write(run_dir, _of_this("running"))


def say_ended(run_dir: Path, exit_code: int, message: str | None = None) -> bool:
    """This incarnation's process is about to end.

    Args:
        run_dir: the run folder.
        exit_code: 0 finished, 75 interrupted and ready to go on, anything else failed.
        message: what went wrong.

    Returns:
        False if the folder is not this incarnation's: a newer one has taken it over, or it holds
        another run. Nothing is written then.
    """
    own = incarnation()
    known = read_status(run_dir)
    if not _may_write(run_dir, own, known):
        LOG.warning("%s is not the folder of incarnation %s; its end is not noted", run_dir, own)
        return False
    states: dict[int, RunState] = {0: "finished", EXIT_INTERRUPTED: "interrupted"}
    status = _of_this(states.get(exit_code, "failed"))
    if known is not None and known.incarnation == own:
        status = replace(status, started=known.started)
    _write(run_dir, replace(status, exit_code=exit_code, message=message))
    return True


def _may_write(run_dir: Path, own: str, known: RunStatus | None) -> bool:
    if not run_dir.is_dir():
        return False
    if known is None:
        return all(path.name in LAUNCH_FILES for path in run_dir.iterdir())
    if known.incarnation == own:
        return True
    job_id, _, restart = own.rpartition(".")
    if known.job_id == job_id:
        return int(restart) > int(known.incarnation.rpartition(".")[2])
    try:
        chain = read_record(run_dir).ids
    except LaunchError:
        return False
    # A chain's later job takes the word over from its earlier ones, never the other way round.
    return job_id in chain and known.job_id not in chain[chain.index(job_id) :]


def _of_this(state: RunState) -> RunStatus:
    moment = now()
    return RunStatus(
        state=state,
        incarnation=incarnation(),
        started=moment,
        updated=moment,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def _write(run_dir: Path, status: RunStatus) -> None:
    write_atomic(run_dir / STATUS_FILE, (json.dumps(asdict(status), indent=1) + "\n").encode())
