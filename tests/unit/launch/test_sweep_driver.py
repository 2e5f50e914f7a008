"""What a sweep starts, and what it never starts twice, with a launcher that only pretends."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.core.registry import LAUNCHERS
from fedml_plugin_fedmosaic.launch.base import (
    JobRecord,
    JobSpec,
    JobStatus,
    Resources,
    read_record,
    write_record,
)
from fedml_plugin_fedmosaic.launch.sweep import SweepDriver, open_sweep, refresh
from fedml_plugin_fedmosaic.launch.sweep_axes import make_space
from fedml_plugin_fedmosaic.launch.sweep_manifest import Entry, locked, read_manifest
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan, SweepSpec, make_plan
from fedml_plugin_fedmosaic.launch.sweep_tpe import Trial, propose

FATES: dict[str, JobStatus] = {}
"""Run folder's name -> status of its job."""


class PretendedJob:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.id = read_record(run_dir).ids[0]

    def status(self) -> JobStatus:
        return FATES.get(self.run_dir.name, JobStatus.COMPLETED)


class PretendedLauncher:
    arrays: list[list[JobSpec]]

    def __init__(self) -> None:
        self.arrays = []

    def submit_array(self, specs: Sequence[JobSpec], max_parallel: int) -> tuple[PretendedJob, ...]:
        self.arrays.append(list(specs))
        for number, spec in enumerate(specs):
            record = JobRecord(
                launcher="pretended",
                ids=(f"{len(self.arrays)}_{number}",),
                name=spec.name,
                submitted="",
                num_tasks=1,
            )
            write_record(spec.run_dir, record)
        return tuple(PretendedJob(spec.run_dir) for spec in specs)

    def attach(self, run_dir: Path) -> PretendedJob:
        return PretendedJob(run_dir)


@pytest.fixture(autouse=True)
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    FATES.clear()
    monkeypatch.setitem(LAUNCHERS._targets, "pretended", f"{__name__}:PretendedLauncher")


@pytest.fixture
def plan() -> SweepPlan:
    grid = {"strategy.temperature": [0.1, 0.5], "seed": [1, 2]}
    return make_plan(SweepSpec(grids=(grid,), max_parallel=3))


def make_spec(entry: Entry, experiment: Experiment, run_dir: Path) -> JobSpec:
    return JobSpec(name=entry.name, command=("run",), resume_command=("resume",), run_dir=run_dir)


def driver(folder: Path, plan: SweepPlan, **options: object) -> SweepDriver:
    return SweepDriver(
        folder=folder,
        plan=plan,
        launcher=PretendedLauncher(),
        launcher_name="pretended",
        make_spec=options.pop("make_spec", make_spec),
        report=lambda entry: None,
        poll_s=0.0,
        **options,
    )


def started(sweep: SweepDriver) -> list[list[str]]:
    return [[spec.name for spec in array] for array in sweep.launcher.arrays]


NAMES = [
    "temperature=0.1,seed=1",
    "temperature=0.1,seed=2",
    "temperature=0.5,seed=1",
    "temperature=0.5,seed=2",
]


def test_one_array_starts_everything_and_the_manifest_says_so(
    tmp_path: Path, plan: SweepPlan
) -> None:
    FATES[NAMES[3]] = JobStatus.PENDING
    sweep = driver(tmp_path, plan)
    sweep.start()
    assert started(sweep) == [NAMES]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["status"] for run in record["runs"]] == ["COMPLETED"] * 3 + ["PENDING"]
    assert record["runs"][1]["job_id"] == "1_1"
    assert record["runs"][1]["folder"] == f"runs/{NAMES[1]}"
    assert record["identity"]["grid"] == [{"temperature": [0.1, 0.5], "seed": [1, 2]}]
    submitted = tmp_path / "runs" / NAMES[1] / "submitted.yaml"
    assert load_experiment(submitted) == plan.experiments[NAMES[1]]


