"""A sweep as a job array of a real Slurm cluster: one run fails, is repaired, and runs again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slurm

NAMES = [f"scenario={name},algo=local" for name in ("tiny", "other", "third", "late")]


def sweep(cluster) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "fedml_plugin_fedmosaic", "sweep"),
            *("--cf", str(cluster.config), "--dir", "sweep", "--max-parallel", "2", "--wait"),
            *("--grid", "data.scenario=tiny,other,third,late", "--grid", "algo=local"),
            *("--launcher", "slurm", "--mem", "1G", "--time", "10", "--set", "comm_round=1"),
        ],
        cwd=cluster.folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def entries(cluster) -> dict[str, dict[str, object]]:
    runs = json.loads((cluster.folder / "sweep/sweep.json").read_text())["runs"]
    return {run["name"]: run for run in runs}


@pytest.mark.timeout(900)
def test_an_array_with_a_failure_is_repaired_and_only_that_run_goes_again(cluster):
    scenarios = cluster.folder / "data/scenarios"
    for name in ("other", "third"):
        shutil.copy(scenarios / "tiny.json", scenarios / f"{name}.json")

    first = sweep(cluster)
    assert first.returncode == 6, first.stdout + first.stderr
    found = entries(cluster)
    assert list(found) == NAMES
    assert [run["status"] for run in found.values()] == ["COMPLETED"] * 3 + ["FAILED"]
    # One array: <array id>_<index>.
    ids = [str(run["job_id"]) for run in found.values()]
    assert [text.partition("_")[2] for text in ids] == ["0", "1", "2", "3"]
    assert len({text.partition("_")[0] for text in ids}) == 1
    assert f"FAILED: {NAMES[3]}" in first.stderr

    table = cluster.command(
        *(sys.executable, "-m", "fedml_plugin_fedmosaic", "collect", "sweep", "--offline")
    )
    assert "runs     3 completed, 1 failed" in table

    shutil.copy(scenarios / "tiny.json", scenarios / "late.json")
    second = sweep(cluster)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 runs started, 3 left as they are" in second.stdout
    again = entries(cluster)
    assert [run["status"] for run in again.values()] == ["COMPLETED"] * 4
    assert [run["attempts"] for run in again.values()] == [1, 1, 1, 2]
    assert [again[name]["job_id"] for name in NAMES[:3]] == ids[:3]
