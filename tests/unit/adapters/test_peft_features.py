"""What PEFT promises of its methods, on real model classes with random weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import NUM_LAYERS, build, config, inputs, scramble
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from fedml_plugin_fedmosaic.adapters.pq_lora import PQLoraConfig, inject_pq_lora
from fedml_plugin_fedmosaic.adapters.pq_lora.model import pq_layers
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, Part, View

KINDS = ["llama", "qwen2", "llava"]
GATES = ["scalar", "input"]


@pytest.fixture(autouse=True)
def _peft_reads_a_renamed_attribute() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")
        yield


def injected(kind: str, gate: str = "scalar", *, dtype: Any = torch.float32, **changes: Any) -> Any:
    handle = inject_pq_lora(
        build(kind, dtype=dtype), config(gate=gate, **changes), NUM_LAYERS, seed=0
    )
    scramble(handle)
    return handle


def test_get_peft_model_finds_depth_and_linears_itself() -> None:
    model = get_peft_model(build("llava"), PQLoraConfig(r=4, num_blocks=2))
    assert len(pq_layers(model)) == 7 * NUM_LAYERS
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and "pq_lora_" in n
    )
    assert trainable > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
def test_saving_and_loading_is_exact(kind: str, gate: str, tmp_path: Path) -> None:
    handle, batch = injected(kind, gate), inputs(kind)
    saved = get_peft_model_state_dict(handle.model)
    assert len(saved) == len(handle.keys())
    assert sum(tensor.numel() for tensor in saved.values()) == sum(
        tensor.numel() for tensor in handle.collect().values()
    )
    handle.model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "PQ_LORA"
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), PQLoraConfig)
    again = PeftModel.from_pretrained(build(kind), str(tmp_path))
    for name, tensor in get_peft_model_state_dict(again).items():
        assert torch.equal(tensor, saved[name])
    assert torch.equal(again(**batch).logits, handle.model(**batch).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = PeftModel.from_pretrained(build(kind), str(tmp_path), is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in handle.model.named_parameters() if p.requires_grad
    }


def test_loading_without_memory_for_initial_values(tmp_path: Path) -> None:
    handle = injected("llama", "input", dtype=torch.bfloat16)
    handle.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        build("llama", dtype=torch.bfloat16), str(tmp_path), low_cpu_mem_usage=True
    )
    want = get_peft_model_state_dict(handle.model)
    for name, tensor in get_peft_model_state_dict(again).items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, want[name])


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_leave_the_base_model(kind: str) -> None:
    batch = inputs(kind)
    before = build(kind)(**batch).logits
    handle = injected(kind)
    handle.set_trainable({Branch.LOCAL})
    flags = {key: p.requires_grad for key, p in handle.parameters().items()}
    with handle.model.disable_adapter():
        assert torch.equal(handle.model(**batch).logits, before)
    assert not torch.allclose(handle.model(**batch).logits, before)
    assert {key: p.requires_grad for key, p in handle.parameters().items()} == flags


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", [view for view in View if view is not View.ENSEMBLE])
def test_merging_keeps_the_view(kind: str, view: View) -> None:
    handle, batch = injected(kind), inputs(kind)
    handle.set_view(view)
    want = handle.model(**batch).logits
    had_bias = kind != "llama"  # Qwen2 has biases on q, k, v
    merged = handle.model.merge_and_unload(safe_merge=True)
    assert type(merged).__name__.startswith(("Llama", "Qwen2", "Llava"))
    assert not pq_layers(merged)
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-4, atol=1e-4)
    layers = merged.get_decoder().layers
    # Q makes a bias where the base model has none, at block ends only.
    ends_have_bias = view is not View.BASE
    assert (layers[1].self_attn.o_proj.bias is not None) is ends_have_bias
    assert layers[0].self_attn.o_proj.bias is None
    assert (layers[0].self_attn.q_proj.bias is not None) is had_bias


def test_merging_can_be_undone() -> None:
    handle, batch = injected("llama"), inputs("llama")
    want = handle.model(**batch).logits
    linear = pq_layers(handle.model)[-1].get_base_layer()
    weight = linear.weight.clone()
    handle.model.merge_adapter()
    assert linear.bias is not None
    torch.testing.assert_close(handle.model(**batch).logits, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        handle.set_view(View.LOCAL)
    handle.model.unmerge_adapter()
    assert linear.bias is None
    torch.testing.assert_close(linear.weight, weight)
    torch.testing.assert_close(handle.model(**batch).logits, want, rtol=1e-4, atol=1e-4)


def test_an_input_gate_cannot_be_merged_but_its_branches_can() -> None:
    handle, batch = injected("llama", "input"), inputs()
    before = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}
    with pytest.raises(AdapterError, match="input gate"):
        handle.model.merge_and_unload()
    after = handle.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    handle.set_view(View.LOCAL)
    want = handle.model(**batch).logits
    merged = handle.model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, want, rtol=1e-4, atol=1e-4)


def test_broken_weights_are_not_merged() -> None:
    handle = injected("llama")
    for key, parameter in handle.parameters().items():
        if key.part is Part.Q:
            parameter.data.fill_(torch.inf)
    with pytest.raises(AdapterError, match="not finite"):
        handle.model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_base_dtypes(dtype: torch.dtype, gate: str) -> None:
    handle, batch = injected("llama", gate, dtype=dtype), inputs()
    exact = injected("llama", gate)
    assert all(p.dtype is torch.float32 for p in handle.parameters().values())
    logits = handle.model(**batch).logits
    assert logits.dtype is dtype
    scale = exact.model(**batch).logits.std()
    error = (logits.float() - exact.model(**batch).logits).std() / scale
    assert error < {torch.float32: 1e-6, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    logits.float().square().mean().backward()
    trained = [p for p in handle.parameters().values() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in trained)
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in trained)


@pytest.mark.parametrize("gate", GATES)
def test_autocast(gate: str) -> None:
    handle, batch = injected("llama", gate), inputs()
    want = handle.model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = handle.model(**batch).logits
        loss = logits.float().square().mean()
    loss.backward()
    assert (logits.float() - want).std() / want.std() < 0.1
    assert all(p.grad is not None for p in handle.parameters().values() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind: str, gate: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[Any, torch.Tensor]:
        handle, batch = injected(kind, gate), inputs(kind)
        model = handle.model
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        out = model(**batch, use_cache=False).logits
        (out * batch["attention_mask"][..., None]).square().mean().backward()
        return {k: p.grad for k, p in handle.parameters().items() if p.requires_grad}

    want, got = gradients(False), gradients(True)
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6)


def test_a_second_adapter_stays_apart() -> None:
    handle, batch = injected("llama"), inputs()
    want = handle.model(**batch).logits
    handle.model.add_adapter("other", PQLoraConfig(r=2, num_blocks=1, init_seed=5))
    assert torch.equal(handle.model(**batch).logits, want)
    handle.model.set_adapter("other")
    base = build("llama")(**batch).logits
    assert torch.equal(handle.model(**batch).logits, base)
    handle.model.set_adapter("default")
    handle.model.delete_adapter("other")
    assert torch.equal(handle.model(**batch).logits, want)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0, "gate": "soft", "lora_dropout": 1.0}, ["r must", "scalar, input", "[0, 1)"]),
        ({"lora_alpha": 0.0}, ["lora_alpha must be positive"]),
        ({"target_modules": []}, ["at least one linear"]),
        ({"num_layers": 3, "num_blocks": 4}, ["3 decoder layers"]),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(AdapterError) as caught:
        PQLoraConfig(**changes)
    assert all(word in str(caught.value) for word in words)
