"""The Slurm launcher against fakes of Slurm's commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import JobSpec, JobStatus, Resources, read_record
from fedml_plugin_fedmosaic.launch.slurm import SlurmLauncher, slurm_state

SACCT = "JobID|State|NodeList\n{id}|{state}|n1\n{id}.batch|{state}|n1\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def spec_of(tmp_path: Path, name: str = "a", **changes: object) -> JobSpec:
    spec = JobSpec(
        name=name,
        command=("python3", "-m", "x", "run"),
        run_dir=tmp_path / "runs" / name,
        resources=Resources(nodes=2, ntasks_per_node=2, time_min=90, mem_gib=1.5),
    )
    return dataclasses.replace(spec, **changes)


def say(run_dir: Path, state: str, incarnation: str) -> None:
    text = {"state": state, "incarnation": incarnation, "started": "", "updated": ""}
    (run_dir / "status.json").write_text(json.dumps(text))


def test_submits_the_script_and_remembers_the_job(tmp_path, slurm):
    job = SlurmLauncher().submit(spec_of(tmp_path))
    assert job.id == "100"
    assert read_record(job.run_dir).ids == ("100",)
    text = slurm.script()
    assert text == (job.run_dir / "job.sbatch").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=2", "--mem=1536M", "--time=01:30:00"):
        assert f"#SBATCH {line}\n" in text
    assert SlurmLauncher().attach(job.run_dir).id == "100"
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_chain_is_jobs_that_wait_for_each_other(tmp_path, slurm):
    job = SlurmLauncher().submit(spec_of(tmp_path, chain=3, requeue=False))
    calls = slurm.calls("sbatch")
    assert ["afterany" in call for call in calls] == [False, True, True]
    assert "--dependency=afterany:101" in calls[2]
    assert "FEDMOSAIC_CHAINED=1" in calls[2]
    assert read_record(job.run_dir).ids == ("100", "101", "102")
    job.cancel()
    assert slurm.calls("scancel") == ["scancel 102", "scancel 101", "scancel 100"]


def test_a_finished_chain_is_complete_while_its_rest_still_waits(tmp_path, slurm):
    job = SlurmLauncher().submit(spec_of(tmp_path, chain=2, requeue=False))
    slurm.say("squeue", "100|COMPLETED\n101|PENDING\n")
    assert job.status() is JobStatus.PENDING
    say(job.run_dir, "interrupted", "100.0")
    assert job.status() is JobStatus.PENDING
    say(job.run_dir, "finished", "100.0")
    assert job.status() is JobStatus.COMPLETED


def test_an_array_is_one_call_and_one_script(tmp_path, slurm):
    specs = [spec_of(tmp_path, name) for name in ("a", "b", "c")]
    jobs = SlurmLauncher().submit_array(specs, 2)
    assert [job.id for job in jobs] == ["100_0", "100_1", "100_2"]
    assert len(slurm.calls("sbatch")) == 1
    assert "#SBATCH --array=0-2%2\n" in slurm.script()
    slurm.say("squeue", "100_0|COMPLETED\n100_1|RUNNING\n100_2|PENDING\n")
    say(jobs[0].run_dir, "finished", "100_0.0")
    assert [job.status().value for job in jobs] == ["COMPLETED", "RUNNING", "PENDING"]


def test_jobs_of_an_array_need_equal_resources(tmp_path, slurm):
    other = dataclasses.replace(spec_of(tmp_path, "b"), resources=Resources(nodes=3))
    with pytest.raises(LaunchError, match="differ in more than"):
        SlurmLauncher().submit_array([spec_of(tmp_path), other], 2)
    with pytest.raises(LaunchError, match="chain"):
        SlurmLauncher().submit_array([spec_of(tmp_path, chain=2), spec_of(tmp_path, "b")], 2)
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sbatch: error: invalid partition specified: gpu\n", "sinfo"),
        ("sbatch: error: Batch job submission failed: Invalid account\n", "--account"),
        ("sbatch: error: Requested node configuration is not available\n", "--gpus-per-node"),
    ],
)
def test_a_refusal_says_what_sbatch_said_and_what_to_do(tmp_path, slurm, text, hint):
    slurm.say("refuse", text)
    with pytest.raises(LaunchError) as caught:
        SlurmLauncher().submit(spec_of(tmp_path))
    assert text.partition("error: ")[2].strip() in caught.value.message
    assert hint in str(caught.value.hint)


def test_without_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no sbatch on PATH"):
        SlurmLauncher().submit(spec_of(tmp_path))


@pytest.mark.parametrize(
    ("queue", "accounting", "expected"),
    [
        ("7|RUNNING\n", "", JobStatus.RUNNING),
        ("7|CONFIGURING\n", "", JobStatus.PENDING),
        ("7|COMPLETING\n", "", JobStatus.RUNNING),
        ("7|OUT_OF_MEMORY\n", "", JobStatus.FAILED),
        ("7|NODE_FAIL\n", "", JobStatus.NODE_FAIL),
        ("7+0|RUNNING\n7+1|PENDING\n", "", JobStatus.RUNNING),
        ("", "TIMEOUT", JobStatus.TIMEOUT),
        ("", "CANCELLED by 1000", JobStatus.CANCELLED),
        ("", "CANCELLED+", JobStatus.CANCELLED),
        ("", "", JobStatus.UNKNOWN),
        ("7|SOMETHING_NEW\n", "", JobStatus.UNKNOWN),
    ],
)
def test_states(slurm, queue, accounting, expected):
    slurm.say("squeue", queue)
    slurm.say("sacct", SACCT.format(id=7, state=accounting) if accounting else "")
    assert slurm_state("7") is expected


def test_the_components_of_a_heterogeneous_job_are_in_the_accounting(slurm):
    slurm.say("sacct", "JobID|State|NodeList\n8+0|COMPLETED|n1\n8+1|COMPLETED|n2\n")
    assert slurm_state("8") is JobStatus.COMPLETED


def test_a_cluster_that_is_down_is_an_error_not_a_status(tmp_path, slurm):
    job = SlurmLauncher().submit(spec_of(tmp_path))
    slurm.say("down", "slurm_load_jobs error: Unable to contact slurm controller\n")
    with pytest.raises(LaunchError, match="Unable to contact"):
        job.status()


@pytest.mark.parametrize(
    ("queue", "state", "incarnation", "expected"),
    [
        ("COMPLETED", "failed", "100.0", JobStatus.FAILED),
        ("COMPLETED", "running", "100.0", JobStatus.FAILED),
        ("FAILED", "finished", "100.1", JobStatus.COMPLETED),
        ("COMPLETED", "finished", "99.0", JobStatus.FAILED),
        ("TIMEOUT", "running", "100.0", JobStatus.TIMEOUT),
        ("RUNNING", "failed", "100.0", JobStatus.RUNNING),
    ],
)
def test_the_run_has_the_last_word(tmp_path, slurm, queue, state, incarnation, expected):
    job = SlurmLauncher().submit(spec_of(tmp_path))
    slurm.say("squeue", f"100|{queue}\n")
    say(job.run_dir, state, incarnation)
    assert job.status() is expected


def test_waiting_has_an_end(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr("fedml_plugin_fedmosaic.launch.slurm._POLL_S", 0.01)
    job = SlurmLauncher().submit(spec_of(tmp_path))
    slurm.say("squeue", "100|PENDING\n")
    with pytest.raises(LaunchError, match="PENDING after"):
        job.wait(timeout_s=0.05)
    slurm.say("squeue", "100|CANCELLED\n")
    assert job.wait(timeout_s=5) is JobStatus.CANCELLED


def test_logs_of_all_starts(tmp_path, slurm):
    job = SlurmLauncher().submit(spec_of(tmp_path))
    assert job.log_paths() == ()
    (job.run_dir / "logs" / "100.out").write_text("x")
    assert [path.name for path in job.log_paths()] == ["100.out"]
