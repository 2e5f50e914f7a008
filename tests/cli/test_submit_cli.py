"""``submit``, ``jobs``, ``logs`` and ``cancel`` on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_slurm import FakeSlurm
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli

QUICK = ("--set", "comm_round=1", "--set", "device_args.num_threads=1")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    return fake


def test_options_change_the_launcher_s_section(tmp_path, slurm):
    done = call(
        *("submit", "--backend", "MPI", "--run-dir", str(tmp_path / "a")),
        *("--partition", "p", "--account", "a", "--qos", "q", "--constraint", "c"),
        *("--nodes", "2", "--time", "1-12:30", "--mem", "3.5G", "--cpus-per-task", "3"),
        *("--mpi", "pmi2", "--set", "launcher.signal_s=300", "--dry-run"),
    )
    assert done.exit_code == 0, done.output
    for option in (
        *("--partition=p", "--account=a", "--qos=q", "--constraint=c", "--nodes=2"),
        *("--ntasks-per-node=2", "--time=1-12:30:00", "--mem=3584M", "--cpus-per-task=3"),
        "--signal=B:USR1@300",
    ):
        assert f"#SBATCH {option}\n" in done.output
    assert "MPI=pmi2\n" in done.output
    assert not (tmp_path / "a").exists()
    assert slurm.calls() == []


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--time", "soon", "is not a time"),
        ("--time", "0", "zero"),
        ("--mem", "much", "is not an amount of memory"),
        ("--chain", "0", "not in the range"),
    ],
)
def test_bad_values(slurm, option, value, text):
    done = call("submit", option, value, "--dry-run")
    assert done.exit_code == 2
    assert text in done.output


def test_a_job_of_a_cluster(tmp_path, slurm):
    run_dir = tmp_path / "runs" / "a"
    done = call("submit", "--run-dir", str(run_dir), "--chain", "2", "--time", "90")
    assert done.exit_code == 0, done.output
    assert "job      100 (slurm)" in done.output
    assert len(slurm.calls("sbatch")) == 2
    assert {"job.json", "job.sbatch", "submitted.yaml", "logs"} == {
        path.name for path in run_dir.iterdir()
    }
    slurm.say("squeue", "100|RUNNING\n101|PENDING\n")
    assert "RUNNING" in call("jobs", "runs").output
    (run_dir / "logs" / "100.out").write_text("0: loading\n1: loading too\n12:00:01 start\nhalf")
    assert call("logs", str(run_dir)).output == "0: loading\n1: loading too\n12:00:01 start\n"
    assert call("logs", str(run_dir), "--rank", "1").output == "loading too\n"
    assert "told to end" in call("cancel", str(run_dir)).output
    assert slurm.calls("scancel") == ["scancel 101", "scancel 100"]
    again = call("submit", "--run-dir", str(run_dir))
    assert again.exit_code == 2
    assert "not an empty folder" in again.output


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize("launcher", ["slurm", "local", "debug"])
def test_going_on_with_a_run_is_not_submitted(tmp_path, slurm, launcher, dry_run):
    config = write_world(tmp_path)
    old = ("--set", "run.resume=runs/old")
    done = call("submit", "--cf", str(config), "--launcher", launcher, *old, *dry_run)
    assert done.exit_code == 2, done.output
    assert "run.resume: runs/old cannot be submitted" in done.output
    assert "fedmosaic run --resume runs/old" in " ".join(done.output.split())
    assert not (tmp_path / "runs").exists()
    assert slurm.calls() == []
    fresh = call("submit", "--cf", str(config), "--set", "run.resume=null", "--dry-run")
    assert fresh.exit_code == 0, fresh.output


def test_a_failed_run_is_shown_as_such(tmp_path, slurm):
    run_dir = tmp_path / "runs" / "a"
    call("submit", "--run-dir", str(run_dir))
    slurm.say("squeue", "100|COMPLETED\n")
    word = {"state": "failed", "incarnation": "100.0", "started": "", "updated": ""}
    (run_dir / "status.json").write_text(json.dumps({**word, "message": "no such data"}))
    output = call("jobs", "runs").output
    assert "FAILED" in output
    assert "no such data" in output
    followed = call("logs", str(run_dir), "--follow")
    assert followed.exit_code == 1
    assert "is over: FAILED" in call("cancel", str(run_dir)).output


def test_a_cluster_that_does_not_answer(tmp_path, slurm):
    call("submit", "--run-dir", str(tmp_path / "runs" / "a"))
    slurm.say("down", "Unable to contact slurm controller")
    listed = call("jobs", "runs")
    assert listed.exit_code == 0
    assert "UNKNOWN" in listed.output
    assert "Unable to contact" in listed.output


def test_scripts_come_with_the_package(tmp_path):
    done = call("submit", "--scripts", str(tmp_path))
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "slurm").iterdir()}
    assert {"quickstart_cpu.sh", "drake_large.sh"} <= names
    for path in (tmp_path / "slurm").iterdir():
        (config,) = re.findall(r"CONFIG:-(\S+)}", path.read_text())
        assert (tmp_path / config).is_file()


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, slurm):
    run_dir = tmp_path / "runs" / "a"
    call("submit", "--run-dir", str(run_dir))
    (run_dir / "logs" / "100.out").write_text("line\n" * 100_000)
    program = f"{sys.executable} -m fedml_plugin_fedmosaic logs {run_dir} | head -n 1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "line\n"
    assert "bug" not in done.stderr
    assert "Broken" not in done.stderr


def test_no_jobs(tmp_path):
    assert "no jobs below" in call("jobs", str(tmp_path)).output
    done = call("cancel", str(tmp_path))
    assert done.exit_code == 6
    assert "holds no job" in done.output


def test_a_whole_run_by_debug(tmp_path, monkeypatch):
    config = write_world(tmp_path, "FedAvg")
    monkeypatch.chdir(tmp_path)
    options = ("--cf", str(config), "--run-dir", "runs/a", "--launcher", "debug", *QUICK)
    done = call("submit", *options)
    assert done.exit_code == 0, done.output
    assert "COMPLETED" in done.output
    assert "finished" in call("jobs", "runs").output
    assert (tmp_path / "runs/a/summary.json").is_file()


def test_a_whole_run_by_local(tmp_path, monkeypatch):
    config = write_world(tmp_path, "FedAvg")
    monkeypatch.chdir(tmp_path)
    options = ("--cf", str(config), "--run-dir", "runs/a", "--launcher", "local", *QUICK)
    done = call("submit", *options)
    assert done.exit_code == 0, done.output
    followed = call("logs", "runs/a", "--follow")
    assert followed.exit_code == 0, followed.output
    assert "fedavg" in followed.output
