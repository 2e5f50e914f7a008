"""Stopping and resuming in one process: every kind of place, and everything that is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lives import SETTINGS, assert_same_run, metrics

from fedml_plugin_fedmosaic.cli.run import run_command
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, RunInterrupted
from fedml_plugin_fedmosaic.runtime.federation import RunSummary, prepare_run
from fedml_plugin_fedmosaic.runtime.resume import resumed_experiment
from fedml_plugin_fedmosaic.runtime.signals import never
from fedml_plugin_fedmosaic.runtime.treefile import load_tree, save_tree

Asked = Callable[[], bool]


class StopAt:
    """Says yes from the n-th question on."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self.position


def begin(config: Path, run_dir: Path, should_stop: Asked = never, *more: str) -> None:
    prepared = prepare_run(load_experiment(config, [*SETTINGS, *more]), run_dir)
    prepared.should_stop = should_stop
    prepared.execute()


def resume(run_dir: Path, should_stop: Asked = never, from_round: int | None = None) -> RunSummary:
    prepared = prepare_run(resumed_experiment(run_dir), run_dir, resume=True, from_round=from_round)
    prepared.should_stop = should_stop
    return prepared.execute()


@pytest.fixture(scope="session")
def questions(config: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an uninterrupted run asks whether to stop."""
    counter = StopAt(10**9)
    begin(config, tmp_path_factory.mktemp("questions") / "run", counter)
    return counter.asked


def stopped(config: Path, run_dir: Path, position: int) -> None:
    with pytest.raises(RunInterrupted, match="everything is saved"):
        begin(config, run_dir, StopAt(position))


def test_a_run_stopped_again_and_again_ends_as_if_it_had_not_been(
    config: Path, reference: Path, tmp_path: Path, questions: int
) -> None:
    rng = random.Random(0)  # noqa: S311
    run_dir = tmp_path / "run"
    stopped(config, run_dir, rng.randrange(1, questions // 3))
    lives = 1
    while lives < 6:
        lives += 1
        try:
            resume(run_dir, StopAt(rng.randrange(1, questions // 3)))
        except RunInterrupted:
            continue
        break
    resume(run_dir)
    assert_same_run(run_dir, reference)
    noted = (run_dir / "resumes.jsonl").read_text().splitlines()
    assert len(noted) == lives - 1 + 1
    assert json.loads(noted[-1])["ranks"] == 1


def test_a_stop_inside_a_pass_saves_the_step(config: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # Question 1 to 6 belong to the base models' tasks, 7 to the first client.
    stopped(config, run_dir, 10)
    folder = run_dir / "checkpoints/local"
    assert [path.name for path in folder.iterdir()] == ["step-000-round-0001.safetensors"]
    resume(run_dir)
    assert_same_run(run_dir, reference)


def test_resuming_a_finished_run_changes_nothing(reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    before = (run_dir / "metrics.jsonl").read_bytes()
    summary = resume(run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    # Both times are those of the life that did the work.
    assert summary.duration_s >= summary.train_s > 0
    assert_same_run(run_dir, reference)


def test_fewer_checkpoints_cost_rounds_not_results(
    config: Path, reference: Path, tmp_path: Path, questions: int
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(RunInterrupted):
        begin(config, run_dir, StopAt(questions // 2), "run.save_every=3")
    resume(run_dir)
    assert metrics(run_dir) == metrics(reference)


@pytest.mark.parametrize("number", [2, 30])
def test_a_full_disk_ends_the_run_and_a_resumed_one_goes_on(
    config: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    run_dir = tmp_path / "run"
    fsync, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        # The first calls write config.yaml and its neighbours.
        if calls > 12 + number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left") as caught:
        begin(config, run_dir)
    assert "make room" in str(caught.value.hint)
    monkeypatch.undo()
    assert list(run_dir.rglob("*.tmp")) == []
    resume(run_dir)
    assert_same_run(run_dir, reference)


@pytest.fixture(scope="session")
def halfway(config: Path, questions: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("halfway") / "run"
    stopped(config, run_dir, questions * 4 // 5)
    assert len(list((run_dir / "checkpoints/fedmosaic").glob("round-*.json"))) == 2
    return run_dir


@pytest.fixture
def run_dir(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def refused(run_dir: Path, capsys: pytest.CaptureFixture[str], *overrides: str, code: int) -> str:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    assert run_command(resume=run_dir, overrides=overrides) == code
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.safetensors")} == before
    return capsys.readouterr().err


def test_another_configuration(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(run_dir, capsys, "adapter.rank=3", "optim.batch_size=1", code=2)
    assert "adapter_args.adapter.rank: the run has 2, asked for 3" in said
    assert "optim_args.optim.batch_size: the run has 2, asked for 1" in said
    assert run_command(resume=run_dir, algo="fedavg") == 2


def test_another_number_of_rounds(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(run_dir, capsys, "comm_round=8", code=2)
    assert "samples are shared out over all rounds" in said
    assert "cannot be taken back" in refused(run_dir, capsys, "comm_round=2", code=2)


def test_other_data(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "clients.json"
    clients = json.loads(path.read_text())
    clients[1]["num_examples"] = 7
    path.write_text(json.dumps(clients))
    said = refused(run_dir, capsys, code=7)
    assert "client 1: num_examples was 7, is 8" in said


def test_a_checkpoint_of_another_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run_dir / "checkpoints/fedmosaic").glob("round-*.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "experiment": "0" * 32}))
    assert "another configuration" in refused(run_dir, capsys, code=7)


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(resume=tmp_path) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert run_command(run_dir=tmp_path / "a", resume=tmp_path / "b") == 2
    assert "cannot be combined" in capsys.readouterr().err
    assert run_command(from_round=1) == 2


def test_a_torn_checkpoint_names_the_older_round_which_is_then_taken(
    run_dir: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints/fedmosaic"
    newest = max(folder.glob("server-round-*"))
    number = int(newest.stem.rpartition("-")[2])
    newest.write_bytes(newest.read_bytes()[:-3])
    assert run_command(resume=run_dir) == 7
    said = capsys.readouterr().err
    assert f"{newest.name} is damaged" in said
    assert f"--from-round {number - 1}" in said
    assert run_command(resume=run_dir, from_round=9) == 7
    assert "no such checkpoint" in capsys.readouterr().err
    assert run_command(resume=run_dir, from_round=number - 1) == 0
    (run_dir / "report.html").unlink()
    assert_same_run(run_dir, reference)


def test_a_torn_file_of_an_unfinished_round_can_be_left_out(
    run_dir: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints/fedmosaic"
    done = max(int(path.stem[6:]) for path in folder.glob("round-*.json"))
    torn = folder / f"client-{1:03d}-round-{done + 1:04d}.safetensors"
    stepped = list(folder.glob(f"step-*-round-{done + 1:04d}.safetensors"))
    if stepped:
        torn = stepped[0]
    torn.write_bytes(b"torn")
    assert run_command(resume=run_dir) == 7
    said = capsys.readouterr().err
    assert torn.name in said
    assert f"--from-round {done}" in said
    assert run_command(resume=run_dir, from_round=done) == 0
    assert_same_run(run_dir, reference)


def test_times_cover_all_lives(run_dir: Path) -> None:
    folder = run_dir / "checkpoints/fedmosaic"
    newest = max(folder.glob("server-*"))
    tree = load_tree(newest)
    assert tree["progress"]["duration_s"] >= tree["progress"]["train_s"] > 0
    tree["progress"] |= {"duration_s": 2000.0, "train_s": 1000.0}
    manifest_path = max(folder.glob("round-*.json"))
    manifest = json.loads(manifest_path.read_text())
    manifest["server"]["checksum"] = save_tree(newest, tree)
    manifest_path.write_text(json.dumps(manifest))
    summary = resume(run_dir)
    (done,) = (
        record
        for record in metrics(run_dir, times=True)
        if record["event"] == "RunFinished" and record["strategy"] == "fedmosaic"
    )
    assert 2000 < done["duration_s"] < 3000
    assert 1000 < done["train_s"] < 2000
    assert summary.duration_s > done["duration_s"]
    assert summary.train_s > done["train_s"]


def test_a_strategy_can_be_started_anew(run_dir: Path, reference: Path) -> None:
    resume(run_dir, from_round=0)
    assert_same_run(run_dir, reference)
