"""From a configuration to a job, and from a run folder back to its job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fedml_plugin_fedmosaic.config.loader import dump_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, FedMosaicError
from fedml_plugin_fedmosaic.core.registry import LAUNCHERS
from fedml_plugin_fedmosaic.launch.base import (
    JOB_FILE,
    SUBMITTED_FILE,
    Job,
    JobRecord,
    JobSpec,
    JobStatus,
    Launcher,
    Resources,
    read_record,
    write_text_atomic,
)
from fedml_plugin_fedmosaic.launch.resources import default_resources, het_components
from fedml_plugin_fedmosaic.launch.status import RunStatus, read_status

_MODULE = "fedml_plugin_fedmosaic"
_LABEL = re.compile(r"^\s*(?:(\d+)|\[[^\],]*,(\d+)\]<std(?:out|err)>):(?: |$)")


def job_spec(experiment: Experiment, run_dir: Path, name: str | None = None) -> JobSpec:
    """The job that runs a configuration; writes nothing.

    Args:
        experiment: validated configuration; its ``launcher`` section says what is not default.
        run_dir: folder of the run, on a file system that every machine sees.
        name: shown in queues; the folder's name when None.

    Raises:
        ConfigError: the resources do not fit the models, or the configuration goes on with a run.
    """
    _refuse_resume(experiment)
    config = experiment.launcher
    python = [sys.executable] if config.python is None else shlex.split(config.python)
    folder = run_dir.absolute()
    start = (*python, "-m", _MODULE, "run")
    parts = het_components(experiment) if config.heterogeneous else ()
    resources: Resources = parts[0].resources if parts else default_resources(experiment)
    spec = JobSpec(
        name=name or folder.name,
        command=(*start, "--cf", str(folder / SUBMITTED_FILE), "--run-dir", str(folder)),
        resume_command=(*start, "--resume", str(folder)),
        run_dir=folder,
        resources=resources,
        components=parts,
        setup=tuple(config.setup),
        environment=dict(config.environment),
        mpi=config.mpi,
        requeue=config.requeue and config.chain == 1,
        signal_s=config.signal_s,
        chain=config.chain,
    )
    if spec.num_tasks == 1 and spec.mpi != "mpirun":
        # One rank has nobody to find.
        spec = replace(spec, mpi="none")
    return spec


def _refuse_resume(experiment: Experiment) -> None:
    """A job has a run folder of its own, in which it goes on by itself when it starts again.

    Raises:
        ConfigError: ``run.resume`` is set.
    """
    resume = experiment.run.resume
    if resume is not None:
        raise ConfigError(
            f"run.resume: {resume} cannot be submitted: a job is a new run in a folder of its own, "
            "and its later starts (requeued, or the next of a --chain) go on with that folder",
            hint="take run.resume out for a new run. To go on with the old one: 'fedmosaic run "
            f"--resume {resume}', or as a job: 'fedmosaic submit --scripts .', then "
            f"'RUN_DIR={resume} sbatch slurm/<script>.sh'",
        )


def submit(experiment: Experiment, run_dir: Path, name: str | None = None) -> Job:
    """Writes the configuration into the run folder and starts the job with its launcher.

    Raises:
        ConfigError: see :func:`job_spec`, or the run folder holds something already.
        LaunchError: the job could not be started.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ConfigError(
            f"the run folder {run_dir} exists and is not an empty folder",
            hint="choose another --run-dir; results are never overwritten",
        )
    launcher: Launcher = LAUNCHERS[experiment.launcher.type]()
    spec = job_spec(experiment, run_dir, name)
    write_text_atomic(run_dir / SUBMITTED_FILE, dump_experiment(experiment))
    return launcher.submit(spec)


def new_run_dir(experiment: Experiment) -> Path:
    """A folder under ``run.root`` that no run has yet; it is made now, so no other job takes it."""
    root = Path(experiment.run.root)
    if experiment.run.name is not None:
        return root / experiment.run.name
    number = 1
    while True:
        folder = root / f"{experiment.algo}-{experiment.data.source}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        return folder


def attach(run_dir: Path) -> Job:
    """The job of a run folder, whichever launcher started it.

    Raises:
        LaunchError: the folder holds no job.
    """
    record = read_record(run_dir)
    launcher: Launcher = LAUNCHERS[record.launcher]()
    return launcher.attach(run_dir)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLine:
    """One job in a list.

    Attributes:
        run_dir: folder of the run.
        record: how it was submitted.
        status: what has become of it.
        said: the run's own word.
        problem: why the status is not known.
    """

    run_dir: Path
    record: JobRecord
    status: JobStatus
    said: RunStatus | None
    problem: str | None = None


def find_jobs(root: Path) -> Iterator[JobLine]:
    """All jobs in a folder of run folders, oldest first; a damaged record does not end the list."""
    found = []
    for path in root.rglob(JOB_FILE):
        try:
            found.append((read_record(path.parent), path.parent))
        except FedMosaicError:
            continue
    for record, run_dir in sorted(found, key=lambda item: (item[0].submitted, str(item[1]))):
        said = read_status(run_dir)
        try:
            status, problem = attach(run_dir).status(), None
        except FedMosaicError as error:
            status, problem = JobStatus.UNKNOWN, error.message
        yield JobLine(run_dir=run_dir, record=record, status=status, said=said, problem=problem)


def rank_of_line(line: str) -> tuple[int | None, str]:
    """The rank that wrote a line of a job's log, and the line without its label.

    Returns:
        ``(None, line)`` for the script's own lines and in jobs of one rank.
    """
    found = _LABEL.match(line)
    if found is None:
        return None, line
    return int(found[1] or found[2]), line[found.end() :]
