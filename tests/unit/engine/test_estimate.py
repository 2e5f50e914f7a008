"""Sizes, memory and work computed from widths, against published figures and real models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_models import build
from tiny_models import save_llava, save_text_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, ModelSpec, SketchConfig
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.engine.estimate import (
    AdapterSize,
    SampleWork,
    Zero,
    activation_bytes,
    adapter_size,
    forward_flops,
    rank_memory,
    reference_state,
    reference_trainable,
    sketch_shape,
    training_flops,
)
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.outline import outline_model
from fedml_plugin_fedmosaic.engine.shapes import (
    CONFIGURED,
    Linear,
    ModelShape,
    model_shape,
    published_names,
    published_shape,
)
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers

PAPER = AdapterConfig(rank=128, alpha=256, num_blocks=4, gate="input")
TEXT = AdapterConfig(rank=16, alpha=32, num_blocks=4, gate="input")
# model: parameters, block ends, conventional, gate, trainable, reported, plain, frozen, sketch rows
# and columns, whole state in bf16 megabytes at rank 128 and 16
TABLE: dict[str, tuple[Any, ...]] = {
    "llama3.2-1b": (1_235_814_400, (3, 7, 11, 15), 67_633_152, 327_680, 68_423_168, 70_137_856,
                    90_177_536, 22_544_384, 819, 8192, 369, 47),
    "llama3.2-3b": (3_212_749_824, (6, 13, 20, 27), 166_723_584, 745_472, 167_931_392, 171_450_880,
                    194_510_848, 27_787_264, 1228, 8192, 794, 100),
    "llama3.1-8b": (8_030_261_248, (7, 15, 23, 31), 293_601_280, 1_245_184, 295_308_800,
                    299_790_336, 335_544_320, 41_943_040, 1638, 14336, 1362, 173),
    "qwen2.5-0.5b": (494_032_768, (5, 11, 17, 23), 58_654_720, 245_760, 59_362_816, 61_920_256,
                     70_385_664, 11_730_944, 358, 4864, 294, 36),
    "qwen2.5-1.5b": (1_543_714_304, (6, 13, 20, 27), 126_615_552, 508_928, 127_586_816,
                     130_869_760, 147_718_144, 21_102_592, 614, 8960, 606, 76),
    "qwen2.5-3b": (3_085_938_688, (8, 17, 26, 35), 212_860_928, 838_656, 214_161_920, 218_699_264,
                   239_468_544, 26_607_616, 819, 11008, 978, 123),
}  # fmt: skip
# bf16 megabytes: conventional, sketch, P and Q + conventional + sketch, plain LoRA; at rank 16:
# conventional, all three, plain
MEGABYTES = {
    "llama3.2-1b": (135.3, 13.42, 149.6, 180.4, 16.9, 30.3, 22.5),
    "llama3.2-3b": (333.4, 20.12, 354.5, 389.0, 41.7, 61.8, 48.6),
    "llama3.1-8b": (587.2, 46.96, 635.1, 671.1, 73.4, 120.4, 83.9),
    "qwen2.5-0.5b": (117.3, 3.48, 121.7, 140.8, 14.7, 18.2, 17.6),
    "qwen2.5-1.5b": (253.2, 11.00, 265.2, 295.4, 31.7, 42.7, 36.9),
    "qwen2.5-3b": (425.7, 18.03, 444.7, 478.9, 53.2, 71.3, 59.9),
}


def shape_of(name: str) -> Any:
    shape = published_shape(name)
    assert shape is not None
    return shape


def test_the_table_has_every_published_model() -> None:
    assert set(TABLE) == set(MEGABYTES) == set(published_names())


@pytest.mark.parametrize("name", TABLE)
def test_parameters_of_published_models(name: str) -> None:
    shape, row = shape_of(name), TABLE[name]
    size = adapter_size(shape, PAPER, "pq_lora")
    assert shape.parameters == row[0]
    assert block_end_layers(shape.layers, 4) == row[1]
    assert (size.pq, size.conventional, size.gate) == (462_336, *row[2:4])
    assert size.trainable == row[4]
    assert reference_trainable(shape, PAPER) == row[5]
    assert adapter_size(shape, PAPER, "lora").trainable == row[6]
    assert size.frozen == row[7]
    assert sketch_shape(shape, SketchConfig()) == row[8:10]
    assert round(2 * reference_state(shape, PAPER) / 1e6) == row[10]
    assert round(2 * reference_state(shape, TEXT) / 1e6) == row[11]
    every = replace(PAPER, target_modules=("all-linear",))  # a Llama layer has just the seven
    assert reference_trainable(shape, every) == row[5]
    assert reference_state(shape, every) == reference_state(shape, PAPER)


@pytest.mark.parametrize("name", MEGABYTES)
def test_megabytes_of_published_models(name: str) -> None:
    shape, row = shape_of(name), MEGABYTES[name]
    rows, columns = sketch_shape(shape, SketchConfig())
    wide, narrow = (adapter_size(shape, config, "pq_lora") for config in (PAPER, TEXT))
    assert round(2 * wide.pq / 1e6, 3) == 0.925
    assert round(2 * narrow.pq / 1e6, 3) == 0.015
    found = (
        round(2 * wide.conventional / 1e6, 1),
        round(2 * rows * columns / 1e6, 2),
        round(2 * (wide.upload + rows * columns) / 1e6, 1),
        round(2 * adapter_size(shape, PAPER, "lora").upload / 1e6, 1),
        round(2 * narrow.conventional / 1e6, 1),
        round(2 * (narrow.upload + rows * columns) / 1e6, 1),
        round(2 * adapter_size(shape, TEXT, "lora").upload / 1e6, 1),
    )
    assert found == row


@pytest.mark.parametrize(
    ("path", "name", "has_vision"),
    [
        ("meta-llama/Llama-3.2-1B", "llama3.2-1b", False),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b", False),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", False),
        ("thkim0305/llama3.2_3B_vl", "llama3.2-3b", True),
        ("thkim0305/qwen2.5_1.5B_vl", "qwen2.5-1.5b", True),
    ],
)
def test_published_models_by_their_hub_id(path: str, name: str, has_vision: bool) -> None:
    shape, text = shape_of(path), shape_of(name)
    assert shape.linears == text.linears
    assert shape.image_tokens == (576 if has_vision else 0)
    # CLIP ViT-L/14-336 and the projector's two linears with their biases.
    projector = 1025 * text.hidden + (text.hidden + 1) * text.hidden
    vision = 303_507_456 + projector if has_vision else 0
    assert shape.parameters - text.parameters == shape.vision_parameters == vision


@pytest.mark.parametrize("path", ["owner/llama", "Qwen/Qwen2.5-7B", "a/llama3.2_1B_vlm", "b/x3B"])
def test_other_models_have_no_published_dimensions(path: str) -> None:
    assert published_shape(path) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava"])
@pytest.mark.parametrize("gate", ["scalar", "input"])
def test_sizes_are_those_of_an_injected_adapter(kind: str, gate: str, tmp_path: Any) -> None:
    folder = tmp_path / kind
    if kind == "llava":
        save_llava(folder, hidden=32, layers=5)
    else:
        save_text_model(folder, kind, hidden=32, layers=5)
    spec = ModelSpec(path=str(folder))
    shape = model_shape("m", spec)
    assert shape is not None
    assert shape.parameters == outline_model("m", spec).num_parameters
    config = AdapterConfig(rank=4, alpha=8, num_blocks=2, gate=gate)  # type: ignore[arg-type]
    bundle = load_model("m", spec, torch.device("cpu"))
    adapter = ADAPTERS["pq_lora"](bundle.model, config, 5, seed=0)
    adapter.set_trainable(frozenset({Branch.LOCAL, Branch.SHARED}))
    size = adapter_size(shape, config, "pq_lora")
    assert sum(tensor.numel() for tensor in adapter.collect().values()) == size.resident
    trained = sum(p.numel() for p in bundle.model.parameters() if p.requires_grad)
    assert trained == size.trainable
    if kind == "llava":
        # 16 pixels in patches of 8; beside the decoder and its head a tower and a projector.
        assert shape.image_tokens == 4
        outside = [
            parameter.numel()
            for name, parameter in bundle.model.named_parameters()
            if "vision_tower" in name or "projector" in name
        ]
        assert shape.vision_parameters == sum(outside)


def test_plain_lora_is_sized_as_injected() -> None:
    model = build("llama")
    adapter = ADAPTERS["lora"](model, AdapterConfig(rank=2, alpha=4), 5, seed=0)
    found = sum(tensor.numel() for tensor in adapter.collect().values())
    # q and o: 32 to 32; k and v: 32 to 16; gate and up: 32 to 48, down: 48 to 32
    assert found == 5 * 2 * (2 * 64 + 2 * 48 + 3 * 80)


def saved_bytes(config: AdapterConfig, kind: str, tokens: int, *, checkpointing: bool) -> int:
    """What autograd really keeps for a bfloat16 model with float32 adapters, logits apart."""
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(shape).to(torch.bfloat16).requires_grad_(False)
    adapter = ADAPTERS[kind](model, config, 4, seed=0)
    adapter.set_view(View.GATED if kind == "pq_lora" else View.LOCAL)
    adapter.set_trainable(frozenset({Branch.LOCAL, Branch.SHARED}))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.randint(0, 64, (1, tokens)), use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize("kind", ["pq_lora", "lora"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("num_blocks", [2, 4])
def test_activations_are_what_autograd_keeps(kind: str, dropout: float, num_blocks: int) -> None:
    widths = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 160)}
    widths |= {"up": (64, 160), "down": (160, 64)}
    shape = ModelShape(
        hidden=64, inner=160, attention=64, key_value=32, layers=4, vocab=0, parameters=0,
        vision_parameters=0, image_tokens=0, source=CONFIGURED,
        linears=tuple(
            Linear(layer=layer, module=f"{name}_proj", in_features=width[0], out_features=width[1])
            for layer in range(4) for name, width in widths.items()
        ),
    )  # fmt: skip
    config = AdapterConfig(rank=8, alpha=16, num_blocks=num_blocks, dropout=dropout)
    estimate = activation_bytes(
        shape, config, kind, tokens=128, base_bytes=2, adapter_bytes=4, checkpointing=False,
        mask_bytes=4,
    )  # fmt: skip
    assert estimate == pytest.approx(saved_bytes(config, kind, 128, checkpointing=False), rel=0.12)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    shape = shape_of("llama3.2-1b")
    kept = {
        flag: activation_bytes(
            shape, PAPER, "pq_lora", tokens=1000, base_bytes=2, adapter_bytes=4, checkpointing=flag
        )
        for flag in (False, True)
    }
    logits = 32 * 128256 * 10
    assert kept[True] > 1000 * 16 * 2 * 2048 + logits
    assert 4 < (kept[False] - logits) / (kept[True] - logits) < 16


SIZE = AdapterSize(pq=10, conventional=90, gate=0, frozen=20, branches=2)


def memory(stage: int, *, ranks: int = 4, offload: bool = False, live: int = 10**9) -> Any:
    zero = Zero(
        stage=stage,  # type: ignore[arg-type]
        ranks=ranks,
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
        live=live,
    )
    spec = ModelSpec(path="x", dtype="bfloat16", ranks=ranks)
    return rank_memory(shape_of("llama3.2-1b"), SIZE, spec, zero, activations=7)


def test_plain_training_keeps_adapters_and_moments_in_float32() -> None:
    found = memory(0, ranks=1)
    assert found.base == 2 * 1_235_814_400
    assert (found.adapter, found.gradients, found.optimizer) == (4 * 220, 400, 800)
    assert (found.gathered, found.host, found.activations) == (0, 0, 7)
    assert found.total == found.base + 4 * 220 + 400 + 800 + 7 + int(0.8 * 2**30)


def test_each_stage_of_zero_cuts_more() -> None:
    first, second, third = (memory(stage) for stage in (1, 2, 3))
    assert first.optimizer == second.optimizer == third.optimizer == 12 * 100 // 4
    assert (first.gradients, second.gradients, third.gradients) == (200, 50, 50)
    assert first.base == second.base == 2 * 1_235_814_400
    assert third.base == 2 * 1_235_814_400 // 4
    assert (third.adapter, first.adapter) == (110, 440)
    assert third.gathered == 2 * 10**9
    assert memory(3, live=1000).gathered == 2000


def test_offload_moves_what_is_cut_into_the_machines_memory() -> None:
    second, third = memory(2, offload=True), memory(3, offload=True)
    assert (second.optimizer, second.host) == (0, 300)
    assert second.base == 2 * 1_235_814_400
    assert third.base == third.adapter == third.optimizer == 0
    assert third.host == 300 + 2 * 1_235_814_400 // 4 + 110


def test_the_proxy_is_counted_where_it_is_loaded() -> None:
    proxy = (shape_of("qwen2.5-0.5b"), ModelSpec(path="p", dtype="bfloat16"))
    small = (proxy[0], ModelSpec(path="p", dtype="bfloat16", quantization="int8"))
    spec = ModelSpec(path="x", dtype="bfloat16")
    linears = proxy[0].decoder_parameters
    for beside, saved in ((proxy, 0), (small, linears)):
        found = rank_memory(proxy[0], SIZE, spec, Zero(), activations=0, proxy=beside)
        assert found.proxy == 2 * 494_032_768 - saved


def test_work_is_two_operations_per_weight_and_token() -> None:
    shape = shape_of("llama3.1-8b")
    text = SampleWork(tokens=64, images=0)
    body = 2 * 64 * 6_979_321_856  # its linears
    assert shape.decoder_parameters == 6_979_321_856
    attention = 2 * 32 * 4096 * 64**2
    head = 2 * 4096 * 128256 * 32
    assert forward_flops(shape, text) == body + attention + head
    size = adapter_size(shape, PAPER, "pq_lora")
    plain = training_flops(shape, size, text, checkpointing=False)
    assert training_flops(shape, size, text, checkpointing=True) > 1.45 * plain
    assert plain == pytest.approx(2 * forward_flops(shape, text), rel=0.2)
    seen = shape_of("thkim0305/llama3.1_8B_vl")
    more = training_flops(seen, size, SampleWork(tokens=64, images=2), checkpointing=False) - plain
    assert more == pytest.approx(2 * 2 * 576 * seen.vision_parameters)
