"""The paper's alignment of A and B against the released code's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.equations.alignment import nearest_row_orthonormal
from fedml_plugin_fedmosaic.equations.canonical import canonical_map, turned_outputs
from fedml_plugin_fedmosaic.equations.matching import column_coherence, matching_loss
from fedml_plugin_fedmosaic.equations.moments import PairMoments

HERE = Path(__file__).parent
LOSS = np.load(HERE / "a_align_loss.npz", allow_pickle=False)
CCA = np.load(HERE / "cca_b_map.npz", allow_pickle=False)
POLAR = np.load(HERE / "polar.npz", allow_pickle=False)


def _relative_error(got: Tensor, expected: np.ndarray) -> float:
    reference = torch.from_numpy(expected).double()
    return float((got - reference).norm() / reference.norm())


def test_matching_loss_and_gradient_equal_the_reference() -> None:
    count = int(LOSS["layer_cnt"])
    factors, inputs, targets = (
        [torch.from_numpy(LOSS[f"{name}{j}"]) for j in range(count)]
        for name in ("A", "X", "target")
    )
    for factor in factors:
        factor.requires_grad_()
    loss = matching_loss(factors, inputs, targets)
    penalties = sum(float(column_coherence(factor.detach())) for factor in factors)
    assert loss.item() == pytest.approx(float(LOSS["loss"]), rel=1e-12)
    assert penalties == pytest.approx(float(LOSS["cos_loss_sum"]), rel=1e-12)
    gradients = torch.autograd.grad(loss, factors)
    for j, gradient in enumerate(gradients):
        assert _relative_error(gradient, LOSS[f"dA{j}"]) < 1e-12


@pytest.mark.parametrize("case", ["small", "wide", "near"])
def test_polar_factor_equals_the_reference(case: str) -> None:
    matrix = torch.from_numpy(POLAR[f"{case}/A"])
    found = nearest_row_orthonormal(matrix)
    assert _relative_error(found, POLAR[f"{case}/A_ortho"]) < 2e-6
    assert _relative_error(found, POLAR[f"{case}/A_ortho_bf16"]) < 2e-2


def test_canonical_map_equals_the_reference() -> None:
    # The reference subtracts the means in the arrays' own single precision.
    x, y = (torch.from_numpy(CCA[f"full/{name}"]) for name in ("X1", "X3"))
    found = canonical_map(PairMoments.of(x - x.mean(0), y - y.mean(0)))
    assert found.rank == 10
    assert _relative_error(found.matrix, CCA["full/mapping_f64"]) < 1e-11
    assert _relative_error(found.correlations, CCA["full/sigma_f64"]) < 1e-11
    assert _relative_error(found.matrix, CCA["full/mapping_f32"]) < 1e-4
    turned = found.matrix @ torch.from_numpy(CCA["full/B_small"]).double()
    assert _relative_error(turned, CCA["full/B_large_f64"]) < 1e-11
    assert _relative_error(turned, CCA["full/B_large_bf16"]) < 2e-2


def test_aligned_outputs_equal_the_reference() -> None:
    z_s, z_g, b_s, b_g = (
        torch.from_numpy(CCA[f"lowrank/{name}"])
        for name in ("Z1", "Z3", "B_small", "B_large_before")
    )
    turned, found = turned_outputs(b_s, b_g, PairMoments.of(z_s, z_g))
    assert _relative_error(turned, CCA["lowrank/B_large_rxr_f64"]) < 1e-11
    assert _relative_error(found.correlations, CCA["lowrank/sigma_rxr_f64"]) < 1e-11
    # The released route in single precision at full width is off by this much.
    assert _relative_error(turned, CCA["lowrank/B_large_official_f32"]) < 0.1
