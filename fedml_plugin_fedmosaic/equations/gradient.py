"""The proxy gradient, its sanitisation, and when it is taken.

Source: FedMosaic (arXiv 2506.11024), relevance-guided aggregation: a client describes its data by
the gradient of a frozen proxy model's last ``down_proj`` weight. Cross entropy, output embedding
and RMSNorm have closed forms, so no backward pass is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.rng import torch_generator

Jacobian = Literal["exact", "diagonal"]
NoiseKind = Literal["gaussian", "laplace", "none"]
RowChoice = Literal["random", "first"]
SketchSchedule = Literal["regular", "official"]

_BLOCK_ELEMENTS = 1 << 24
"""Largest number of logits, or of cast embedding entries, held at a time (64 MiB in float32)."""


@torch.no_grad()
def last_down_proj_gradient(
    activations: Tensor,
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    lm_head: Tensor,
    labels: Tensor,
    jacobian: Jacobian = "exact",
) -> Tensor:
    """Gradient of the mean cross entropy w.r.t. the last ``down_proj`` weight.

    With delta_t = (softmax(logits_t) - onehot(y_t)) / n, u_t = gamma * (W_lm^T delta_t) and
    s_t = 1 / sqrt(mean(h_t^2) + eps), the gradient is sum_t e_t a_t^T where

    * exact:    e_t = s_t * (u_t - h_t * (h_t . u_t) * s_t^2 / d), the true gradient;
    * diagonal: e_t = s_t * u_t * (1 - h_t^2 * s_t^2 / d), as the released code computes it, which
      keeps the diagonal of the RMSNorm Jacobian only.

    Args:
        activations: (n, inter), inputs of the last layer's ``down_proj`` at the supervised tokens.
        hidden: (n, d), inputs of the final RMSNorm (residual stream after the last layer).
        norm_weight: (d,), weight of the final RMSNorm.
        eps: epsilon of the final RMSNorm.
        lm_head: (V, d), output embedding; any float dtype, cast in slices.
        labels: (n,), integer token to be predicted at each position; no ignored positions.
        jacobian: ``exact`` or ``diagonal``.

    Returns:
        (d, inter) on the device of ``hidden``; float64 if ``hidden`` is float64, else float32.

    Raises:
        DataError: no token, or shapes that do not belong together.
        ConfigError: unknown ``jacobian``.
    """
    if jacobian not in ("exact", "diagonal"):
        raise ConfigError(f"jacobian is {jacobian!r}; expected 'exact' or 'diagonal'")
    _check_gradient_inputs(activations, hidden, norm_weight, lm_head, labels)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    num_tokens, width = hidden.shape
    gamma = norm_weight.to(dtype)
    gradient = torch.zeros(width, activations.shape[1], dtype=dtype, device=hidden.device)
    step = max(1, _BLOCK_ELEMENTS // lm_head.shape[0])
    for start in range(0, num_tokens, step):
        part = slice(start, min(start + step, num_tokens))
        h = hidden[part].to(dtype)
        scale = torch.rsqrt(h.square().mean(dim=1, keepdim=True) + eps)
        delta = _probability_errors(h * scale * gamma, lm_head, labels[part]).div_(num_tokens)
        u = _times_embedding(delta, lm_head).mul_(gamma)
        if jacobian == "exact":
            inner = (h * u).sum(dim=1, keepdim=True)
            error = scale * (u - h * (inner * scale.square() / width))
        else:
            error = scale * u * (1 - h.square() * scale.square() / width)
        gradient.addmm_(error.T, activations[part].to(dtype))
    return gradient


def _check_gradient_inputs(
    activations: Tensor, hidden: Tensor, norm_weight: Tensor, lm_head: Tensor, labels: Tensor
) -> None:
    if hidden.ndim != 2 or hidden.shape[0] == 0:
        raise DataError(
            f"the proxy gradient needs hidden states (n, d) with n >= 1; got {tuple(hidden.shape)}",
            hint="a sample without an answer has no supervised token; leave it out",
        )
    n, d = hidden.shape
    rows_fit = activations.ndim == 2 and len(activations) == n and labels.shape == (n,)
    width_fits = norm_weight.shape == (d,) and lm_head.ndim == 2 and lm_head.shape[1] == d
    if not (rows_fit and width_fits):
        raise DataError(
            f"proxy gradient of {n} tokens of width {d}: expected activations ({n}, inter), "
            f"norm_weight ({d},), lm_head (V, {d}), labels ({n},); got "
            f"{tuple(activations.shape)}, {tuple(norm_weight.shape)}, {tuple(lm_head.shape)}, "
            f"{tuple(labels.shape)}"
        )
    if bool((labels < 0).any()) or bool((labels >= lm_head.shape[0]).any()):
        raise DataError(
            f"a label is outside the vocabulary 0..{lm_head.shape[0] - 1}",
            hint="select the supervised positions first (label != -100)",
        )


def _embedding_slices(lm_head: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices over the vocabulary; one if no cast is needed."""
    vocabulary, width = lm_head.shape
    step = vocabulary if lm_head.dtype == dtype else max(1, _BLOCK_ELEMENTS // width)
    return [slice(at, min(at + step, vocabulary)) for at in range(0, vocabulary, step)]


def _probability_errors(normed: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
    """(n, V): softmax of the logits minus the one-hot labels."""
    dtype = normed.dtype
    logits = torch.empty(len(normed), len(lm_head), dtype=dtype, device=normed.device)
    for part in _embedding_slices(lm_head, dtype):
        logits[:, part] = normed @ lm_head[part].to(dtype).T
    logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    logits.div_(logits.sum(dim=1, keepdim=True))
    logits[torch.arange(len(labels), device=labels.device), labels] -= 1
    return logits


def _times_embedding(delta: Tensor, lm_head: Tensor) -> Tensor:
    """(n, d): ``delta @ lm_head``."""
    result = torch.zeros(len(delta), lm_head.shape[1], dtype=delta.dtype, device=delta.device)
    for part in _embedding_slices(lm_head, delta.dtype):
        result.addmm_(delta[:, part], lm_head[part].to(delta.dtype))
    return result


def kept_rows(num_rows: int, fraction: float, how: RowChoice, seed: int) -> Tensor:
    """Rows of the proxy gradient that leave the client.

    Args:
        num_rows: rows of the gradient (d).
        fraction: part that is kept (rho), in (0, 1]; ``floor(rho * d)`` rows, at least one.
        how: ``random`` (every client of a run uses the same seed, so sketches are comparable) or
            ``first`` (as the released code).
        seed: root seed of the run; unused for ``first``.

    Returns:
        (rows,) int64, strictly ascending.

    Raises:
        ConfigError: a value outside its range.
    """
    if num_rows < 1 or not 0 < fraction <= 1:
        raise ConfigError(
            f"cannot keep a fraction of {fraction} of {num_rows} rows; expected a fraction in "
            "(0, 1] of at least one row",
            hint="set sketch.row_fraction",
        )
    count = max(1, int(fraction * num_rows))
    if how == "first":
        return torch.arange(count)
    if how != "random":
        raise ConfigError(f"sketch.rows is {how!r}; expected 'random' or 'first'")
    generator = torch_generator(seed, "sketch_rows", num_rows)
    return torch.randperm(num_rows, generator=generator)[:count].sort().values


def clip_by_norm(gradient: Tensor, max_norm: float | None) -> Tensor:
    """Scales a gradient down so that its Frobenius norm is at most ``max_norm``.

    Args:
        gradient: any shape, floating point.
        max_norm: upper bound; None leaves the gradient as it is.

    Returns:
        Same shape and dtype; the input itself if nothing is to be done.

    Raises:
        ConfigError: ``max_norm`` is not positive.
    """
    if max_norm is None:
        return gradient
    if not max_norm > 0:
        raise ConfigError(f"sketch.clip_norm is {max_norm}; expected a positive number")
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return gradient if norm <= max_norm else gradient * (max_norm / norm)


def add_noise(
    gradient: Tensor, kind: NoiseKind, std: float, generator: torch.Generator | None
) -> Tensor:
    """Adds independent noise to every entry.

    Args:
        gradient: any shape, floating point, not changed.
        kind: ``gaussian`` with standard deviation ``std``; ``laplace`` with *scale* ``std`` (its
            standard deviation is sqrt(2) times that, as in the released code); or ``none``.
        std: noise level (sigma), at least 0.
        generator: CPU generator that the noise is drawn from; needed unless there is no noise.

    Returns:
        Same shape, dtype and device; the input itself if there is no noise.

    Raises:
        ConfigError: unknown kind, negative level, or no generator for the noise.
    """
    if kind not in ("gaussian", "laplace", "none"):
        raise ConfigError(f"sketch.noise is {kind!r}; expected 'gaussian', 'laplace' or 'none'")
    if not std >= 0:
        raise ConfigError(f"sketch.noise_std is {std}; expected a number of at least 0")
    if kind == "none" or std == 0:
        return gradient
    if generator is None:
        raise ConfigError("noise needs a generator", hint="make one with core.rng.torch_generator")
    noise = torch.empty(gradient.shape, dtype=torch.float32)
    if kind == "gaussian":
        noise.normal_(generator=generator)
    else:
        # The difference of two exponential draws is a Laplace draw and never infinite.
        noise.exponential_(generator=generator)
        noise.sub_(torch.empty_like(noise).exponential_(generator=generator))
    return gradient + noise.mul_(std).to(device=gradient.device, dtype=gradient.dtype)


@dataclass(frozen=True, slots=True)
class ColumnProjection:
    """A sparse random projection of columns: every input column goes, signed, into one output.

    Attributes:
        order: (columns_in,) int64, a permutation; entry k goes to output ``k % columns_out``.
        signs: (columns_in,) float32 of +1 and -1, in the order of ``order``.
        columns_out: columns after the projection.
    """

    order: Tensor
    signs: Tensor
    columns_out: int


def column_projection(columns_in: int, columns_out: int, seed: int) -> ColumnProjection:
    """The projection that all clients of a run share.

    Inner products are kept in expectation. Sketches are compared column by column, so many inputs
    per output bring the relevance nearer to the flattened cosine.

    Args:
        columns_in: columns of the gradient.
        columns_out: columns of the sketch, at most ``columns_in``.
        seed: root seed of the run.

    Returns:
        The projection; outputs get equally many inputs (up to one).

    Raises:
        ConfigError: ``columns_out`` is not in 1..columns_in.
    """
    if not 1 <= columns_out <= columns_in:
        raise ConfigError(
            f"cannot compress {columns_in} columns to {columns_out}; expected 1 to {columns_in}",
            hint="set sketch.columns",
        )
    generator = torch_generator(seed, "sketch_columns", columns_in, columns_out)
    order = torch.randperm(columns_in, generator=generator)
    signs = torch.randint(0, 2, (columns_in,), generator=generator).mul_(2).sub_(1)
    return ColumnProjection(order, signs.to(torch.float32), columns_out)


def compress(gradient: Tensor, projection: ColumnProjection) -> Tensor:
    """Applies a projection to the columns of a gradient.

    Args:
        gradient: (rows, columns_in), floating point.
        projection: see :func:`column_projection`.

    Returns:
        (rows, columns_out), same dtype and device.

    Raises:
        DataError: the gradient has another number of columns.
    """
    columns_in, columns_out = len(projection.order), projection.columns_out
    if gradient.ndim != 2 or gradient.shape[1] != columns_in:
        raise DataError(
            f"the projection takes (rows, {columns_in}); got a gradient {tuple(gradient.shape)}"
        )
    order = projection.order.to(gradient.device)
    signs = projection.signs.to(gradient)
    result = gradient.new_zeros(gradient.shape[0], columns_out)
    # A fixed summation order on every device, which a scatter would not give.
    for start in range(0, columns_in, columns_out):
        part = slice(start, min(start + columns_out, columns_in))
        width = part.stop - start
        result[:, :width] += gradient.index_select(1, order[part]) * signs[part]
    return result


def sanitise(
    gradient: Tensor,
    *,
    rows: Tensor,
    clip_norm: float | None,
    noise: NoiseKind,
    noise_std: float,
    generator: torch.Generator | None,
    projection: ColumnProjection | None = None,
) -> Tensor:
    """What leaves the client of one gradient: select rows, clip, add noise, compress.

    Args:
        gradient: (d, inter), floating point.
        rows: see :func:`kept_rows`.
        clip_norm: see :func:`clip_by_norm`; of the kept rows.
        noise: see :func:`add_noise`.
        noise_std: see :func:`add_noise`.
        generator: see :func:`add_noise`; fresh noise for every gradient.
        projection: applied after the noise; none when omitted.

    Returns:
        (rows, inter or the projection's columns), dtype and device of ``gradient``.

    Raises:
        ConfigError: see the single steps.
        DataError: a row is not in the gradient, or the projection does not fit.
    """
    if len(rows) and int(rows.max()) >= gradient.shape[0]:
        raise DataError(
            f"row {int(rows.max())} is not in a gradient of {gradient.shape[0]} rows",
            hint="call kept_rows with the proxy model's hidden size",
        )
    kept = gradient.index_select(0, rows.to(gradient.device))
    noisy = add_noise(clip_by_norm(kept, clip_norm), noise, noise_std, generator)
    return noisy if projection is None else compress(noisy, projection)


def sketch_updates(
    num_updates: int, frequency: int, schedule: SketchSchedule, grad_accumulation: int = 1
) -> tuple[int, ...]:
    """After which optimizer updates of a round a proxy gradient is taken.

    Args:
        num_updates: optimizer updates of the round (U), at least 1.
        frequency: updates between two gradients (m), at least 1.
        schedule: ``regular``: 1, 1 + m, 1 + 2m, ...; ``official``, the released code: update u iff
            (u - 1) a is one of floor(k U / c), k = 0 .. c a - 1, with c = floor(U / m). It fails
            if c = 0, where update 1 is taken here.
        grad_accumulation: micro-batches per update (a); matters for ``official`` only.

    Returns:
        **1-based** updates, ascending, never empty.

    Raises:
        ConfigError: a value outside its range.
    """
    if min(num_updates, frequency, grad_accumulation) < 1:
        raise ConfigError(
            f"num_updates={num_updates}, frequency={frequency} and "
            f"grad_accumulation={grad_accumulation} must all be at least 1"
        )
    if schedule == "regular":
        return tuple(range(1, num_updates + 1, frequency))
    if schedule != "official":
        raise ConfigError(f"sketch.schedule is {schedule!r}; expected 'regular' or 'official'")
    count = num_updates // frequency
    if count == 0:
        return (1,)
    micro_batches = {k * num_updates // count for k in range(count * grad_accumulation)}
    return tuple(
        update
        for update in range(1, num_updates + 1)
        if (update - 1) * grad_accumulation in micro_batches
    )


def smooth(previous: Tensor | None, current: Tensor, ema: float = 0.5) -> Tensor:
    """Running average of a client's sketches over its rounds.

    Args:
        previous: the client's last running average, or None before its first round.
        current: mean sanitised gradient of this round, same shape.
        ema: weight of ``previous``, in [0, 1); 0.5 is the released code's plain mean of both.

    Returns:
        ``ema * previous + (1 - ema) * current``, or ``current`` if there is no previous.

    Raises:
        ConfigError: ``ema`` outside [0, 1).
        DataError: the shapes differ.
    """
    if not 0 <= ema < 1:
        raise ConfigError(f"sketch.ema is {ema}; expected a number in [0, 1)")
    if previous is None:
        return current
    if previous.shape != current.shape:
        raise DataError(
            f"a sketch {tuple(current.shape)} cannot follow one of {tuple(previous.shape)}",
            hint="resume with the same sketch options and proxy model",
        )
    return previous * ema + current * (1 - ema)
