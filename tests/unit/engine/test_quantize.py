"""A proxy with 8-bit weights: its sketches, its memory, and what it cannot be used for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import image_samples, linear_bytes, save_llava, save_text_model, text_samples
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import ModelSpec, SketchConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.events import Event, PlanMade, RoundFinished
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.engine.quantize import quantise_linears
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.headroom import headroom

CPU = torch.device("cpu")
INT8 = "model_args.models.proxy8={path: models/small, quantization: int8}"


def both(folder: Path, dtype: Any = "float32") -> tuple[ModelBundle, ModelBundle]:
    spec = ModelSpec(path=str(folder), dtype=dtype)
    eight = replace(spec, quantization="int8")
    return load_model("proxy", spec, CPU), load_model("proxy", eight, CPU)


def assert_close(plain: torch.Tensor, eight: torch.Tensor) -> None:
    error = (plain - eight).norm() / plain.norm()
    # Rounding to 1/255 of a row's range: it must show, and must stay small.
    assert 1e-5 < error < 0.05
    assert torch.cosine_similarity(plain.flatten(), eight.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("jacobian", ["exact", "diagonal"])
def test_sketches_of_8_bits_are_close(tmp_path: Path, family: str, jacobian: Any) -> None:
    config = SketchConfig(noise="none", frequency=1, columns=8, jacobian=jacobian)
    batches = [text_samples(4), text_samples(3)]
    engines = [
        SketchEngine(bundle, config, 0) for bundle in both(save_text_model(tmp_path, family))
    ]
    plain, eight = (engine.compute(batches, client_id=0, round_idx=0) for engine in engines)
    assert_close(plain, eight)
    again = engines[1].compute(batches, client_id=0, round_idx=0)
    assert torch.equal(eight, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_images_are_close(tmp_path: Path, dtype: str) -> None:
    samples = image_samples(tmp_path, 4)
    plain, eight = (
        SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
        for bundle in both(save_llava(tmp_path / "model"), dtype)
    )
    assert eight.dtype == torch.float32
    assert_close(plain, eight)


def test_what_the_gradient_reads_keeps_its_precision(tmp_path: Path) -> None:
    plain, eight = both(save_llava(tmp_path))
    assert torch.equal(plain.last_down_proj.weight, eight.last_down_proj.weight)
    assert torch.equal(plain.final_norm.weight, eight.final_norm.weight)
    assert torch.equal(plain.lm_head, eight.lm_head)
    kept = [
        name
        for name, part in eight.model.named_modules()
        if isinstance(part, torch.nn.Linear) and type(part.weight) is torch.nn.Parameter
    ]
    assert [name.rpartition(".")[2] for name in kept] == ["down_proj", "lm_head"]
    assert not any(weight.requires_grad for weight in eight.model.parameters())
    assert plain.info == eight.info


def test_memory_of_the_linears_falls(tmp_path: Path) -> None:
    plain, eight = both(save_text_model(tmp_path, hidden=64, layers=4))
    last = plain.last_down_proj.weight.nbytes
    before, after = (linear_bytes(bundle.body) - last for bundle in (plain, eight))
    # A quarter, and a scale of 4 bytes and a zero point of 1 byte for every row of 64 or 128.
    assert before / 4 < after < before * (1 / 4 + 5 / (4 * 64) + 1e-9)


def test_a_body_without_linears_is_an_error() -> None:
    linear = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="model 'm': quantization int8 found no linear"):
        quantise_linears("m", linear, keep=[linear])


def test_importing_beside_torchao_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fedml_plugin_fedmosaic.engine, torchao.quantization"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "torch/utils/_pytree" not in done.stderr


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return config


def test_without_torchao_it_says_what_to_install(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    experiment = load_experiment(world, [INT8, "sketch.proxy=proxy8"])
    with pytest.raises(ConfigError, match="model 'proxy8' has quantization int8") as caught:
        prepare_run(experiment)
    assert caught.value.hint == "pip install 'fedml-plugin-fedmosaic[quantize]'"


def test_a_client_cannot_train_it(world: Path) -> None:
    experiment = load_experiment(world, ["model_args.models.large.quantization=int8"])
    with pytest.raises(ConfigError, match="'large' has quantization int8, but a client") as caught:
        prepare_run(experiment)
    assert "name that one in sketch_args.sketch.proxy" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="'large' has quantization int8, but a client"):
        headroom(experiment)


@pytest.mark.parametrize("sharded", ["ranks=2", "engine=deepspeed"])
def test_it_cannot_be_sharded(world: Path, sharded: str) -> None:
    with pytest.raises(ConfigError, match="quantization 'int8' is for the proxy") as caught:
        load_experiment(world, [INT8, f"model_args.models.proxy8.{sharded}"])
    assert "models.proxy8" in str(caught.value)


def test_a_run_with_a_proxy_of_8_bits(world: Path, tmp_path: Path) -> None:
    def execute(name: str, *overrides: str) -> tuple[Path, list[Event]]:
        events: list[Event] = []
        fast = ["evaluation.base=false", "evaluation.others=false"]
        experiment = load_experiment(world, [*fast, *overrides], algo="FedMosaic")
        prepare_run(experiment, tmp_path / name, [events.append]).execute()
        return tmp_path / name, events

    eight = (INT8, "sketch.proxy=proxy8")
    first, events = execute("first", *eight)
    assert sum(isinstance(event, RoundFinished) for event in events) == 2
    plans = [event for event in events if isinstance(event, PlanMade)]
    again, _ = execute("again", *eight)
    plain, _ = execute("plain", "sketch.proxy=small")
    assert len(plans) == 2
    tensors = [_saved(folder) for folder in (first, again, plain)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    # The proxy decides who helps whom: 8 bits must not go unnoticed, nor change much.
    similarity = next(key for key in tensors[0] if "simil" in key)
    assert not torch.equal(tensors[0][similarity], tensors[2][similarity])
    torch.testing.assert_close(
        tensors[0][similarity], tensors[2][similarity], rtol=0, atol=0.1, check_dtype=False
    )


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoints, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        f"{path.relative_to(folder)}:{name}": value
        for path in files
        for name, value in load_file(path).items()
    }
