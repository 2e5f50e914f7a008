"""Base models with bitsandbytes' 8- and 4-bit weights, trained on the processor."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny_models import linear_bytes, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
    SketchConfig,
)
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import Pass
from fedml_plugin_fedmosaic.engine import quantize
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

CPU = torch.device("cpu")
KINDS = ("bnb_int8", "bnb_nf4")
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("packed"), hidden=64)


def load(folder, quantization):
    return load_model("tiny", ModelSpec(path=str(folder), quantization=quantization), CPU)


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_clients_train_float32_adapters_on_packed_weights(folder, kind):
    plain, bundle = load(folder, "none"), load(folder, kind)
    assert linear_bytes(bundle.body) < 0.4 * linear_bytes(plain.body)
    assert bundle.lm_head.dtype == torch.float32
    adapter = AdapterConfig(rank=2, alpha=4.0, num_blocks=2)
    optim = OptimConfig(learning_rate=1e-2, pq_learning_rate=1e-2, batch_size=4)
    engine = TorchEngine(bundle, adapter, "pq_lora", optim, EvalConfig(), 0)
    start = engine.initial_adapter()
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    samples = text_samples(4)
    branches = frozenset({Branch.LOCAL, Branch.SHARED})
    pass_ = Pass(name="local", view=View.GATED, train=branches, num_steps=10)
    result = engine.fit(pass_, start, [samples] * 10, seed=0)
    assert result.losses[-1] < 0.8 * result.losses[0]
    engine.close()


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_sketches_of_a_packed_proxy_are_close(folder, kind):
    samples = text_samples(4)
    exact = SketchEngine(load(folder, "none"), SketchConfig(), 0).gradient(samples)
    packed = SketchEngine(load(folder, kind), SketchConfig(), 0).gradient(samples)
    cosine = float(torch.cosine_similarity(exact.flatten(), packed.flatten(), 0))
    assert cosine > {"bnb_int8": 0.95, "bnb_nf4": 0.7}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_say_how_to_pack(monkeypatch, kind):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: object())
    spec = ModelSpec(path="somewhere", quantization=kind, dtype="bfloat16")
    options = quantize.packed_options("m", spec, torch.device("cpu"))
    config = options["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (kind == "bnb_int8", kind == "bnb_nf4")
    if kind == "bnb_nf4":
        assert config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantize.packed_options("m", ModelSpec(path="x"), torch.device("cpu")) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_without_bitsandbytes_the_extra_is_named_before_a_weight_is_read(monkeypatch, kind):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    spec = ModelSpec(path="somewhere", quantization=kind)
    for check in (
        lambda: quantize.check_quantised({"m": spec}, {"m"}),
        lambda: quantize.packed_options("m", spec, torch.device("cpu")),
    ):
        with pytest.raises(ConfigError, match="needs bitsandbytes") as raised:
            check()
        assert "fedml-plugin-fedmosaic[bitsandbytes]" in (raised.value.hint or "")


def test_sharded_models_are_not_packed():
    with pytest.raises(ValueError, match="whole on one rank"):
        ModelSpec(path="x", ranks=2, quantization="bnb_nf4")