@pytest.mark.parametrize("fate", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"])
def test_the_same_command_starts_only_what_did_not_reach_its_end(
    tmp_path: Path, plan: SweepPlan, fate: str
) -> None:
    FATES.update({NAMES[0]: JobStatus.RUNNING, NAMES[2]: JobStatus(fate)})
    driver(tmp_path, plan).start()
    again = driver(tmp_path, plan)
    assert [entry.name for entry in again.start()] == [NAMES[2]]
    assert started(again) == [[NAMES[2]]]
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert [entry.attempts for entry in manifest.runs] == [1, 1, 2, 1]
    FATES.clear()
    assert driver(tmp_path, plan).start() == []


def test_a_run_that_nobody_knows_about_is_started_only_when_asked(
    tmp_path: Path, plan: SweepPlan
) -> None:
    FATES[NAMES[1]] = JobStatus.UNKNOWN
    driver(tmp_path, plan).start()
    assert driver(tmp_path, plan).start() == []
    asked = driver(tmp_path, plan).start(restart_unknown=True)
    assert [entry.name for entry in asked] == [NAMES[1]]


def test_a_command_that_died_before_it_wrote_the_manifest_submitted_all_the_same(
    tmp_path: Path, plan: SweepPlan
) -> None:
    FATES.update(dict.fromkeys(NAMES, JobStatus.RUNNING))
    driver(tmp_path, plan).start()
    (tmp_path / "sweep.json").unlink()
    again = driver(tmp_path, plan)
    assert again.start() == []
    assert {entry.job_id for entry in again.manifest.runs} == {"1_0", "1_1", "1_2", "1_3"}


def test_a_run_whose_folder_was_removed_is_missing(tmp_path: Path, plan: SweepPlan) -> None:
    driver(tmp_path, plan).start()
    (tmp_path / "runs" / NAMES[0]).rename(tmp_path / "elsewhere")
    assert [entry.name for entry in driver(tmp_path, plan).start()] == [NAMES[0]]


def test_jobs_of_different_size_go_into_arrays_of_their_own(
    tmp_path: Path, plan: SweepPlan
) -> None:
    def sized(entry: Entry, experiment: Experiment, run_dir: Path) -> JobSpec:
        size = 4 if entry.levels["temperature"] == 0.5 else 1
        return replace(make_spec(entry, experiment, run_dir), resources=Resources(ntasks=size))

    sweep = driver(tmp_path, plan, make_spec=sized)
    sweep.start()
    assert started(sweep) == [NAMES[:2], NAMES[2:]]


def test_a_fresh_start_moves_what_failed_aside(tmp_path: Path, plan: SweepPlan) -> None:
    FATES[NAMES[0]] = JobStatus.FAILED
    driver(tmp_path, plan).start()
    run_dir = tmp_path / "runs" / NAMES[0]
    (run_dir / "config.yaml").write_text("started")
    driver(tmp_path, plan).start()
    assert (run_dir / "config.yaml").is_file()
    driver(tmp_path, plan, fresh=True).start()
    assert not (run_dir / "config.yaml").exists()
    assert (tmp_path / "runs" / f"{NAMES[0]}.failed-1" / "config.yaml").is_file()


def test_what_cannot_be_resumed_always_starts_anew(tmp_path: Path, plan: SweepPlan) -> None:
    def once(entry: Entry, experiment: Experiment, run_dir: Path) -> JobSpec:
        return replace(make_spec(entry, experiment, run_dir), resume_command=())

    FATES[NAMES[0]] = JobStatus.FAILED
    driver(tmp_path, plan, make_spec=once).start()
    (tmp_path / "runs" / NAMES[0] / "config.yaml").write_text("started")
    driver(tmp_path, plan, make_spec=once).start()
    assert not (tmp_path / "runs" / NAMES[0] / "config.yaml").exists()


def test_when_submission_fails_nothing_counts_as_started(tmp_path: Path, plan: SweepPlan) -> None:
    sweep = driver(tmp_path, plan)

    def refuse(specs: Sequence[JobSpec], max_parallel: int) -> tuple[PretendedJob, ...]:
        raise LaunchError("no such partition")

    sweep.launcher.submit_array = refuse
    with pytest.raises(LaunchError):
        sweep.start()
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.counts() == {"MISSING": 4}
    assert len(driver(tmp_path, plan).start()) == 4


def test_who_only_looks_believes_the_command_that_waits(tmp_path: Path, plan: SweepPlan) -> None:
    FATES.update(dict.fromkeys(NAMES, JobStatus.PENDING))
    driver(tmp_path, plan).start()
    FATES.update(dict.fromkeys(NAMES, JobStatus.FAILED))
    with locked(tmp_path):
        manifest = open_sweep(tmp_path, plan)
        assert refresh(tmp_path, manifest) == []
    assert len(refresh(tmp_path, manifest)) == 4


def test_offline_only_the_runs_own_word_counts(tmp_path: Path, plan: SweepPlan) -> None:
    FATES.update(dict.fromkeys(NAMES, JobStatus.PENDING))
    driver(tmp_path, plan).start()
    states = {"running": "RUNNING", "finished": "COMPLETED", "failed": "FAILED"}
    for number, state in enumerate(states):
        said = {"state": state, "incarnation": f"1_{number}.0", "started": "", "updated": ""}
        (tmp_path / "runs" / NAMES[number] / "status.json").write_text(json.dumps(said))
    # A word of an older job is not this one's.
    stale = {"state": "failed", "incarnation": "0_3.0", "started": "", "updated": ""}
    (tmp_path / "runs" / NAMES[3] / "status.json").write_text(json.dumps(stale))
    manifest = open_sweep(tmp_path, plan)
    refresh(tmp_path, manifest, offline=True)
    assert [entry.status for entry in manifest.runs] == [*states.values(), "PENDING"]


TPE_GRID = {
    "learning_rate": "1e-5:1e-1:log",
    "optim.schedule": ["constant", "cosine"],
    "seed": [1, 2],
}


def rate(run_dir: Path) -> float:
    """A smooth objective with its best value at a learning rate of 1e-3."""
    experiment = load_experiment(run_dir / "submitted.yaml")
    best = -((math.log10(experiment.optim.learning_rate) + 3) ** 2)
    return best - (0.5 if experiment.optim.schedule == "cosine" else 0.0)


@pytest.fixture
def tpe_plan() -> SweepPlan:
    spec = SweepSpec(grids=(TPE_GRID,), sampler="tpe", samples=18, max_parallel=4)
    return make_plan(spec)


def test_tpe_asks_in_batches_and_comes_closer_to_the_best(
    tmp_path: Path, tpe_plan: SweepPlan
) -> None:
    sweep = driver(tmp_path, tpe_plan)
    best = sweep.optimise(rate)
    # Two configurations at a time, each with both seeds.
    assert [len(array) for array in sweep.launcher.arrays] == [4] * 9
    assert best is not None
    values = [trial.value for trial in sweep.trials()]
    assert len(values) == 18
    assert all(
        trial.labels["learning_rate"] == float(f"{trial.labels['learning_rate']:.6g}")
        for trial in sweep.trials()
    )
    assert rate(tmp_path / best.folder) == max(values)
    assert sum(values[9:]) / 9 > sum(values[:6]) / 6


def test_tpe_stops_when_a_whole_batch_fails(tmp_path: Path, tpe_plan: SweepPlan) -> None:
    sweep = driver(tmp_path, tpe_plan)
    with pytest.raises(LaunchError, match="none of the last 4 runs") as caught:
        sweep.optimise(lambda run_dir: None)
    assert "logs" in str(caught.value.hint)
    assert len(sweep.launcher.arrays) == 1


def test_tpe_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path, tpe_plan: SweepPlan) -> None:
    whole = driver(tmp_path / "whole", tpe_plan)
    whole.optimise(rate)
    cut = driver(tmp_path / "cut", tpe_plan)
    calls = 0

    def interrupted(run_dir: Path) -> float:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise KeyboardInterrupt
        return rate(run_dir)

    with pytest.raises(KeyboardInterrupt):
        cut.optimise(interrupted)
    again = driver(tmp_path / "cut", tpe_plan)
    assert 0 < len(again.manifest.runs) < 36
    again.optimise(rate)
    assert [e.name for e in again.manifest.runs] == [e.name for e in whole.manifest.runs]
    assert again.optimise(rate) is not None
    assert sum(len(array) for array in again.launcher.arrays) < 36


