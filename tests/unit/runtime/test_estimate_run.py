"""What a whole run asks for, without data, weights or a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.loader import bundled_config, load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.engine.estimate import SampleWork, forward_flops, training_flops
from fedml_plugin_fedmosaic.runtime.estimate import estimate_run

CONFIGS = bundled_config().parent
SMALL, LARGE = "thkim0305/llama3.2_1B_vl", "thkim0305/llama3.2_3B_vl"
EIGHT = "thkim0305/llama3.1_8B_vl"


@pytest.fixture(autouse=True)
def no_models_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def estimate(name: str = "drake/small.yaml", *overrides: str, **options: Any) -> Any:
    return estimate_run(load_experiment(CONFIGS / name, overrides), **options)


def test_published_models_are_estimated_without_data_and_weights() -> None:
    found = estimate()
    assert {name: model.num_clients for name, model in found.models.items()} == {SMALL: 4, LARGE: 6}
    assert found.steps == 94
    assert found.proxy == SMALL
    assert found.sketch == (819, 8192)
    assert found.models[SMALL].upload == 462_336 + 67_633_152
    assert found.models[SMALL].sample == SampleWork(tokens=160 + 2 * 576, images=2)
    # The proxy is the small clients' own model; a rank with a 3B client loads it beside theirs.
    assert found.models[SMALL].memory.proxy == 0
    assert found.models[LARGE].memory.proxy == 2 * found.models[SMALL].shape.parameters
    assert found.topology.size == 4


def test_the_models_of_all_clients_of_a_rank_stay_loaded() -> None:
    # Of four ranks each has a large client and at least one a small one beside.
    small, large = (estimate().models[name].memory for name in (SMALL, LARGE))
    mixed = large.total - large.proxy + small.base + small.adapter
    assert estimate().peak == mixed
    assert estimate(ranks=10).peak == large.total


def test_a_round_takes_the_work_of_its_longest_group() -> None:
    found = estimate(tflops=100.0)
    model = found.models[SMALL]
    work = training_flops(model.shape, model.size, model.sample, checkpointing=False)
    sketches = 10 * 4 * forward_flops(model.shape, model.sample)
    assert model.round_s == pytest.approx((94 * 4 * work + sketches) / 100e12)
    times = {
        group.index: sum(found.models[SMALL if c in (0, 1, 8, 9) else LARGE].round_s
                         for c in group.clients)
        for group in found.topology.groups
    }  # fmt: skip
    assert len(times) == 4
    assert found.round_s == pytest.approx(max(times.values()))
    assert found.hours == pytest.approx(20 * found.round_s / 3600)
    assert found.gpu_hours == pytest.approx(4 * found.hours)
    assert estimate(tflops=200.0).round_s == pytest.approx(found.round_s / 2)
    assert estimate(ranks=1).round_s > 3 * estimate(ranks=4).round_s


def test_longer_samples_take_more_memory_and_time() -> None:
    short, long = (estimate(sample_tokens=count).models[LARGE] for count in (700, 1400))
    assert (short.sample.images, long.sample.images) == (1, 2)
    assert long.memory.activations > 1.7 * short.memory.activations
    assert 1.7 * short.round_s < long.round_s
    assert long.scoring_s > short.scoring_s


def test_a_sharded_client_follows_the_deepspeed_file() -> None:
    found = estimate("drake/large_cross_family.yaml").models[EIGHT]
    assert found.memory == found.variants["ZeRO-3"]
    assert found.variant_ranks == 4
    offload = estimate(
        "drake/large_cross_family.yaml",
        f"engine_args.deepspeed={CONFIGS / 'deepspeed/zero3_offload.json'}",
    ).models[EIGHT]
    assert offload.memory == offload.variants["ZeRO-3 offload"]
    assert offload.memory.host > 4e9
    second = estimate(
        "drake/large_cross_family.yaml",
        f"engine_args.deepspeed={CONFIGS / 'deepspeed/zero2.json'}",
    ).models[EIGHT]
    assert second.memory.total == second.variants["ZeRO-2"].total
    totals = [found.variants[f"ZeRO-{stage}"].total for stage in (1, 2, 3)]
    assert sorted(totals, reverse=True) == totals
    assert totals[0] < found.variants["plain"].total


def test_a_strategy_without_sketches_loads_no_proxy() -> None:
    exp = load_experiment(CONFIGS / "drake/small.yaml", algo="fedavg")
    found = estimate_run(exp)
    assert (found.proxy, found.sketch, found.steps) == (None, None, 100)
    model = found.models[LARGE]
    assert model.memory.proxy == 0
    assert (model.size.pq, model.size.trainable) == (0, 194_510_848)


def test_checkpointing_trades_time_for_memory() -> None:
    plain, repeated = (
        estimate("drake/small.yaml", f"engine_args.gradient_checkpointing={flag}").models[LARGE]
        for flag in ("false", "true")
    )
    assert repeated.memory.activations < plain.memory.activations / 3
    assert repeated.checkpointed == plain.checkpointed == repeated.memory.activations
    assert 1.2 * plain.round_s < repeated.round_s < 1.6 * plain.round_s


def test_a_client_alone_with_its_model_sends_p_and_q_only(tmp_path: Path) -> None:
    tasks = [{"dataset": "Any", "subset_id": 0}]
    clients = [
        {"client_id": number, "model_id": name, "datasets": tasks}
        for number, name in enumerate((SMALL, SMALL, LARGE))
    ]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(clients))
    found = estimate("drake/small.yaml", f"data.scenario={path}")
    assert found.models[LARGE].upload == 462_336
    assert found.models[SMALL].upload > 462_336


def test_unknown_widths_and_scenarios_are_errors(tmp_path: Path) -> None:
    config = write_world(tmp_path)
    text = config.read_text().replace("models/large", "some/large")
    config.write_text(text)
    with pytest.raises(ConfigError, match=r"'large': the widths of some/large are not known"):
        estimate_run(load_experiment(config))
    with pytest.raises(DataError, match="scenario 'none': no such file"):
        estimate("drake/small.yaml", "data.scenario=none")


def test_the_command_prints_the_estimate_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--estimate", "--cf", str(CONFIGS / "drake/small.yaml")]
    result = CliRunner().invoke(cli, [*arguments, "--gpu-tflops", "300"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for text in (
        f"estimate {SMALL}",
        "68,095,600 (P and Q 462,336, layer-wise 67,633,152, gate 112); frozen 22,544,384",
        "819 x 8192 of thkim0305/llama3.2_1B_vl: 26.84 MB (13.42 in bfloat16)",
        "ZeRO-3 offload",
        "with gradient_checkpointing",
        "94 steps on 4 GPU(s) at 300 TFLOP/s each",
        "GPU hours",
    ):
        assert text in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_ends_with_the_estimate(tmp_path: Path) -> None:
    config = write_world(tmp_path)
    result = CliRunner().invoke(cli, ["run", "--dry-run", "--cf", str(config)])
    assert result.exit_code == 0, result.output
    assert "estimate small" in result.stdout
    assert "P and Q" in result.stdout
    assert "GPU" not in result.stdout  # it trains on a processor
