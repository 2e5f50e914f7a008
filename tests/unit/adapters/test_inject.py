from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_models import NUM_LAYERS, build, config, inputs, scramble

from fedml_plugin_fedmosaic.adapters.lora import inject_lora
from fedml_plugin_fedmosaic.adapters.pq_lora import PQLoraLayer, inject_pq_lora
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part, View

L, G, S = Branch.LOCAL, Branch.GLOBAL, Branch.SHARED
KINDS = ["llama", "qwen2", "llava"]


def test_the_shelf_leads_here() -> None:
    assert ADAPTERS["pq_lora"] is inject_pq_lora
    assert ADAPTERS["lora"] is inject_lora


@pytest.mark.parametrize("kind", KINDS)
def test_block_ends_carry_pq_and_others_two_branches(kind: str) -> None:
    handle = inject_pq_lora(build(kind), config(), NUM_LAYERS, seed=0)
    keys = handle.keys()
    assert list(keys) == sorted(keys)
    assert len({key.module for key in keys}) == 7
    by_layer = {layer: {k for k in keys if k.layer == layer} for layer in range(NUM_LAYERS)}
    pq = {(S, Part.A), (S, Part.B), (S, Part.GATE)}
    pq |= {(side, part) for side in (L, G) for part in (Part.P, Part.Q)}
    conventional = {(S, Part.GATE)} | {(s, p) for s in (L, G) for p in (Part.A, Part.B)}
    for layer, layer_keys in by_layer.items():
        parts = {(key.branch, key.part) for key in layer_keys}
        # 5 layers in 2 blocks: 0 1 | 2 3 4.
        assert parts == (pq if layer in (1, 4) else conventional)
        assert {key.block for key in layer_keys} == {0 if layer < 2 else 1}


def test_only_the_text_tower_is_touched() -> None:
    # The vision tower is as deep as the text tower and has linears of the same names.
    handle = inject_pq_lora(build("llava"), config(), NUM_LAYERS, seed=0)
    names = [n for n, m in handle.model.named_modules() if isinstance(m, PQLoraLayer)]
    assert len(names) == 7 * NUM_LAYERS
    assert all("language_model" in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["scalar", "input"])
def test_a_fresh_adapter_changes_nothing(kind: str, gate: str) -> None:
    model, batch = build(kind), inputs(kind)
    before = model(**batch).logits
    handle = inject_pq_lora(model, config(gate=gate), NUM_LAYERS, seed=0)
    for view in (View.LOCAL, View.GLOBAL, View.GATED, View.BASE):
        handle.set_view(view)
        assert torch.equal(handle.model(**batch).logits, before)


def test_initial_values() -> None:
    state = inject_pq_lora(build(), config(), NUM_LAYERS, seed=0).collect()
    eye = torch.eye(4)
    for key, tensor in state.items():
        if key.branch is S and key.part is Part.A:
            torch.testing.assert_close(tensor @ tensor.T, eye, atol=1e-6, rtol=0)
        elif key.branch is S and key.part is Part.B:
            torch.testing.assert_close(tensor.T @ tensor, eye, atol=1e-6, rtol=0)
        elif key.part is Part.A:
            twin = AdapterKey(key.block, key.layer, key.module, G, Part.A)
            assert torch.equal(tensor, state[twin])
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
        else:
            assert not tensor.any()
        if key.part is Part.GATE:
            assert tensor.shape == ()


def test_seeds_decide_a_and_b_and_global_generators_are_left_alone() -> None:
    def state(kind: str, seed: int, inject: Any = inject_pq_lora) -> dict[AdapterKey, torch.Tensor]:
        torch.manual_seed(seed + 100)
        before = torch.get_rng_state()
        collected = inject(build(kind), config(), NUM_LAYERS, seed=seed).collect()
        assert torch.equal(torch.get_rng_state(), before)
        return collected  # type: ignore[no-any-return]

    for inject in (inject_pq_lora, inject_lora):
        first, again = state("llama", 0, inject), state("llama", 0, inject)
        other, family = state("llama", 1, inject), state("qwen2", 0, inject)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert all(torch.equal(first[key], family[key]) for key in first)
        drawn = [key for key in first if first[key].any()]
        assert drawn
        assert not any(torch.equal(first[key], other[key]) for key in drawn)


def test_depth_does_not_change_a_and_b_of_equal_blocks() -> None:
    shallow = inject_pq_lora(build(layers=4), config(), 4, seed=0).collect()
    deep = inject_pq_lora(build(layers=6), config(), 6, seed=0).collect()

    def factors(state: Any) -> dict[Any, torch.Tensor]:
        return {
            (key.block, key.module, key.part): tensor
            for key, tensor in state.items()
            if key.branch is S and key.part is not Part.GATE
        }

    first, second = factors(shallow), factors(deep)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("inject", [inject_pq_lora, inject_lora])
def test_collect_and_load_are_inverse(inject: Any) -> None:
    handle = inject(build(), config(), NUM_LAYERS, seed=0)
    initial = handle.collect()
    scramble(handle, frozen=True)
    changed = handle.collect()
    assert all(tensor.dtype is torch.float32 for tensor in changed.values())
    assert not all(torch.equal(initial[key], changed[key]) for key in initial)
    handle.load(initial)
    assert all(torch.equal(initial[key], tensor) for key, tensor in handle.collect().items())
    changed[next(iter(changed))].zero_()
    assert all(torch.equal(initial[key], tensor) for key, tensor in handle.collect().items())


