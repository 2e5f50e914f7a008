from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.equations import gradient as module
from fedml_plugin_fedmosaic.equations.gradient import (
    add_noise,
    clip_by_norm,
    column_projection,
    compress,
    kept_rows,
    last_down_proj_gradient,
    sanitise,
    sketch_updates,
    smooth,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = [
        torch.randn(size, generator=_generator(index), dtype=torch.float64).to(dtype)
        for index, size in enumerate([(9, 11), (9, 6), (6,), (17, 6)])
    ]
    labels = torch.randint(0, 17, (9,), generator=_generator(9))
    return made[0], made[1], made[2], made[3], labels


def test_gradient_equals_autograd() -> None:
    activations, hidden, gamma, lm_head, labels = _problem()
    weight = torch.zeros(6, 11, dtype=torch.float64, requires_grad=True)
    h = hidden + activations @ weight.T
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * gamma
    torch.nn.functional.cross_entropy(normed @ lm_head.T, labels).backward()
    got = last_down_proj_gradient(activations, hidden, gamma, 1e-5, lm_head, labels)
    torch.testing.assert_close(got, weight.grad, rtol=1e-12, atol=1e-14)


def test_token_chunks_and_embedding_slices_do_not_change_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    activations, hidden, gamma, lm_head, labels = _problem(torch.float32)
    lm_head = lm_head.bfloat16()
    whole = last_down_proj_gradient(activations, hidden, gamma, 1e-5, lm_head, labels)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 36)
    chunked = last_down_proj_gradient(activations, hidden, gamma, 1e-5, lm_head, labels)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_gradient_stays_finite_for_extreme_logits() -> None:
    activations, hidden, gamma, lm_head, labels = _problem(torch.float32)
    got = last_down_proj_gradient(activations, hidden, gamma * 1e4, 1e-5, lm_head, labels)
    assert got.isfinite().all()


def test_wrong_gradient_inputs_are_refused() -> None:
    activations, hidden, gamma, lm_head, labels = _problem()
    with pytest.raises(DataError, match="n >= 1"):
        last_down_proj_gradient(activations[:0], hidden[:0], gamma, 1e-5, lm_head, labels[:0])
    with pytest.raises(DataError, match="expected activations"):
        last_down_proj_gradient(activations, hidden, gamma[:5], 1e-5, lm_head, labels)
    with pytest.raises(DataError, match="outside the vocabulary"):
        last_down_proj_gradient(activations, hidden, gamma, 1e-5, lm_head, labels - 100)
    with pytest.raises(ConfigError, match="jacobian"):
        last_down_proj_gradient(activations, hidden, gamma, 1e-5, lm_head, labels, "full")  # type: ignore[arg-type]


@given(st.integers(1, 300), st.floats(0.001, 1.0), st.integers(0, 9))
def test_kept_rows_are_sorted_unique_and_shared(rows: int, fraction: float, seed: int) -> None:
    kept = kept_rows(rows, fraction, "random", seed)
    assert len(kept) == max(1, math.floor(fraction * rows))
    assert torch.equal(kept, kept.unique())
    assert int(kept.max()) < rows
    assert torch.equal(kept, kept_rows(rows, fraction, "random", seed))
    assert torch.equal(kept_rows(rows, fraction, "first", seed), torch.arange(len(kept)))


def test_kept_rows_depend_on_the_seed_and_refuse_nonsense() -> None:
    assert not torch.equal(kept_rows(64, 0.4, "random", 1), kept_rows(64, 0.4, "random", 2))
    with pytest.raises(ConfigError, match="fraction"):
        kept_rows(64, 0.0, "random", 1)
    with pytest.raises(ConfigError, match="'random' or 'first'"):
        kept_rows(64, 0.4, "last", 1)  # type: ignore[arg-type]


def test_clipping_bounds_the_norm_and_leaves_small_gradients() -> None:
    gradient = torch.randn(5, 7, generator=_generator())
    assert float(clip_by_norm(gradient, 0.5).norm()) == pytest.approx(0.5, rel=1e-6)
    assert clip_by_norm(gradient, 1e6) is gradient
    assert clip_by_norm(gradient, None) is gradient
    with pytest.raises(ConfigError, match="clip_norm"):
        clip_by_norm(gradient, 0.0)


@pytest.mark.parametrize(("kind", "factor"), [("gaussian", 1.0), ("laplace", math.sqrt(2))])
def test_noise_has_the_promised_spread_and_is_reproducible(kind: str, factor: float) -> None:
    zeros = torch.zeros(400, 500)
    noisy = add_noise(zeros, kind, 0.1, _generator(3))  # type: ignore[arg-type]
    assert float(noisy.std()) == pytest.approx(0.1 * factor, rel=0.02)
    assert abs(float(noisy.mean())) < 1e-3
    assert torch.equal(noisy, add_noise(zeros, kind, 0.1, _generator(3)))  # type: ignore[arg-type]
    assert not zeros.any()


