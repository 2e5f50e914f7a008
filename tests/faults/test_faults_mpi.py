"""Clients that fail on one of two ranks: the same dropouts, plans and bits as in one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_fit import faulty_fit
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.store import CheckpointStore

PROGRAM = Path(__file__).with_name("faults_program.py")
SUPPORT = Path(__file__).parents[1] / "support"
TIME_LIMIT_S = 180

pytestmark = pytest.mark.mpi(2)


def start(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the program on two ranks; a job that hangs is killed."""
    beside = Path(sysconfig.get_path("scripts")) / "mpiexec"
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert command is not None
    version = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    flags = []
    if "Open MPI" in version.stdout:
        flags = ["--oversubscribe"]
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    job = subprocess.Popen(
        [command, *flags, "-np", "2", sys.executable, str(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        pytest.fail(f"the job hung for {TIME_LIMIT_S} s:\n{output}")
    return job.returncode, output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    code, output = start(str(folder))
    assert code == 0, output
    return folder


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["event"] == kind]
    unique = {json.dumps(record, sort_keys=True): record for record in found}
    return [unique[key] for key in sorted(unique)]


def dropped(folder: Path) -> list[tuple[int, int, str]]:
    found = records(folder, "ClientDropped")
    return sorted((r["round_idx"], r["client_id"], r["stage"]) for r in found)


@pytest.mark.parametrize("case", ["one", "rank", "everyone"])
def test_same_as_in_one_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    theirs = world / f"mpi-{case}"
    lost = {client: 0 for _, client, _ in dropped(theirs)}
    assert {"one": lost.keys() == {1}, "rank": 0 < len(lost) < 3, "everyone": len(lost) == 3}[case]
    kind = "memory" if case == "one" else "data"
    overrides = ("evaluation.base=false", "evaluation.others=false")
    experiment = load_experiment(
        world / "tiny.yaml", [*overrides, "faults.policy=drop", "faults.quorum=0.3"]
    )
    monkeypatch.setattr(TorchEngine, "fit", faulty_fit({(c, 0): kind for c in lost}))
    prepare_run(experiment, tmp_path / "sp").execute()
    assert dropped(theirs) == dropped(tmp_path / "sp")
    for event in ("PlanMade", "RoundSkipped"):
        assert records(theirs, event) == records(tmp_path / "sp", event)
    assert len(records(theirs, "RoundSkipped")) == (1 if case == "everyone" else 0)
    stores = [CheckpointStore(f / "checkpoints/fedmosaic", keep_last=9) for f in
              (theirs, tmp_path / "sp")]  # fmt: skip
    for round_idx in (0, 1):
        left, right = (store.load(round_idx) for store in stores)
        for client_id, state in left.clients.items():
            other = right.clients[client_id]
            assert state.participations == other.participations
            for key, tensor in state.adapter.items():
                assert torch.equal(tensor, other.adapter[key]), (round_idx, client_id, str(key))
            for key, tensor in left.downlinks[client_id].items():
                assert torch.equal(tensor, right.downlinks[client_id][key])


def test_with_policy_abort_the_job_ends_and_names_the_client(tmp_path: Path) -> None:
    write_world(tmp_path)
    code, output = start(str(tmp_path), "abort")
    assert code == 4, output
    assert "client 1, round 1, fit: MemoryError" in output
