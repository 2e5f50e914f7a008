"""Launchers local and debug, with real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.core.registry import LAUNCHERS
from fedml_plugin_fedmosaic.launch.base import JobSpec, JobStatus, Resources
from fedml_plugin_fedmosaic.launch.debug import DebugLauncher
from fedml_plugin_fedmosaic.launch.local import LocalLauncher

LONG_S = 60
SAY = (
    "import json, os, sys; json.dump({'state': sys.argv[2], 'started': '', 'updated': '', "
    "'incarnation': os.environ['FEDMOSAIC_INCARNATION']}, open(sys.argv[1] + '/status.json', 'w'))"
)


def spec_of(run_dir: Path, code: str, *arguments: str, **changes: object) -> JobSpec:
    values = {"command": (sys.executable, "-c", code, *arguments), "run_dir": run_dir}
    return JobSpec(name=run_dir.name, **{**values, **changes})


@pytest.mark.parametrize(
    ("code", "expected"), [("", JobStatus.COMPLETED), ("raise SystemExit(3)", JobStatus.FAILED)]
)
def test_the_exit_code_counts_where_nothing_is_said(tmp_path, code, expected):
    job = LocalLauncher().submit(spec_of(tmp_path / "a", code))
    assert job.wait(timeout_s=LONG_S) is expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("finished", JobStatus.COMPLETED),
        ("failed", JobStatus.FAILED),
        ("running", JobStatus.FAILED),
        ("interrupted", JobStatus.PREEMPTED),
    ],
)
def test_the_run_s_own_word_counts_also_for_others(tmp_path, state, expected):
    run_dir = tmp_path / "a"
    job = LocalLauncher().submit(spec_of(run_dir, SAY, str(run_dir), state))
    assert job.wait(timeout_s=LONG_S) is expected
    assert LocalLauncher().attach(run_dir).status() is expected


def test_output_environment_and_setup(tmp_path):
    job = LocalLauncher().submit(
        spec_of(
            tmp_path / "a",
            "import os; print(os.environ['A'], os.environ['B'])",
            setup=("export B=2",),
            environment={"A": "1"},
        )
    )
    assert job.wait(timeout_s=LONG_S) is JobStatus.COMPLETED
    (log,) = job.log_paths()
    assert log.read_text() == "1 2\n"


def test_a_failing_setup_fails_the_job(tmp_path):
    job = LocalLauncher().submit(spec_of(tmp_path / "a", "", setup=("false",)))
    assert job.wait(timeout_s=LONG_S) is JobStatus.FAILED


def test_cancel_ends_the_whole_process_group(tmp_path):
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        "print(child.pid, flush=True); child.wait()"
    )
    job = LocalLauncher().submit(spec_of(tmp_path / "a", code))
    end = time.monotonic() + LONG_S
    while not (job.log_paths() and job.log_paths()[0].read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    child = int(job.log_paths()[0].read_text())
    other = LocalLauncher().attach(job.run_dir)
    assert other.status() is JobStatus.RUNNING
    other.cancel()
    assert LocalLauncher().attach(job.run_dir).status() is JobStatus.CANCELLED
    assert job.status() is JobStatus.CANCELLED
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or " Z " in stat.read_text()


def test_an_array_keeps_to_its_places(tmp_path):
    busy = tmp_path / "busy"
    busy.mkdir()
    code = (
        "import os, sys, time; folder = sys.argv[1]; mine = os.path.join(folder, sys.argv[2]); "
        "open(mine, 'w').close(); count = len(os.listdir(folder)); time.sleep(0.3); "
        "os.unlink(mine); sys.exit(count > 2)"
    )
    specs = [spec_of(tmp_path / name, code, str(busy), name) for name in "abcd"]
    jobs = LocalLauncher().submit_array(specs, 2)
    assert {job.wait(timeout_s=LONG_S) for job in jobs} == {JobStatus.COMPLETED}


def test_a_job_that_waits_for_its_place_can_be_cancelled(tmp_path):
    slow = spec_of(tmp_path / "a", "import time; time.sleep(60)")
    first, second = LocalLauncher().submit_array([slow, spec_of(tmp_path / "b", "")], 1)
    assert second.status() is JobStatus.PENDING
    second.cancel()
    assert second.status() is JobStatus.CANCELLED
    while first.status() is JobStatus.PENDING:
        time.sleep(0.02)
    first.cancel()
    assert first.wait(timeout_s=LONG_S) is JobStatus.CANCELLED
    assert not second.log_paths()


def test_a_started_run_goes_on(tmp_path):
    run_dir = tmp_path / "a"
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    spec = spec_of(
        run_dir, "raise SystemExit(1)", resume_command=(sys.executable, "-c", "print('on')")
    )
    job = LocalLauncher().submit(spec)
    assert job.wait(timeout_s=LONG_S) is JobStatus.COMPLETED
    assert job.log_paths()[0].read_text() == "on\n"


def test_a_missing_program(tmp_path):
    with pytest.raises(LaunchError, match="cannot start"):
        LocalLauncher().submit(
            JobSpec(name="a", command=(str(tmp_path / "none"),), run_dir=tmp_path / "a")
        )


@pytest.mark.mpi(2)
def test_several_ranks(tmp_path):
    code = "from mpi4py import MPI; print('rank', MPI.COMM_WORLD.rank, 'of', MPI.COMM_WORLD.size)"
    job = LocalLauncher().submit(
        spec_of(tmp_path / "a", code, resources=Resources(ntasks_per_node=2))
    )
    assert job.wait(timeout_s=LONG_S) is JobStatus.COMPLETED, job.log_paths()[0].read_text()
    text = job.log_paths()[0].read_text()
    assert "rank 0 of 2" in text
    assert "rank 1 of 2" in text


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "job_module.py").write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.environ['FEDMOSAIC_INCARNATION'])\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "job_module"


@pytest.mark.parametrize(("code", "expected"), [(0, "COMPLETED"), (4, "FAILED")])
def test_debug_runs_in_this_process(tmp_path, module, capsys, code, expected):
    command = ("python", "-m", module, str(code))
    spec = JobSpec(name="a", command=command, run_dir=tmp_path / "a")
    job = DebugLauncher().submit(spec)
    assert job.status().value == expected
    assert capsys.readouterr().out == f"['{code}'] {os.getpid()}.0\n"
    assert "FEDMOSAIC_INCARNATION" not in os.environ
    assert DebugLauncher().attach(tmp_path / "a").id == str(os.getpid())


def test_debug_is_one_rank(tmp_path):
    spec = JobSpec(
        name="a",
        command=("python", "-m", "x"),
        run_dir=tmp_path,
        resources=Resources(ntasks=2),
    )
    with pytest.raises(LaunchError, match="one rank"):
        DebugLauncher().submit(spec)


def test_the_shelf():
    assert set(LAUNCHERS) == {"debug", "local", "slurm"}
    for name in LAUNCHERS:
        launcher = LAUNCHERS[name]()
        assert all(hasattr(launcher, verb) for verb in ("submit", "submit_array", "attach"))
