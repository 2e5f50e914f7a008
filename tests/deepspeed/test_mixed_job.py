"""A job of 2 + 1 + 1 ranks: one client sharded over two, two plain ones at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tiny_world import write_world
from torch import Tensor

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.treefile import load_tree

pytestmark = [pytest.mark.deepspeed, pytest.mark.mpi(4), pytest.mark.timeout(600)]

TIME_LIMIT_S = 480
ROUNDS = 3
TOLERANCE = 1e-4
FILES = Path(__file__).parents[2] / "configs/deepspeed"
LARGE = "large: {path: models/large"


def command(*arguments: str) -> list[str]:
    return [str(Path(sysconfig.get_path("scripts")) / "fedmosaic"), "run", *arguments]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same world in one process, and on four ranks with a sharded client 1."""
    folder = tmp_path_factory.mktemp("mixed")
    plain = write_world(folder)
    text = plain.read_text().replace("comm_round: 2", f"comm_round: {ROUNDS}")
    # The sketches are of the sharded model, which therefore is loaded once more on its leader.
    text = text.replace("sketch: {", "sketch: {proxy: large, ")
    plain.write_text(text)
    prepare_run(load_experiment(plain), folder / "one").execute()
    mixed = folder / "mixed.yaml"
    mixed.write_text(
        text.replace(LARGE, f"{LARGE}, ranks: 2")
        + f"engine_args: {{deepspeed: {json.dumps(str(FILES / 'zero3.json'))}}}\n"
    )
    done = subprocess.run(
        command("--cf", str(mixed), "--backend", "MPI", "-np", "4", "--run-dir", "four"),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIME_LIMIT_S,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def losses(run_dir: Path) -> dict[tuple[str, int, int], float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        (record["strategy"], record["round_idx"], record["client_id"]): record["mean_loss"]
        for record in records
        if "mean_loss" in record
    }


def test_the_same_loss_curves(runs: Path) -> None:
    expected, found = losses(runs / "one"), losses(runs / "four")
    assert len(expected) == 3 * ROUNDS
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=TOLERANCE), key


def tensors(tree: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint by their path in it."""
    if isinstance(tree, Tensor):
        return {path: tree}
    if not isinstance(tree, dict | list):
        return {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: value for name, part in items for key, value in tensors(part, f"{path}.{name}").items()
    }


def test_the_same_adapters(runs: Path) -> None:
    expected = {path.name: path for path in (runs / "one/checkpoints").rglob("*.safetensors")}
    found = {path.name: path for path in (runs / "four/checkpoints").rglob("*.safetensors")}
    assert sorted(found) == sorted(expected)
    compared = 0
    for name, path in expected.items():
        mine, theirs = tensors(load_tree(path)), tensors(load_tree(found[name]))
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            if tensor.is_floating_point():
                assert float((tensor - theirs[key]).abs().max()) < TOLERANCE, (name, key)
                compared += 1
    assert compared > 100


def test_the_run_ends_with_a_report_of_all_clients(runs: Path) -> None:
    clients = json.loads((runs / "four/clients.json").read_text())
    assert [client["model"] for client in clients] == ["small", "large", "small"]
    assert not list((runs / "four").glob("rank*.err"))
