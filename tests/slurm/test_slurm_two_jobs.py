"""One federation over two jobs, by the script that the documentation shows."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.launch.status import read_status

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs/cluster.md"
WAIT_S = 240


def test_two_jobs_in_place_of_a_heterogeneous_one(cluster, monkeypatch):
    # The test cluster runs its jobs as root, which mpirun has to be told; jobs inherit these.
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.S)
    (cluster.folder / "two_jobs.sh").write_text(script)
    hold = ("--nodes=1", "--exclusive", "--time=10", "--output=large.out", "--wrap=sleep 600")
    large = cluster.command("sbatch", "--parsable", *hold).strip()
    run = ("-m", "fedml_plugin_fedmosaic", "run", "--backend", "MPI")
    command = (sys.executable, *run, "--cf", str(cluster.config), "--run-dir", "runs/two")
    small = cluster.command(
        *("sbatch", "--parsable", "--time=10", "two_jobs.sh", large, "2", *command)
    ).strip()
    for _ in range(WAIT_S):
        queued = cluster.command("squeue", "-h", "-o", "%A").split()
        if not {large, small} & {*queued}:
            break
        cluster.command("sleep", "1")
    log = (cluster.folder / f"two_jobs-{small}.out").read_text()
    run_dir = cluster.folder / "runs/two"
    said = read_status(run_dir)
    assert said is not None, log
    assert said.state == "finished", log
    assert json.loads((run_dir / "topology.json").read_text())["size"] == 4
    hosts = (cluster.folder / f"hosts-{small}").read_text().split("\n")
    assert [line.partition(" ")[2] for line in hosts] == ["slots=2", "slots=2", ""]
    assert hosts[0] != hosts[1]
