"""Whole runs on 1, 2, 3 and 4 ranks leave the same adapters and the same metrics as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.runtime.federation import prepare_run

PROGRAM = Path(__file__).with_name("runs_program.py")
SIZES = (1, 2, 3, 4)
pytestmark = [pytest.mark.mpi(4), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients of two models, two of them drawn per round; on 4 ranks one rank is idle."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_world(folder)
    text = config.read_text().replace("comm_round: 2", "comm_round: 3, client_num_per_round: 2")
    config.write_text(text.replace("every: 0", "every: 1"))
    prepare_run(load_experiment(config), folder / "sp").execute()
    done = subprocess.run(
        ["mpiexec", "-n", "4", sys.executable, PROGRAM, config, folder, *map(str, SIZES)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={
            **os.environ,
            # The same as in this process: the number of threads may change a product's last bits.
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics(run_dir: Path) -> list[str]:
    """Events without what differs from start to start, in an order that ranks do not decide."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    kept = [
        {
            key: value
            for key, value in record.items()
            if key not in ("time", "run_dir") and not key.endswith("_s")
        }
        for record in records
    ]
    return sorted(json.dumps(record, sort_keys=True) for record in kept)


@pytest.mark.parametrize("size", SIZES)
def test_the_same_adapters_bit_for_bit(runs: Path, size: int) -> None:
    reference = {path.name: path for path in (runs / "sp/checkpoints").rglob("*.safetensors")}
    found = {
        path.name: path for path in (runs / f"ranks-{size}/checkpoints").rglob("*.safetensors")
    }
    assert sorted(found) == sorted(reference)
    assert sum(name.startswith("client-") for name in found) >= 3
    for name, path in reference.items():
        expected, tensors = load_file(path), load_file(found[name])
        assert sorted(tensors) == sorted(expected)
        for key, tensor in expected.items():
            assert tensors[key].dtype == tensor.dtype
            same = tensors[key].numpy().tobytes() == tensor.numpy().tobytes()
            assert same, f"{name}: {key} differs"


@pytest.mark.parametrize("size", SIZES)
def test_the_same_metrics(runs: Path, size: int) -> None:
    assert metrics(runs / f"ranks-{size}") == metrics(runs / "sp")


def test_the_run_folder_says_who_trained_whom(runs: Path) -> None:
    groups = {
        size: json.loads((runs / f"ranks-{size}/topology.json").read_text())["groups"]
        for size in SIZES
    }
    # Client 1 has the large model; the two others share the second rank.
    assert [group["clients"] for group in groups[2]] == [[1], [0, 2]]
    assert [group["ranks"] for group in groups[3]] == [[0], [1], [2]]
    assert groups[4][3]["clients"] == []
    assert not list(runs.glob("ranks-*/*.err"))