@pytest.mark.parametrize("inject", [inject_pq_lora, inject_lora])
def test_load_lists_every_problem_and_changes_nothing(inject: Any) -> None:
    handle = inject(build(), config(), NUM_LAYERS, seed=0)
    before = handle.collect()
    wrong = {key: tensor + 1 for key, tensor in before.items()}
    missing, reshaped = min(wrong), max(wrong)
    del wrong[missing]
    wrong[reshaped] = torch.zeros(1, 2, 3)
    unexpected = AdapterKey(0, 77, "q_proj", L, Part.A)
    wrong[unexpected] = torch.zeros(2)
    with pytest.raises(AdapterError) as caught:
        handle.load(wrong)
    message = str(caught.value)
    assert f"missing {missing}" in message
    assert f"unexpected {unexpected}" in message
    assert f"{reshaped}: expected shape" in message
    assert "got (1, 2, 3)" in message
    assert all(torch.equal(before[key], tensor) for key, tensor in handle.collect().items())


@pytest.mark.parametrize("branches", [{L}, {G}, {L, S}, {S}, set(), {L, G, S}])
def test_gradients_go_where_they_are_asked(branches: set[Branch]) -> None:
    handle = inject_pq_lora(build(), config(), NUM_LAYERS, seed=0)
    scramble(handle)
    handle.set_trainable(branches)
    allowed = {
        key
        for key in handle.parameters()
        if key.branch in branches and (key.branch is not S or key.part is Part.GATE)
    }
    assert {key for key, p in handle.parameters().items() if p.requires_grad} == allowed
    groups = handle.param_groups()
    assert set(groups) == {"ab", "pq"}
    assert len(groups["ab"]) == sum(key.part in (Part.A, Part.B) for key in allowed)
    assert len(groups["pq"]) == len(allowed) - len(groups["ab"])
    if not allowed:
        return
    handle.model(**inputs()).logits.square().mean().backward()
    with_gradient = {
        key
        for key, parameter in handle.parameters().items()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert with_gradient == allowed
    assert not any(
        parameter.requires_grad
        for name, parameter in handle.model.named_parameters()
        if "pq_lora_" not in name
    )


def test_views_use_their_branches_only() -> None:
    handle = inject_pq_lora(build(), config(), NUM_LAYERS, seed=0)
    plain = handle.model(**inputs()).logits
    scramble(handle)
    state = handle.collect()
    logits = {}
    for view in (View.LOCAL, View.GLOBAL, View.GATED, View.BASE):
        handle.set_view(view)
        logits[view] = handle.model(**inputs()).logits
    assert torch.equal(logits[View.BASE], plain)
    swap = {L: G, G: L, S: S}
    handle.load(
        {
            key: state[AdapterKey(key.block, key.layer, key.module, swap[key.branch], key.part)]
            for key in state
        }
    )
    handle.set_view(View.LOCAL)
    torch.testing.assert_close(handle.model(**inputs()).logits, logits[View.GLOBAL])
    assert not torch.allclose(logits[View.LOCAL], logits[View.GLOBAL])
    assert not torch.allclose(logits[View.GATED], logits[View.GLOBAL])


def test_alignment_replaces_the_random_factors() -> None:
    first = inject_pq_lora(build(), config(), NUM_LAYERS, seed=0).collect()
    shared = {k: v for k, v in first.items() if k.branch is S and k.part is not Part.GATE}
    alignment = {f"{k.block}/{k.module}/{k.part}": v + 1 for k, v in shared.items()}
    aligned = inject_pq_lora(build(), config(), NUM_LAYERS, seed=0, alignment=alignment).collect()
    for key, tensor in aligned.items():
        assert torch.equal(tensor, first[key] + 1 if key in shared else first[key])


def test_alignment_must_fit() -> None:
    shapes = {"0/q_proj/A": torch.zeros(3, 32), "9/q_proj/A": torch.zeros(4, 32)}
    model = build()
    with pytest.raises(AdapterError) as caught:
        inject_pq_lora(model, config(), NUM_LAYERS, seed=0, alignment=shapes)
    message = str(caught.value)
    assert "missing 0/down_proj/A" in message
    assert "unexpected 9/q_proj/A" in message
    # 28 tensors are expected: 27 are missing, one is unexpected, one has another shape.
    assert "29 problem(s)" in message
    assert not any(isinstance(module, PQLoraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_blocks": 6}, ["5 decoder layers", "6 blocks", "num_blocks"]),
        ({"rank": 17}, ["layer 1, k_proj", "at most 16", "adapter.rank"]),
        ({"target_modules": ("q_proj", "nose_proj")}, ["nose_proj", "q_proj", "0 linears"]),
        ({"target_modules": ("self_attn",)}, ["not a linear"]),
        ({"target_modules": ()}, ["target_modules must name"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    changes: dict[str, Any], words: list[str]
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError) as caught:
        inject_pq_lora(model, config(**changes), NUM_LAYERS, seed=0)
    for word in words:
        assert word in str(caught.value)
    assert model.state_dict().keys() == before.keys()


def test_a_wrong_depth_is_refused() -> None:
    with pytest.raises(AdapterError, match="list of 9 decoder layers"):
        inject_pq_lora(build(), config(), 9, seed=0)


@pytest.mark.parametrize("inject", [inject_pq_lora, inject_lora])
def test_adapters_take_turns_on_a_model(inject: Any) -> None:
    model, batch = build(), inputs()
    before = model(**batch).logits
    handle = inject_pq_lora(model, config(gate="input"), NUM_LAYERS, seed=0)
    scramble(handle)
    with pytest.raises(AdapterError, match=r"unload\(\)"):
        inject(model, config(), NUM_LAYERS, seed=0)
    unloaded = handle.model.unload()
    assert unloaded is model
    assert torch.equal(model(**batch).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    again = inject(model, config(), NUM_LAYERS, seed=0)
    assert torch.equal(again.model(**batch).logits, before)