def test_noise_can_be_off_but_not_unseeded() -> None:
    zeros = torch.zeros(2, 2)
    assert add_noise(zeros, "none", 0.1, None) is zeros
    assert add_noise(zeros, "gaussian", 0.0, None) is zeros
    with pytest.raises(ConfigError, match="generator"):
        add_noise(zeros, "gaussian", 0.1, None)
    with pytest.raises(ConfigError, match="noise_std"):
        add_noise(zeros, "gaussian", -0.1, _generator())
    with pytest.raises(ConfigError, match="uniform"):
        add_noise(zeros, "uniform", 0.1, _generator())  # type: ignore[arg-type]


@pytest.mark.parametrize(("columns_in", "columns_out"), [(12, 12), (12, 4), (13, 5), (7, 1)])
def test_projection_equals_a_signed_matrix(columns_in: int, columns_out: int) -> None:
    projection = column_projection(columns_in, columns_out, seed=5)
    matrix = compress(torch.eye(columns_in), projection)
    assert matrix.shape == (columns_in, columns_out)
    assert torch.equal(matrix.abs().sum(1), torch.ones(columns_in))
    per_output = matrix.abs().sum(0)
    assert float(per_output.max() - per_output.min()) <= 1
    gradient = torch.randn(3, columns_in, generator=_generator())
    torch.testing.assert_close(compress(gradient, projection), gradient @ matrix)


def test_projection_keeps_inner_products_in_expectation() -> None:
    first, second = torch.randn(2, 1, 64, generator=_generator(1), dtype=torch.float64)
    products = [
        float((compress(first, p) * compress(second, p)).sum())
        for p in (column_projection(64, 16, seed) for seed in range(400))
    ]
    mean = sum(products) / len(products)
    spread = torch.tensor(products).std().item() / math.sqrt(len(products))
    assert abs(mean - float((first * second).sum())) < 4 * spread


def test_projection_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="compress 4 columns to 5"):
        column_projection(4, 5, 0)
    with pytest.raises(DataError, match="projection takes"):
        compress(torch.ones(2, 5), column_projection(4, 2, 0))


def test_sanitise_is_the_chain_of_its_steps() -> None:
    gradient = torch.randn(20, 12, generator=_generator())
    rows = kept_rows(20, 0.4, "random", 7)
    projection = column_projection(12, 4, 7)
    got = sanitise(
        gradient,
        rows=rows,
        clip_norm=1.0,
        noise="gaussian",
        noise_std=0.01,
        generator=_generator(2),
        projection=projection,
    )
    clipped = clip_by_norm(gradient[rows], 1.0)
    expected = compress(add_noise(clipped, "gaussian", 0.01, _generator(2)), projection)
    assert got.shape == (8, 4)
    assert torch.equal(got, expected)
    with pytest.raises(DataError, match="row 19"):
        sanitise(
            gradient[:10],
            rows=torch.tensor([1, 19]),
            clip_norm=None,
            noise="none",
            noise_std=0.0,
            generator=None,
        )


@given(st.integers(1, 120), st.integers(1, 40), st.integers(1, 8))
def test_sketch_updates_are_never_empty_and_inside_the_round(
    num_updates: int, frequency: int, accumulation: int
) -> None:
    regular = sketch_updates(num_updates, frequency, "regular", accumulation)
    assert regular == tuple(range(1, num_updates + 1, frequency))
    official = sketch_updates(num_updates, frequency, "official", accumulation)
    assert official[0] == 1
    assert official[-1] <= num_updates
    assert list(official) == sorted(set(official))


def test_sketch_updates_of_the_reference_recipe() -> None:
    official = sketch_updates(94, 10, "official", 4)
    assert official == (1, 6, 14, 27, 40, 48, 53, 61, 74, 87)
    with pytest.raises(ConfigError, match="at least 1"):
        sketch_updates(0, 10, "regular")
    with pytest.raises(ConfigError, match="schedule"):
        sketch_updates(5, 1, "often")  # type: ignore[arg-type]


def test_smooth_weighs_the_past() -> None:
    old, new = torch.ones(2, 3), torch.zeros(2, 3)
    assert smooth(None, new) is new
    torch.testing.assert_close(smooth(old, new, 0.25), torch.full((2, 3), 0.25))
    with pytest.raises(DataError, match="cannot follow"):
        smooth(torch.ones(2, 4), new)
    with pytest.raises(ConfigError, match="ema"):
        smooth(old, new, 1.0)
