"""TAP in whole runs: what is reported, and that an interrupted run ends the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lives import assert_same_run
from safetensors.torch import load_file
from tiny_world import write_world
from toy_federation import toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, RunInterrupted
from fedml_plugin_fedmosaic.core.types import ClientContext
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.replacements import replacements
from fedml_plugin_fedmosaic.runtime.export import export_client, served_model
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.resume import resumed_experiment
from fedml_plugin_fedmosaic.strategies.tap import Tap
from fedml_plugin_fedmosaic.strategies.tap_options import TapOptions

SETTINGS = ("client_num_per_round=2", "optim.num_steps=4", "evaluation.others=false")


class StopAt:
    """Says yes from the n-th question on."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self.position


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), algo="TAP")


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody interrupted, and how often it asked whether to stop."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    prepared = prepare_run(load_experiment(config, list(SETTINGS)), run_dir)
    prepared.should_stop = counter = StopAt(10**9)
    prepared.execute()
    return run_dir, counter.asked


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == kind]


def test_a_run_reports_passes_comparisons_and_views(whole: tuple[Path, int]) -> None:
    run_dir, _ = whole
    names = [event["pass_name"] for event in events(run_dir, "ClientTrained")]
    assert names.count("federated") == names.count("personal") == 4
    assert names.count("teacher") == names.count("student") == 3  # also who was never drawn
    reports = events(run_dir, "ClientReported")
    assert len(reports) == 4
    for event in reports:
        key = f"text:Pets{event['client_id']}-0"
        assert set(event["values"]) == {key, "shared"}
    views = {event["view"] for event in events(run_dir, "Evaluated") if event["strategy"] == "tap"}
    assert views == {"personal_post", "personal", "regular_ft", "regular"}
    section = replacements(load_run(run_dir))
    assert section is not None
    assert section.table is not None
    assert "shared" in [row[1] for row in section.table.rows]


def test_a_task_of_a_client_is_exported(whole: tuple[Path, int], tmp_path: Path) -> None:
    out = export_client(whole[0], 0, tmp_path / "lora")
    written = load_file(out / "adapter_model.safetensors")
    # Two branches of rank 2 are added: stacked, they are one LoRA of rank 4.
    assert {min(tensor.shape) for tensor in written.values()} == {4}
    strategy = Tap(TapOptions())
    manifest = toy_manifest(0, "S", "dual_lora")
    manifest = replace(manifest, tasks=("a-0", "b-0"))
    context = ClientContext(manifest=manifest, round_idx=0, num_rounds=1, num_steps=1, seed=0)
    state = strategy.client.init_state(toy_adapter("S", "dual_lora"), context)
    with pytest.raises(ConfigError, match="a model for each of its tasks: a-0, b-0"):
        served_model(strategy, state, manifest.tasks)
    chosen = served_model(strategy, state, manifest.tasks, "b-0")
    assert chosen.model.overlay == ("p.shared", "p.:b-0")


def test_an_interrupted_run_ends_as_if_it_had_not_been(
    config: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    reference, questions = whole
    run_dir = tmp_path / "run"
    prepared = prepare_run(load_experiment(config, list(SETTINGS)), run_dir)
    prepared.should_stop = StopAt(round(0.6 * questions))
    with pytest.raises(RunInterrupted):
        prepared.execute()
    prepare_run(resumed_experiment(run_dir), run_dir, resume=True).execute()
    assert_same_run(run_dir, reference)
