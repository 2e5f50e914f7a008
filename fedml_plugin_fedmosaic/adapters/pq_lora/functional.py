"""Products of the adapter layers, arranged so that few large tensors are made or kept.

Row convention throughout: ``z = x A^T`` (tokens, r), ``v = z P + Q``, ``y = base + s v B^T``.
Shapes: x (..., d_in), base (..., d_out), A (r, d_in), B (d_out, r), P (r, r), Q (r,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def affine(z: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """``z P + Q``; keeps z for the backward pass.

    Args:
        z: (..., r).
        P: (r, r).
        Q: (r,).

    Returns:
        (..., r).
    """
    return torch.addmm(Q, z.reshape(-1, z.shape[-1]), P).reshape(z.shape)


def add_product(base: Tensor, v: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``base + scaling * v B^T`` as one product that accumulates into a copy of ``base``.

    Not in place: forward hooks may still hold the base layer's output. With unequal dtypes (say a
    bfloat16 model with float32 adapters) the product is cast to the dtype of ``base``.

    Args:
        base: (..., d_out).
        v: (..., r).
        B: (d_out, r).
        scaling: factor on the product.

    Returns:
        (..., d_out) in the dtype of ``base``.
    """
    if base.dtype == v.dtype == B.dtype:
        rows = base.reshape(-1, base.shape[-1])
        total = torch.addmm(rows, v.reshape(-1, v.shape[-1]), B.t(), alpha=scaling)
        return total.reshape(base.shape)
    return base + functional.linear(v * scaling, B.to(v.dtype)).to(base.dtype)


class _MixBranches(torch.autograd.Function):
    """``(1-w)(z P_l + Q_l) + w (z P_g + Q_g)`` with one w per sequence.

    Keeps z and w, not the two branches; the gate's gradient recomputes their difference.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, P_l: Tensor, Q_l: Tensor, P_g: Tensor, Q_g: Tensor, w: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z, P_l, Q_l, P_g, Q_g, w)
        return torch.lerp(affine(z, P_l, Q_l), affine(z, P_g, Q_g), w)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, P_l, Q_l, P_g, Q_g, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rank = z.shape[-1]
        rows = z.reshape(-1, rank)
        share_l = (grad * (1 - w)).reshape(-1, rank)
        share_g = (grad * w).reshape(-1, rank)
        d_z = d_w = None
        if needs[0]:
            d_z = torch.addmm(share_l @ P_l.t(), share_g, P_g.t()).reshape(z.shape)
        if needs[5]:
            difference = affine(z, P_g - P_l, Q_g - Q_l)
            d_w = (grad * difference).sum_to_size(w.shape)
        return (
            d_z,
            rows.t() @ share_l if needs[1] else None,
            share_l.sum(dim=0) if needs[2] else None,
            rows.t() @ share_g if needs[3] else None,
            share_g.sum(dim=0) if needs[4] else None,
            d_w,
        )


def mix_branches(
    z: Tensor,
    local: tuple[Tensor, Tensor],
    global_: tuple[Tensor, Tensor],
    weight: Tensor,
) -> Tensor:
    """``(1-w)(z P_l + Q_l) + w (z P_g + Q_g)``.

    A scalar w mixes P and Q first, so that the tokens pass one product. A w per sequence goes
    through a function of its own that keeps only z and w.

    Args:
        z: (..., r).
        local: P_l (r, r) and Q_l (r,).
        global_: P_g (r, r) and Q_g (r,).
        weight: weight of the global branch: () or broadcastable to z, e.g. (batch, 1, 1).

    Returns:
        (..., r).
    """
    if weight.ndim == 0:
        return affine(
            z, torch.lerp(local[0], global_[0], weight), torch.lerp(local[1], global_[1], weight)
        )
    # Under autocast z may be of lower precision than the parameters.
    tensors = [tensor.to(z.dtype) for tensor in (*local, *global_, weight)]
    mixed: Tensor = _MixBranches.apply(z, *tensors)
    return mixed
