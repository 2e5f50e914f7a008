from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from fedml_plugin_fedmosaic.equations.pq import gated, input_gate, pq_delta, pq_merged

HERE = Path(__file__).parent
ARRAYS = np.load(HERE / "pq_layer.npz", allow_pickle=False)
DUAL = np.load(HERE / "dual_layers.npz", allow_pickle=False)
RANK, ALPHA = ARRAYS["meta_r_alpha"].tolist()
SCALING = ALPHA / RANK


def _parameters(gate: str) -> dict[str, Tensor]:
    read = {
        name.removeprefix("param/"): torch.from_numpy(ARRAYS[name]).clone()
        for name in ARRAYS.files
        if name.startswith("param/")
    }
    if gate == "gate0":
        read["lora_w_gate.default"].zero_()
        read["lora_w_noise.default"].zero_()
    for name, tensor in read.items():
        tensor.requires_grad_(name.startswith("lora"))
    return read


def _branch(x: Tensor, p: dict[str, Tensor], branch: int, kind: str) -> Tensor:
    pq = kind == "pq"
    return pq_delta(
        x,
        p[f"lora{branch}_A.default.weight"],
        p[f"lora{branch}_B.default.weight"],
        p[f"lora{branch}_P.default"] if pq else None,
        p[f"lora{branch}_Q.default"] if pq else None,
        SCALING,
    )


def _forward(
    x: Tensor, p: dict[str, Tensor], kind: str, state: str, noise: Tensor | None = None
) -> Tensor:
    base = linear(x, p["base_layer.weight"], p["base_layer.bias"])
    if state != "gate":
        return base + _branch(x, p, int(state[-1]), kind)
    weight = input_gate(x, p["lora_w_gate.default"], noise=noise)
    return gated(base, _branch(x, p, 1, kind), _branch(x, p, 2, kind), weight)


@pytest.mark.parametrize("gate", ["gate0", "gateR"])
@pytest.mark.parametrize("kind", ["pq", "conv"])
@pytest.mark.parametrize("state", ["gate", "lora1", "lora2"])
def test_outputs_and_gradients_equal_the_reference(gate: str, kind: str, state: str) -> None:
    prefix = f"{gate}/{kind}/{state}/"
    parameters = _parameters(gate)
    x = torch.from_numpy(ARRAYS["x"]).clone().requires_grad_()
    y = _forward(x, parameters, kind, state)
    np.testing.assert_allclose(y.detach(), ARRAYS[f"{prefix}y"], rtol=0, atol=1e-9)
    flat = _forward(torch.from_numpy(ARRAYS["x2d"]), parameters, kind, state)
    np.testing.assert_allclose(flat.detach(), ARRAYS[f"{prefix}y2d"], rtol=0, atol=1e-9)

    (y * torch.from_numpy(ARRAYS["loss_weight"])).sum().backward()
    np.testing.assert_allclose(x.grad, ARRAYS[f"{prefix}dx"], rtol=0, atol=1e-9)
    expected = [name for name in ARRAYS.files if name.startswith(f"{prefix}d_")]
    assert len(expected) >= 2
    for name in expected:
        gradient = parameters[name.removeprefix(f"{prefix}d_")].grad
        np.testing.assert_allclose(gradient, ARRAYS[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate", ["gate0", "gateR"])
def test_gate_values_equal_the_reference(gate: str) -> None:
    parameters = _parameters(gate)
    x = torch.from_numpy(ARRAYS["x"])
    w_gate = parameters["lora_w_gate.default"].detach()
    got = input_gate(x, w_gate)
    assert got.shape == (2, 1, 1)
    np.testing.assert_allclose(got[:, 0], ARRAYS[f"{gate}/gate_eval"], rtol=0, atol=1e-12)
    spread = softplus(x @ parameters["lora_w_noise.default"].detach()) + 1e-5
    noise = (torch.from_numpy(ARRAYS["train_noise"]) * spread)[..., 0]
    got = input_gate(x, w_gate, noise=noise)
    np.testing.assert_allclose(got[:, 0], ARRAYS[f"{gate}/gate_train"], rtol=0, atol=1e-12)
    y = _forward(x, parameters, "pq", "gate", noise).detach()
    np.testing.assert_allclose(y, ARRAYS[f"{gate}/pq/gate_train/y"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("branch", [1, 2])
def test_merged_weight_gives_the_reference_output(branch: int) -> None:
    parameters = _parameters("gateR")
    factors = (
        parameters[f"lora{branch}_{name}"].detach()
        for name in ("A.default.weight", "B.default.weight", "P.default", "Q.default")
    )
    weight, bias = pq_merged(*factors, SCALING)
    y = linear(
        torch.from_numpy(ARRAYS["x"]),
        parameters["base_layer.weight"] + weight,
        parameters["base_layer.bias"] + bias,
    )
    np.testing.assert_allclose(y, ARRAYS[f"gateR/pq/lora{branch}/y"], rtol=0, atol=1e-9)


def test_mean_of_two_conventional_branches_equals_the_reference() -> None:
    p = {
        name.removeprefix("dual/param/"): torch.from_numpy(DUAL[name])
        for name in DUAL.files
        if name.startswith("dual/param/")
    }
    x = torch.from_numpy(DUAL["dual/x"])
    base = linear(x, p["base_layer.weight"], p["base_layer.bias"])
    # The file holds outputs, not alpha: it follows from the first branch and must fit the others.
    one = {
        b: pq_delta(
            x, p[f"lora{b}_A.default.weight"], p[f"lora{b}_B.default.weight"], None, None, 1.0
        )
        for b in (1, 2)
    }
    added = torch.from_numpy(DUAL["dual/lora1/y"]) - base
    scaling = float((added * one[1]).sum() / one[1].square().sum())
    for b in (1, 2):
        got = base + scaling * one[b]
        np.testing.assert_allclose(got, DUAL[f"dual/lora{b}/y"], rtol=0, atol=1e-9)
    half = torch.tensor(0.5, dtype=torch.float64)
    got = gated(base, scaling * one[1], scaling * one[2], half)
    np.testing.assert_allclose(got, DUAL["dual/gate/y"], rtol=0, atol=1e-9)
