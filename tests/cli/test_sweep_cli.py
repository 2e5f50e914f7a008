"""Sweeps through the command: real runs on this machine, a failure, its repair, and the table."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli


@pytest.fixture
def cf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    write_world(tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "world/tiny.yaml"


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def statuses(folder: Path) -> dict[str, tuple[str, int]]:
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    return {run["name"]: (run["status"], run["attempts"]) for run in runs}


def test_a_failed_run_is_repaired_and_only_it_runs_again(cf: str, tmp_path: Path) -> None:
    scenarios = tmp_path / "world/data/scenarios"
    for name in ("other", "third"):
        shutil.copy(scenarios / "tiny.json", scenarios / f"{name}.json")
    arguments = ["sweep", "--cf", cf, "--launcher", "local", "--max-parallel", "2"]
    arguments += ["--grid", "data.scenario=tiny,other,third,late", "--grid", "algo=local"]
    arguments += ["--set", "comm_round=1", "--set", "num_steps=1"]

    first = invoke(*arguments)
    folder = tmp_path / "runs/sweep-tiny"
    assert first.exit_code == 6, first.output
    names = [f"scenario={name},algo=local" for name in ("tiny", "other", "third", "late")]
    done = dict.fromkeys(names[:3], ("COMPLETED", 1))
    assert statuses(folder) == done | {names[3]: ("FAILED", 1)}
    assert f"FAILED: {names[3]}" in first.stderr
    log = folder / "runs" / names[3] / "logs/job.log"
    assert "scenario 'late'" in log.read_text()
    table = invoke("collect", str(folder))
    assert table.exit_code == 0
    assert f"Missing or failed: {names[3]};" in table.stdout
    assert "runs     3 completed, 1 failed" in table.stdout

    shutil.copy(scenarios / "tiny.json", scenarios / "late.json")
    untouched = (folder / "runs" / names[0] / "metrics.jsonl").stat().st_mtime_ns
    second = invoke(*arguments)
    assert second.exit_code == 0, second.output
    assert "1 runs started, 3 left as they are" in second.stdout
    assert statuses(folder) == done | {names[3]: ("COMPLETED", 2)}
    assert (folder / "runs" / names[0] / "metrics.jsonl").stat().st_mtime_ns == untouched
    third = invoke(*arguments)
    assert "0 runs started, 4 left as they are" in third.stdout
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [row["status"] for row in rows] == ["COMPLETED"] * 4
    # The four runs are one experiment under three names.
    assert len({row["self"] for row in rows}) == 1
    assert rows[0]["self"] != ""
    page = (folder / "sweep.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_dry_run_lists_and_writes_nothing(cf: str, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = invoke("sweep", "--cf", cf, "--grid", "seed=1,2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "runs     2, at most 8 at once" in result.stdout
    assert "seed=2" in result.stdout
    assert "MISSING" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "sead=1"], "unknown key 'sead'"),
        (["--grid", "rank=2,-1", "--grid", "seed=1,2"], "(run rank=-1,seed=1 and 1 more)"),
        (["--grid", "seed=1", "--grid", "seed=2"], "given twice"),
        ([], "varies nothing"),
        (["--grid", "seed=1", "--launcher", "slurmm"], "did you mean 'slurm'"),
        (["--grid", "seed=1", "--file", "x.yaml"], "does not go with --file"),
        (["--grid", "rank=1:8", "--sampler", "random"], "--samples"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    cf: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = invoke("sweep", "--cf", cf, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "runs/sweep-tiny/sweep.json").exists()


def test_a_dry_run_sees_that_a_run_was_removed(cf: str, tmp_path: Path) -> None:
    arguments = ["sweep", "--cf", cf, "--dir", "s", "--launcher", "debug", "--grid", "seed=1,2"]
    arguments += ["--set", "comm_round=1", "--set", "num_steps=1", "--set", "algo=local"]
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    before = (tmp_path / "s/sweep.json").read_bytes()
    shutil.rmtree(tmp_path / "s/runs/seed=2")
    dry = invoke(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "missing  1 would start" in dry.stdout
    assert [line.split() for line in dry.stdout.splitlines() if line.startswith("  seed=")] == [
        ["seed=1", "COMPLETED"],
        ["seed=2", "MISSING"],
    ]
    assert (tmp_path / "s/sweep.json").read_bytes() == before


def test_another_sweep_in_the_same_folder_is_refused(cf: str, tmp_path: Path) -> None:
    arguments = ["sweep", "--cf", cf, "--dir", "s", "--launcher", "debug"]
    arguments += ["--set", "comm_round=1", "--set", "num_steps=1", "--set", "algo=local"]
    first = invoke(*arguments, "--grid", "seed=1")
    assert first.exit_code == 0, first.output
    other = invoke(*arguments, "--grid", "seed=1,2")
    assert other.exit_code == 2
    assert "grid.seed: there [1], asked for [1, 2]" in other.stderr
    assert statuses(tmp_path / "s") == {"seed=1": ("COMPLETED", 1)}


def test_collect_needs_a_sweep(tmp_path: Path) -> None:
    result = invoke("collect", str(tmp_path))
    assert result.exit_code == 2
    assert "expected the folder of a sweep" in result.stderr
