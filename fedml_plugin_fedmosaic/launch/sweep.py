"""Runs a sweep: starts what is missing or has failed, and keeps the manifest true."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedml_plugin_fedmosaic.config.loader import dump_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.core.registry import LAUNCHERS
from fedml_plugin_fedmosaic.launch.base import (
    JOB_FILE,
    LOG_FOLDER,
    STARTED_FILE,
    SUBMITTED_FILE,
    Job,
    JobSpec,
    JobStatus,
    Launcher,
    read_record,
    write_text_atomic,
)
from fedml_plugin_fedmosaic.launch.jobs import job_spec
from fedml_plugin_fedmosaic.launch.status import read_status
from fedml_plugin_fedmosaic.launch.sweep_manifest import (
    MISSING,
    Entry,
    Manifest,
    check_entry,
    check_identity,
    entry_of,
    is_locked,
    read_manifest,
    write_manifest,
)
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan, check_points
from fedml_plugin_fedmosaic.launch.sweep_space import make_point, with_seeds
from fedml_plugin_fedmosaic.launch.sweep_tpe import Trial, propose

SpecMaker = Callable[[Entry, Experiment, Path], JobSpec]
"""Makes a job from an entry, its configuration and its run folder."""
Report = Callable[[Entry], None]
"""Is told of every entry whose status has changed."""
Score = Callable[[Path], float | None]
"""The objective's value of a run folder; None if it has none."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


def sweep_job(entry: Entry, experiment: Experiment, run_dir: Path) -> JobSpec:
    """The job of one run, as ``fedmosaic submit`` would start it.

    Raises:
        ConfigError: the resources do not fit the models.
    """
    return job_spec(experiment, run_dir, _NOT_IN_NAMES.sub("-", entry.name))


def open_sweep(folder: Path, plan: SweepPlan) -> Manifest:
    """The manifest of a folder, or a new one; nothing is written.

    Raises:
        ConfigError: the folder holds another sweep, or runs of the same name that were made with
            other values.
        DataError: its manifest is damaged.
    """
    identity = plan.identity()
    manifest = read_manifest(folder)
    if manifest is None:
        return Manifest(identity=identity, runs=[entry_of(point) for point in plan.points])
    check_identity(folder, manifest.identity, identity)
    if plan.spec.grows:
        known = {entry.name: entry for entry in manifest.runs}
        for point in plan.points:
            entry = known.get(point.name)
            if entry is not None and (folder / entry.folder / JOB_FILE).is_file():
                check_entry(folder, entry, point.changes, plan.spec.free)
            elif entry is not None:
                entry.changes = dict(point.changes)
        manifest.runs += [entry_of(point) for point in plan.points if point.name not in known]
    return manifest


def refresh(
    folder: Path,
    manifest: Manifest,
    *,
    jobs: Mapping[str, Job] | None = None,
    offline: bool = False,
) -> list[Entry]:
    """Brings every run's status up to date; nothing is written.

    Args:
        folder: of the sweep.
        manifest: is changed.
        jobs: by the run's name, those that this very program has started; None if it only looks.
        offline: ask no scheduler, only the files that the runs have written.

    Returns:
        The entries whose status has changed.

    Raises:
        LaunchError: a scheduler cannot be asked.
    """
    changed = []
    driver_lives = jobs is None and is_locked(folder)
    for entry in manifest.runs:
        before = entry.status
        run_dir = folder / entry.folder
        if not (run_dir / JOB_FILE).is_file():
            entry.status = MISSING
        elif jobs is not None and entry.name in jobs:
            entry.status = jobs[entry.name].status().value
        elif before != JobStatus.COMPLETED.value:
            entry.status = _status(entry, run_dir, offline=offline)
            if driver_lives and before == "PENDING" and not read_status(run_dir):
                # The command that waits has not started it yet; only that command knows.
                entry.status = before
        if entry.status != before:
            changed.append(entry)
    return changed


def _status(entry: Entry, run_dir: Path, *, offline: bool) -> str:
    record = read_record(run_dir)
    entry.launcher, entry.job_id = record.launcher, record.ids[0]
    if not offline:
        return str(LAUNCHERS[record.launcher]().attach(run_dir).status().value)
    said = read_status(run_dir)
    if said is None or said.job_id not in record.ids:
        return JobStatus.PENDING.value
    states = {
        "running": JobStatus.RUNNING,
        "finished": JobStatus.COMPLETED,
        "failed": JobStatus.FAILED,
        "interrupted": JobStatus.PREEMPTED,
    }
    return states[said.state].value