def test_tpe_counts_a_failed_configuration_and_starts_it_again_next_time(
    tmp_path: Path, tpe_plan: SweepPlan
) -> None:
    first = driver(tmp_path, tpe_plan)
    first.optimise(lambda run_dir: rate(run_dir))
    victim = first.manifest.runs[0]
    victim.status, victim.value = "FAILED", None
    first.manifest.runs[1].value = None
    first.manifest.runs[1].status = "FAILED"
    assert first.trials()[0].value is None
    first._write()
    FATES.update({first.manifest.runs[n].name: JobStatus.FAILED for n in (0, 1)})
    again = driver(tmp_path, tpe_plan)
    again.optimise(rate)
    assert started(again) == [[entry.name for entry in first.manifest.runs[:2]]]


def test_tpe_never_proposes_twice_and_stops_when_all_is_used_up() -> None:
    (grid,) = make_space([{"rank": [2, 4], "optim.schedule": ["constant", "cosine"]}])
    known = [
        Trial({"rank": 2, "schedule": "cosine"}, 0.3),
        Trial({"rank": 4, "schedule": "cosine"}, None),
    ]
    found = propose(grid, known, 5, seed=0, samples=9)
    assert sorted(labels["rank"] for labels in found) == [2, 4]
    assert {labels["schedule"] for labels in found} == {"constant"}


def test_without_optuna_tpe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    (grid,) = make_space([{"rank": [2, 4]}])
    with pytest.raises(LaunchError, match="needs optuna") as caught:
        propose(grid, [], 1, seed=0, samples=2)
    assert "[sweep]" in str(caught.value.hint)
