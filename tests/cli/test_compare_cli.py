"""Comparisons through the command: cells run, fail, are repaired, and the folder grows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli

SHORT = ("--set", "comm_round=1", "--set", "num_steps=1")


@pytest.fixture
def cf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_world(tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "world/tiny.yaml"


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def compare(cf: str, strategies: str, seeds: int, *more: str) -> Result:
    # The launcher "debug" runs the cells in this process.
    arguments = ["compare", "--cf", cf, "--strategies", strategies, "--seeds", str(seeds)]
    return invoke(*arguments, "--run-dir", "cmp", "--launcher", "debug", *SHORT, *more)


def test_a_comparison_is_repaired_and_grows(cf: str, tmp_path: Path) -> None:
    first = compare(cf, "local,fedmosaic", 1)
    assert first.exit_code == 0, first.output
    assert "2 cells started, 0 left as they are" in first.stdout
    own = json.loads((tmp_path / "cmp/results.json").read_text())["strategies"]["fedmosaic"]["self"]
    # The untouched models are scored by the first strategy's cells only.
    cells = tmp_path / "cmp/runs"
    scored = '"strategy": "base"'
    assert scored in (cells / "strategy=local,seed=1/metrics.jsonl").read_text()
    assert scored not in (cells / "strategy=fedmosaic,seed=1/metrics.jsonl").read_text()

    untouched = (cells / "strategy=local,seed=1/metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(cells / "strategy=fedmosaic,seed=1")
    second = compare(cf, "local,fedmosaic", 2)
    assert second.exit_code == 0, second.output
    assert "3 cells started, 1 left as they are" in second.stdout
    assert (cells / "strategy=local,seed=1/metrics.jsonl").stat().st_mtime_ns == untouched
    record = json.loads((tmp_path / "cmp/results.json").read_text())
    assert (record["seeds"], record["missing"]) == ([1, 2], [])
    assert set(record["strategies"]) == {"base", "local", "fedmosaic"}
    grown = record["strategies"]["fedmosaic"]["self"]
    assert set(grown["by_seed"]) == {"1", "2"}
    assert grown["by_seed"]["1"] == own["by_seed"]["1"]
    assert grown["minus_local"]["pairs"] == 2
    assert record["config"]["train_args"]["comm_round"] == 1
    for name in ("comparison.html", "results.md", "figures/scores.svg"):
        assert (tmp_path / "cmp" / name).stat().st_size > 100
    assert "fedmosaic compare --cf tiny.yaml" in (tmp_path / "cmp/results.md").read_text()

    # Neither do cells with other settings pass for those that are asked for.
    own_rate = compare(cf, "local,fedmosaic", 2, "--for", "fedmosaic", "learning_rate=0.5")
    assert own_rate.exit_code == 2
    assert "strategy=fedmosaic,seed=1" in own_rate.stderr

    # Another experiment does not mix with it.
    other = compare(cf, "local", 2, "--set", "learning_rate=0.5")
    assert other.exit_code == 2
    assert "learning_rate" in other.stderr


def test_a_cell_that_fails_is_named_and_the_others_are_shown(cf: str, tmp_path: Path) -> None:
    scenario = tmp_path / "world/data/scenarios/tiny.json"
    hidden = scenario.with_name("hidden.json")
    assert compare(cf, "local", 1).exit_code == 0
    scenario.rename(hidden)
    result = compare(cf, "local,fedavg", 1)
    assert result.exit_code == 6
    assert "FAILED: strategy=fedavg,seed=1: " in result.stderr
    assert "scenario 'tiny'" in result.stderr
    assert "Not finished: fedavg with seed 1" in result.stdout
    hidden.rename(scenario)
    assert compare(cf, "local,fedavg", 1).exit_code == 0


def test_what_cannot_be_compared_is_refused(cf: str, tmp_path: Path) -> None:
    assert compare(cf, ",", 1).exit_code == 2
    unknown = compare(cf, "local,fedavgs", 1)
    assert unknown.exit_code == 2
    assert "unknown strategy 'fedavgs'" in unknown.stderr
    dry = compare(cf, "all", 2, "--dry-run")
    assert dry.exit_code == 0
    assert "strategy=fedmosaic,seed=2" in dry.stdout
    assert not (tmp_path / "cmp").exists()


def test_one_strategy_gets_its_own_learning_rate(cf: str, tmp_path: Path) -> None:
    done = compare(cf, "local,fedavg", 1, "--for", "fedavg", "learning_rate=0.125")
    assert done.exit_code == 0, done.output
    dry = compare(
        cf, "local,fedavg,ditto", 1, "--for", "fedavg", "learning_rate=0.125", "--dry-run"
    )
    assert "missing  1 would start" in dry.stdout
    rates = {
        name: "learning_rate: 0.125"
        in (tmp_path / f"cmp/runs/strategy={name},seed=1/config.yaml").read_text()
        for name in ("local", "fedavg")
    }
    assert rates == {"local": False, "fedavg": True}
    text = (tmp_path / "cmp/results.md").read_text()
    assert "--for fedavg optim_args.optim.learning_rate=0.125" in text

    refused = compare(cf, "local,fedavg", 1, "--for", "fedavg", "num_steps=9")
    assert refused.exit_code == 2
    assert "num_steps must be the same for all strategies" in refused.stderr
    assert "Traceback" not in refused.stderr