@dataclass(slots=True, kw_only=True)
class SweepDriver:
    """Starts and follows the runs of one sweep.

    Attributes:
        folder: of the sweep.
        plan: what it is.
        launcher: starts the jobs.
        launcher_name: its name on the shelf.
        report: is told of changes.
        make_spec: makes a job.
        fresh: start failed runs anew instead of from their last checkpoint.
        poll_s: seconds between two looks at the jobs.
    """

    folder: Path
    plan: SweepPlan
    launcher: Launcher
    launcher_name: str
    report: Report
    make_spec: SpecMaker = sweep_job
    fresh: bool = False
    poll_s: float = 1.0
    manifest: Manifest = field(init=False)
    _jobs: dict[str, Job] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.manifest = open_sweep(self.folder, self.plan)

    def start(self, *, restart_unknown: bool = False) -> list[Entry]:
        """Starts every run that is missing or has failed; never one that may still be alive.

        Of a folder that grows, only runs that this plan asks for.

        Args:
            restart_unknown: also those that neither scheduler nor run folder knows about.

        Returns:
            The entries that were started.

        Raises:
            LaunchError: the jobs could not be submitted.
        """
        self._refresh()
        wanted = [
            entry
            for entry in self.manifest.runs
            if entry.name in self.plan.experiments
            and (entry.needs_start or (restart_unknown and entry.status == "UNKNOWN"))
        ]
        self._submit(wanted, self.plan.experiments)
        return wanted

    def wait(self) -> None:
        """Follows the runs until none may be alive any more.

        Raises:
            LaunchError: a scheduler cannot be asked.
        """
        while True:
            self._refresh()
            if not any(entry.status in ("PENDING", "RUNNING") for entry in self.manifest.runs):
                return
            time.sleep(self.poll_s)

    def optimise(self, score: Score) -> Entry | None:
        """Asks for, starts and waits for batches until there are as many as were asked for.

        Runs of an earlier command that failed are started once more first.

        Args:
            score: the objective's value of a finished run.

        Returns:
            A run of the best configuration; None if none has a value.

        Raises:
            LaunchError: the jobs could not be submitted, a whole batch failed, or optuna is not
                installed.
        """
        spec, grid = self.plan.spec, self.plan.space[0]
        samples = spec.samples or 0
        repeats = math.prod(len(axis.levels) for axis in grid if axis.is_seed)
        places = max(1, spec.max_parallel // repeats)
        failed = [entry for entry in self.manifest.runs if entry.needs_start]
        points = [entry.point for entry in failed]
        self._refresh()
        self._submit([e for e in failed if e.needs_start], check_points(spec, points))
        entries: list[Entry] = []
        while True:
            self.wait()
            self._score(score)
            if entries and all(entry.value is None for entry in entries):
                raise LaunchError(
                    f"none of the last {len(entries)} runs has reached a result",
                    hint=f"look into {self.folder / entries[0].folder / LOG_FOLDER}; the same "
                    "command starts them again",
                )
            trials = self.trials()
            count = min(places, samples - len(trials))
            batch = propose(grid, trials, count, seed=spec.sampler_seed, samples=samples)
            if not batch:
                break
            points = [make_point(run) for labels in batch for run in with_seeds(grid, labels)]
            experiments = check_points(spec, points)
            entries = [entry_of(point) for point in points]
            self.manifest.runs += entries
            self._submit(entries, experiments)
        best = max(self.trials(), key=lambda t: -math.inf if t.value is None else t.value)
        return next(
            (e for e in self.manifest.runs if _labels(e) == best.labels and best.value is not None),
            None,
        )

    def give_up_waiting(self) -> None:
        """Cancels this program's jobs that have not started; those that have go on."""
        for job in self._jobs.values():
            if job.status() is JobStatus.PENDING:
                job.cancel()
        self._refresh()

    def trials(self) -> list[Trial]:
        """The configurations in the order they were asked for, with the mean over their seeds."""
        groups: dict[tuple[tuple[str, object], ...], list[Entry]] = {}
        for entry in self.manifest.runs:
            groups.setdefault(entry.point.configuration, []).append(entry)
        found = []
        for entries in groups.values():
            values = [entry.value for entry in entries if entry.value is not None]
            mean = sum(values) / len(values) if values else None
            found.append(Trial(_labels(entries[0]), mean))
        return found

    def _score(self, score: Score) -> None:
        for entry in self.manifest.runs:
            if entry.status == JobStatus.COMPLETED.value and entry.value is None:
                entry.value = score(self.folder / entry.folder)
        self._write()

    def _refresh(self) -> list[Entry]:
        changed = refresh(self.folder, self.manifest, jobs=self._jobs)
        if changed:
            self._write()
        for entry in changed:
            self.report(entry)
        return changed

    def _write(self) -> None:
        write_manifest(self.folder, self.manifest)

    def _submit(self, entries: Sequence[Entry], experiments: Mapping[str, Experiment]) -> None:
        # A misfit is found before anything is written.
        specs = {entry.name: self._spec(entry, experiments[entry.name]) for entry in entries}
        self._write()
        groups: dict[str, list[tuple[Entry, JobSpec]]] = {}
        for entry in entries:
            spec = specs[entry.name]
            if self.fresh or not spec.resume_command:
                _move_aside(spec.run_dir)
            text = dump_experiment(experiments[entry.name])
            write_text_atomic(spec.run_dir / SUBMITTED_FILE, text)
            # One array holds jobs of one size.
            groups.setdefault(repr((spec.resources, spec.components)), []).append((entry, spec))
        for group in groups.values():
            jobs = self.launcher.submit_array(
                [spec for _, spec in group], self.plan.spec.max_parallel
            )
            if len(jobs) != len(group):
                raise LaunchError(f"{len(group)} jobs were submitted, {len(jobs)} came back")
            for (entry, _), job in zip(group, jobs, strict=True):
                self._started(entry, job)
            self._write()

    def _spec(self, entry: Entry, experiment: Experiment) -> JobSpec:
        return self.make_spec(entry, experiment, (self.folder / entry.folder).absolute())

    def _started(self, entry: Entry, job: Job) -> None:
        self._jobs[entry.name] = job
        entry.launcher, entry.job_id = self.launcher_name, job.id
        entry.attempts += 1
        entry.value = None
        entry.status = job.status().value
        self.report(entry)


def _labels(entry: Entry) -> dict[str, object]:
    return dict(entry.point.configuration)


def _move_aside(run_dir: Path) -> None:
    """Renames the folder of a run that had started, so that a new one starts from nothing."""
    if not (run_dir / STARTED_FILE).is_file():
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.failed-{number}")).exists():
        number += 1
    run_dir.rename(aside)
