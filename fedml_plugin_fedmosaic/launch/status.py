"""What a run says about itself, and what it means beside the scheduler's word.

A scheduler knows processes; only the run knows whether it reached its end. ``status.json`` is
written by the run (``runtime.status``) and read here. Each start of a job is an **incarnation**
with a name of its own; what an older one wrote is never taken for the newer one's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedml_plugin_fedmosaic.launch.base import STATUS_FILE, JobStatus

INCARNATION_VARIABLE = "FEDMOSAIC_INCARNATION"
"""Set by launchers: ``<job id>.<restart count>``."""

RunState = Literal["running", "finished", "failed", "interrupted"]
EXIT_INTERRUPTED = 75
"""Exit code of a run that was told to stop, has saved its state and can go on (EX_TEMPFAIL)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """``status.json``.

    Attributes:
        state: ``interrupted`` means saved and ready to go on.
        incarnation: ``<job id>.<restart count>`` under Slurm.
        started: ISO time of this incarnation's start, UTC.
        updated: ISO time of the last change, UTC.
        host: machine of the rank that wrote it.
        pid: its process.
        exit_code: of the process; None while it runs.
        message: first line of the error.
    """

    state: RunState
    incarnation: str
    started: str
    updated: str
    host: str = ""
    pid: int = 0
    exit_code: int | None = None
    message: str | None = None

    @property
    def job_id(self) -> str:
        """The job that the incarnation belongs to."""
        return self.incarnation.rpartition(".")[0]


def read_status(run_dir: Path) -> RunStatus | None:
    """The run's own word; None if it has not said anything, or nothing readable."""
    try:
        raw: Mapping[str, Any] = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
        return RunStatus(**raw)
    except (OSError, ValueError, TypeError):
        return None


def true_status(scheduler: JobStatus, said: RunStatus | None, job_ids: Sequence[str]) -> JobStatus:
    """Joins the scheduler's word and the run's own.

    While the scheduler knows the job as waiting or running, that is its status. Once it is over,
    or no longer known, only a run that says ``finished`` is COMPLETED.

    Args:
        scheduler: state of the job, UNKNOWN if the scheduler has forgotten it.
        said: ``status.json``.
        job_ids: ids of the job in ``job.json``; a word of any other job is stale.
    """
    if scheduler in (JobStatus.PENDING, JobStatus.RUNNING):
        return scheduler
    if said is not None and said.job_id not in job_ids:
        said = None
    if said is None:
        # Over without a word: it never came as far as the run.
        return JobStatus.FAILED if scheduler is JobStatus.COMPLETED else scheduler
    if said.state == "finished":
        return JobStatus.COMPLETED
    if said.state == "failed":
        return JobStatus.FAILED
    if scheduler not in (JobStatus.COMPLETED, JobStatus.UNKNOWN):
        return scheduler
    return JobStatus.PREEMPTED if said.state == "interrupted" else JobStatus.FAILED
