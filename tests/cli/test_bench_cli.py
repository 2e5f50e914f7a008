"""A benchmark of one's own through the command, its leaderboard, and its unseen tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli

BENCHMARK = """\
title: Tiny
strategies: [local, fedavg]
seeds: 1
configs:
  once: {cf: world/tiny.yaml, set: {comm_round: 1, num_steps: 1}}
  twice: {cf: world/tiny.yaml, set: {comm_round: 2, num_steps: 1}}
unseen: [unseen]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_world(tmp_path / "world")
    task = {"dataset": "New", "subset_id": 0, "type": "multi-choice"}
    unseen = [{"client_id": 0, "model_id": "small", "datasets": [task]}]
    (tmp_path / "world/data/scenarios/unseen.json").write_text(json.dumps(unseen))
    (tmp_path / "world/data/dataset/New").symlink_to("Pets1")
    (tmp_path / "tiny.yaml").write_text(BENCHMARK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def test_a_benchmark_ends_in_a_leaderboard(folder: Path) -> None:
    start = ("bench", "tiny.yaml", "--launcher", "debug", "--only", "once")
    result = invoke(*start, "--unseen")
    assert result.exit_code == 0, result.output
    assert "Tiny: once" in result.stdout
    assert "Tiny: twice" not in result.stdout
    out = folder / "runs/bench-tiny"
    record = json.loads((out / "results.json").read_text())
    assert set(record["mean_rank"]) == {"local", "fedavg"}
    names = "--strategies local,fedavg --seeds 1"
    assert record["command"] == f"fedmosaic bench tiny.yaml --only once {names} --unseen"
    once = record["experiments"]["once"]
    assert once["seeds"] == [1]
    assert set(once["unseen"]) == {"local", "fedavg"}
    assert set(once["unseen"]["fedavg"]["aggregated"]["updates"]) == {"0", "5", "10", "20", "50"}
    # From fresh adapters it does not matter whose they could have been.
    fresh = [once["unseen"][name]["fresh"] for name in ("local", "fedavg")]
    assert fresh[0] == fresh[1]
    assert "<h2>Leaderboard</h2>" in (out / "leaderboard.html").read_text()
    assert (out / "results.md").read_text().startswith("## Tiny\n")

    again = invoke(*start, "--unseen")
    assert "0 cells started, 2 left as they are" in again.stdout
    assert "unseen     local" not in again.stdout

    cell = out / "once/runs/strategy=fedavg,seed=1"
    adapted = invoke("adapt", str(cell), "--scenario", "unseen", "--updates", "0,1")
    assert adapted.exit_code == 0, adapted.output
    assert "New-0: aggregated" in adapted.stdout
    assert invoke("adapt", str(cell), "--scenario", "unseen", "--updates", "a").exit_code == 2


def test_benchmarks_are_listed_and_labels_checked(folder: Path) -> None:
    listed = invoke("bench", "--list")
    assert listed.exit_code == 0
    assert "quickstart" in listed.stdout
    wrong = invoke("bench", "tiny.yaml", "--only", "thrice")
    assert wrong.exit_code == 2
    assert "did you mean 'twice'" in wrong.stderr
    dry = invoke("bench", "tiny.yaml", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.count("strategy=fedavg,seed=1") == 2
    assert not (folder / "runs").exists()
