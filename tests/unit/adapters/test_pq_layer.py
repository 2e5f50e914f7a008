"""The layer against the written-out formula and against reference arrays, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.adapters.pq_lora import PQLoraConfig, PQLoraLayer
from fedml_plugin_fedmosaic.adapters.pq_lora.context import ForwardContext
from fedml_plugin_fedmosaic.core.types import Branch, Part, View
from fedml_plugin_fedmosaic.equations.pq import gated, input_gate, pq_delta, scalar_gate

GOLDEN = Path(__file__).parents[2] / "golden"
L, G, S = Branch.LOCAL, Branch.GLOBAL, Branch.SHARED
CASES = [(gate, is_pq) for gate in ("scalar", "input") for is_pq in (True, False)]


def make(
    gate: str, is_pq: bool, *, base: nn.Linear | None = None, rank: int = 3, alpha: float = 6.0
) -> PQLoraLayer:
    linear = base or nn.Linear(8, 7, dtype=torch.float64)
    layer = PQLoraLayer(
        linear.requires_grad_(False),
        "default",
        PQLoraConfig(r=rank, lora_alpha=alpha, gate=gate),
        block=0,
        layer=0,
        module="q_proj",
        is_pq=is_pq,
        context=ForwardContext(),
    )
    generator = torch.Generator().manual_seed(4)
    for slot, parameter in layer.tensors("default").items():
        if slot not in {(S, Part.A), (S, Part.B)}:
            parameter.data = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    return layer


def formula(layer: PQLoraLayer, t: dict[Any, Tensor], x: Tensor, view: View, mask: Any) -> Tensor:
    """Written out branch by branch with the reference equations."""
    scaling = layer.scaling["default"]
    delta = {}
    for side in (L, G):
        if layer.is_pq["default"]:
            factors = (t[S, Part.A], t[S, Part.B], t[side, Part.P], t[side, Part.Q])
        else:
            factors = (t[side, Part.A], t[side, Part.B], None, None)  # type: ignore[assignment]
        delta[side] = pq_delta(x, *factors, scaling)
    base: Tensor = layer.base_layer(x)
    if view is View.BASE:
        return base
    if view is View.SUM:
        return base + delta[L] + delta[G]
    if view is not View.GATED:
        return base + delta[L if view is View.LOCAL else G]
    gate = t[S, Part.GATE]
    weight = scalar_gate(gate) if gate.ndim == 0 else input_gate(x, gate, mask)
    return gated(base, delta[G], delta[L], weight)


@pytest.mark.parametrize(("gate", "is_pq"), CASES)
@pytest.mark.parametrize("view", sorted(set(View) - {View.ENSEMBLE}))
@pytest.mark.parametrize("rows", ["3d", "2d", "masked"])
def test_outputs_and_gradients_follow_the_formula(
    gate: str, is_pq: bool, view: View, rows: str
) -> None:
    layer = make(gate, is_pq)
    layer.set_view(view)
    layer.set_trainable({L, G, S})
    generator = torch.Generator().manual_seed(5)
    shape = (6, 8) if rows == "2d" else (2, 5, 8)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = None
    if rows == "masked":
        mask = torch.ones(2, 5)
        mask[1, :2] = 0
        layer.context.begin(mask, None)
    got = layer(x)
    leaves = {
        slot: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for slot, tensor in layer.tensors("default").items()
    }
    twin = x.detach().clone().requires_grad_()
    want = formula(layer, leaves, twin, view, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if view is View.BASE and not twin.requires_grad:
        return
    probe = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-11, atol=1e-11)
    for slot, parameter in layer.tensors("default").items():
        expected = leaves[slot].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_pq", [True, False])
def test_the_sum_of_the_branches_is_one_change_of_the_weights(is_pq: bool) -> None:
    layer = make("input", is_pq)
    layer.set_view(View.SUM)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    weight, bias = layer.get_delta("default")
    want = layer.base_layer(x) + x @ weight.T + (0.0 if bias is None else bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    mixed = layer.mixed("default")
    assert mixed[Part.A].shape[0] == (3 if is_pq else 6)


def test_gradients_of_the_mix_pass_gradcheck() -> None:
    layer = make("input", True)
    layer.set_trainable({L, G, S})
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in layer.tensors("default").values() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_a_pq_layer_keeps_neither_its_input_nor_two_branches() -> None:
    for gate, allowed in (("scalar", 40 * 3 + 9), ("input", 40 * 3 + 2 * 8 + 8)):
        layer = make(gate, True)
        skip = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, skip: Any = skip, kept: Any = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in skip:
                kept[storage.data_ptr()] = storage.nbytes() // 8
            return tensor

        x = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x).sum()
        # z (tokens, r), the mixed P or the mean input, token weights, and a few scalars.
        assert sum(kept.values()) <= allowed + 2 * 20 + 16
        assert 2 * 20 * 8 not in kept.values()


def test_dropout_uses_one_mask_for_both_branches() -> None:
    base = nn.Linear(64, 16, bias=False, dtype=torch.float64)
    layer = PQLoraLayer(
        base,
        "default",
        PQLoraConfig(r=4, lora_alpha=4, lora_dropout=0.5),
        block=0,
        layer=0,
        module="q_proj",
        is_pq=False,
        context=ForwardContext(),
    ).train()
    tensors = layer.tensors("default")
    factor = torch.randn(16, 4, dtype=torch.float64)
    tensors[L, Part.B].data, tensors[G, Part.B].data = factor, -factor
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    # Equal A and opposite B cancel only under one mask.
    torch.testing.assert_close(layer(x), base(x))
    tensors[G, Part.B].data = factor
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = layer(x)
    assert not torch.allclose(noisy, layer.eval()(x))


def test_noise_is_off_by_default_and_only_in_training() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    layer = make("input", True).train()
    assert torch.equal(layer(x), layer(x))
    layer.gate_noise["default"] = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_gate_noise_has_the_spread_of_an_average_over_tokens() -> None:
    layer = make("input", True).train()
    layer.gate_noise["default"] = True
    layer.tensors("default")[S, Part.GATE].data.zero_()
    x = torch.zeros(4000, 9, 8, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = torch.logit(layer._gate("default", x).detach())
    assert float(logits.std()) == pytest.approx(np.log(2) / 3, rel=0.05)


# Reference arrays of the released code: its lora1 is the global branch, its lora2 the local one.
ARRAYS = np.load(GOLDEN / "pq_layer.npz", allow_pickle=False)
DUAL = np.load(GOLDEN / "dual_layers.npz", allow_pickle=False)
SIDES = {"lora1": G, "lora2": L}


def array(name: str, source: Any = ARRAYS) -> Tensor:
    return torch.from_numpy(source[name]).clone()


def golden_layer(gate: str, kind: str, shared: str | None = None) -> PQLoraLayer:
    rank, alpha = (int(value) for value in ARRAYS["meta_r_alpha"])
    base = nn.Linear(24, 20, dtype=torch.float64)
    base.weight.data = array("param/base_layer.weight")
    base.bias.data = array("param/base_layer.bias")
    layer = make("input", kind == "pq", base=base, rank=rank, alpha=alpha)
    for (side, part), parameter in layer.tensors("default").items():
        if part is Part.GATE:
            parameter.data = array("param/lora_w_gate.default")[:, 0] * (gate == "gateR")
            continue
        number = shared or next(number for number, of in SIDES.items() if of is side)
        suffix = ".default.weight" if part in (Part.A, Part.B) else ".default"
        if part in (Part.P, Part.Q):
            number = next(number for number, of in SIDES.items() if of is side)
        parameter.data = array(f"param/{number}_{part}{suffix}").reshape(parameter.shape)
    layer.set_trainable({L, G, S})
    return layer


@pytest.mark.parametrize("kind", ["pq", "conv"])
@pytest.mark.parametrize("gate", ["gate0", "gateR"])
@pytest.mark.parametrize("state", ["lora1", "lora2", "gate"])
def test_reference_arrays(kind: str, gate: str, state: str) -> None:
    if kind == "pq" and state == "gate":
        # The arrays give each branch A and B of its own; ours share them. The gate itself is equal.
        weight = golden_layer(gate, kind, "lora2")._gate("default", array("x"))
        torch.testing.assert_close(weight[:, 0], array(f"{gate}/gate_eval"), rtol=0, atol=1e-12)
        return
    layer = golden_layer(gate, kind, state if kind == "pq" else None)
    layer.set_view(View.GATED if state == "gate" else View(SIDES[state].value))
    prefix = f"{gate}/{kind}/{state}"
    x = array("x").requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, array(f"{prefix}/y"), rtol=0, atol=1e-9)
    torch.testing.assert_close(layer(array("x2d")), array(f"{prefix}/y2d"), rtol=0, atol=1e-9)
    (y * array("loss_weight")).sum().backward()
    torch.testing.assert_close(x.grad, array(f"{prefix}/dx"), rtol=0, atol=1e-9)
    compared = 0
    for (side, part), parameter in layer.tensors("default").items():
        number = next((number for number, of in SIDES.items() if of is side), "lora")
        suffix = ".default.weight" if part in (Part.A, Part.B) else ".default"
        name = f"{prefix}/d_{number}_{'w_gate' if part is Part.GATE else part}{suffix}"
        if parameter.requires_grad and name in ARRAYS.files:
            want = array(name).reshape(parameter.shape)
            torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-9)
            compared += 1
    assert compared == (5 if state == "gate" else 2)


@pytest.mark.parametrize("state", ["lora1", "lora2", "gate"])
def test_reference_arrays_of_the_dual_baseline(state: str) -> None:
    # The baseline averages its branches, which is our gate before its first step.
    base = nn.Linear(10, 9, dtype=torch.float64)
    base.weight.data = array("dual/param/base_layer.weight", DUAL)
    base.bias.data = array("dual/param/base_layer.bias", DUAL)
    layer = make("scalar", False, base=base, rank=3, alpha=6.0)
    tensors = layer.tensors("default")
    tensors[S, Part.GATE].data.zero_()
    for number, side in SIDES.items():
        for part in (Part.A, Part.B):
            tensors[side, part].data = array(f"dual/param/{number}_{part}.default.weight", DUAL)
    layer.set_view(View.GATED if state == "gate" else View(SIDES[state].value))
    got = layer(array("dual/x", DUAL))
    torch.testing.assert_close(got, array(f"dual/{state}/y", DUAL), rtol=0, atol=1e-9)
