"""What a run says about itself, who may say it, and how it joins with the scheduler's word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import (
    JobRecord,
    JobStatus,
    read_record,
    write_record,
)
from fedml_plugin_fedmosaic.launch.env import incarnation
from fedml_plugin_fedmosaic.launch.status import RunStatus, read_status, true_status
from fedml_plugin_fedmosaic.runtime.status import say_ended, say_running

S = JobStatus


def said(state: str, name: str = "7.0") -> RunStatus:
    return RunStatus(state=state, incarnation=name, started="", updated="")


@pytest.mark.parametrize(
    ("scheduler", "word", "expected"),
    [
        # while the scheduler has it, the scheduler knows
        (S.PENDING, said("interrupted"), S.PENDING),
        (S.RUNNING, said("running"), S.RUNNING),
        (S.RUNNING, None, S.RUNNING),
        # the end is the run's to tell
        (S.COMPLETED, said("finished"), S.COMPLETED),
        (S.UNKNOWN, said("finished"), S.COMPLETED),
        (S.COMPLETED, said("failed"), S.FAILED),
        (S.UNKNOWN, said("failed"), S.FAILED),
        (S.CANCELLED, said("failed"), S.FAILED),
        # it never said how it ended
        (S.COMPLETED, said("running"), S.FAILED),
        (S.UNKNOWN, said("running"), S.FAILED),
        (S.NODE_FAIL, said("running"), S.NODE_FAIL),
        (S.COMPLETED, None, S.FAILED),
        (S.CANCELLED, None, S.CANCELLED),
        (S.UNKNOWN, None, S.UNKNOWN),
        # stopped before its end
        (S.TIMEOUT, said("interrupted"), S.TIMEOUT),
        (S.CANCELLED, said("interrupted"), S.CANCELLED),
        (S.COMPLETED, said("interrupted"), S.PREEMPTED),
        # another job's word
        (S.COMPLETED, said("finished", "6.0"), S.FAILED),
        (S.UNKNOWN, said("finished", "6.0"), S.UNKNOWN),
        (S.UNKNOWN, said("finished", "7_1.0"), S.UNKNOWN),
    ],
)
def test_true_status(scheduler, word, expected):
    assert true_status(scheduler, word, ("7",)) is expected


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "finished"}', '{"other": 1}'])
def test_a_damaged_status_says_nothing(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FEDMOSAIC_INCARNATION": "x.3", "SLURM_JOB_ID": "7"}, "x.3"),
        ({"SLURM_JOB_ID": "7"}, "7.0"),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, "7.2"),
        (
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            "7_1.0",
        ),
    ],
)
def test_incarnations(variables, expected):
    assert incarnation(variables) == expected


def as_incarnation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FEDMOSAIC_INCARNATION", name)


def state(folder: Path) -> tuple[str, str, int | None]:
    raw = json.loads((folder / "status.json").read_text())
    return raw["state"], raw["incarnation"], raw["exit_code"]


def test_a_run_says_how_it_ended(tmp_path, monkeypatch):
    as_incarnation(monkeypatch, "7.0")
    say_running(tmp_path)
    assert state(tmp_path) == ("running", "7.0", None)
    for code, word in ((0, "finished"), (75, "interrupted"), (4, "failed")):
        assert say_ended(tmp_path, code, "why")
        assert state(tmp_path) == (word, "7.0", code)


def test_an_old_incarnation_is_silenced(tmp_path, monkeypatch):
    as_incarnation(monkeypatch, "7.1")
    say_running(tmp_path)
    as_incarnation(monkeypatch, "7.0")
    assert not say_ended(tmp_path, 0)
    assert state(tmp_path) == ("running", "7.1", None)


def test_a_newer_one_may_fail_before_it_starts(tmp_path, monkeypatch):
    as_incarnation(monkeypatch, "7.0")
    say_running(tmp_path)
    say_ended(tmp_path, 75)
    as_incarnation(monkeypatch, "7.1")
    assert say_ended(tmp_path, 2, "the folder with the data is gone")
    assert state(tmp_path) == ("failed", "7.1", 2)


def test_the_word_goes_forward_along_a_chain(tmp_path, monkeypatch):
    record = JobRecord(launcher="slurm", ids=("7", "8"), name="a", submitted="", num_tasks=1)
    write_record(tmp_path, record)
    as_incarnation(monkeypatch, "7.0")
    say_running(tmp_path)
    as_incarnation(monkeypatch, "8.0")
    assert say_ended(tmp_path, 1)
    as_incarnation(monkeypatch, "7.0")
    assert not say_ended(tmp_path, 0)
    as_incarnation(monkeypatch, "9.0")
    assert not say_ended(tmp_path, 0)
    assert state(tmp_path) == ("failed", "8.0", 1)


def test_another_run_s_folder_is_left_alone(tmp_path, monkeypatch):
    as_incarnation(monkeypatch, "7.0")
    (tmp_path / "results.txt").touch()
    assert not say_ended(tmp_path, 1)
    assert not say_ended(tmp_path / "nowhere", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["results.txt"]


def test_records(tmp_path):
    record = JobRecord(
        launcher="local", ids=("a", "b"), name="n", submitted="t", num_tasks=2, details={"k": "v"}
    )
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    with pytest.raises(LaunchError, match="'local', not 'slurm'"):
        read_record(tmp_path, "slurm")
    with pytest.raises(LaunchError, match="holds no job"):
        read_record(tmp_path / "other")
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(LaunchError, match="damaged"):
        read_record(tmp_path)
