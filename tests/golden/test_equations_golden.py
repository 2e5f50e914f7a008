from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers, block_of_layer
from fedml_plugin_fedmosaic.equations.gradient import last_down_proj_gradient, smooth
from fedml_plugin_fedmosaic.equations.relevance import (
    column_similarity,
    flat_similarity,
    relevance_weights,
)

HERE = Path(__file__).parent
GRADIENT = np.load(HERE / "rela_grad.npz", allow_pickle=False)
SIMILARITY = np.load(HERE / "similarity.npz", allow_pickle=False)


def test_block_end_layers_equal_the_reference() -> None:
    arrays = np.load(HERE / "target_layers.npz", allow_pickle=False)
    refused = 0
    for (num_layers, num_blocks), row in zip(
        arrays["pairs"].tolist(), arrays["layers"].tolist(), strict=True
    ):
        if num_layers < num_blocks:
            with pytest.raises(AdapterError, match="blocks"):
                block_end_layers(num_layers, num_blocks)
            refused += 1
            continue
        ends = block_end_layers(num_layers, num_blocks)
        assert ends == tuple(row[:num_blocks])
        assert [block_of_layer(end, num_layers, num_blocks) for end in ends] == list(
            range(num_blocks)
        )
    assert refused == 66


def _gradient(case: str, jacobian: str, dtype: torch.dtype) -> Tensor:
    def read(name: str) -> Tensor:
        return torch.from_numpy(GRADIENT[f"{case}/{name}"])

    return last_down_proj_gradient(
        read("a").to(dtype),
        read("h").to(dtype),
        read("gamma").to(dtype),
        float(GRADIENT[f"{case}/eps"]),
        read("W_lm").to(dtype),
        read("labels"),
        jacobian,
    )


def _relative_error(got: Tensor, expected: np.ndarray) -> float:
    reference = torch.from_numpy(expected).double()
    return float((got - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", ["small", "medium", "outlier"])
@pytest.mark.parametrize(
    ("jacobian", "reference", "tolerance"),
    [
        ("exact", "autograd_f64", 1e-12),
        ("exact", "closed_exact_f64", 1e-12),
        ("diagonal", "closed_diag_f64", 1e-12),
        ("diagonal", "official_bf16", 2e-2),
    ],
)
def test_closed_form_gradient_equals_the_reference(
    case: str, jacobian: str, reference: str, tolerance: float
) -> None:
    expected = GRADIENT[f"{case}/{reference}"]
    double = _gradient(case, jacobian, torch.float64)
    single = _gradient(case, jacobian, torch.float32)
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert _relative_error(double, expected) < tolerance
    assert _relative_error(single, expected) < max(tolerance, 1e-6)


@pytest.mark.parametrize("block_columns", [None, 1, 7, 29, 1000])
def test_column_similarity_equals_the_reference(block_columns: int | None) -> None:
    sketches = torch.from_numpy(SIMILARITY["G"])
    for dtype, name, tolerance in (
        (torch.float64, "f64", 1e-9),
        (torch.float32, "f32", 1e-6),
        (torch.bfloat16, "bf16", 2e-2),
    ):
        got = column_similarity(list(sketches.to(dtype)), block_columns)
        np.testing.assert_allclose(got.numpy(), SIMILARITY[f"sim_{name}"], rtol=0, atol=tolerance)


def test_flat_similarity_equals_the_reference() -> None:
    got = flat_similarity(list(torch.from_numpy(SIMILARITY["G"])), 5)
    np.testing.assert_allclose(got.numpy(), SIMILARITY["flat_cosine_f64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(("name", "tolerance"), [("f64", 1e-12), ("f32", 1e-6), ("bf16", 2e-2)])
def test_relevance_weights_equal_the_reference(
    temperature: float, name: str, tolerance: float
) -> None:
    got = relevance_weights(torch.from_numpy(SIMILARITY[f"sim_{name}"]), temperature)
    expected = SIMILARITY[f"weights_{name}_T{temperature}"]
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=tolerance)


def test_running_average_equals_the_reference() -> None:
    current = torch.from_numpy(SIMILARITY["ema_cur_sum"]) / int(SIMILARITY["ema_cnt"])
    got = smooth(torch.from_numpy(SIMILARITY["ema_old"]), current, 0.5)
    np.testing.assert_allclose(got.numpy(), SIMILARITY["ema_new"], rtol=1e-6, atol=1e-8)
