"""Reference of the PQ-LoRA forward pass and of the gates, written for reading and for tests.

Source: FedMosaic (arXiv 2506.11024), PQ-LoRA (later named Co-LoRA) and its gates. The adapter
layers compute the same with fewer products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError


def pq_delta(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    P: Tensor | None,
    Q: Tensor | None,
    scaling: float,
) -> Tensor:
    """What one branch adds to the base output: ``scaling * (x A^T P + Q) B^T``.

    P multiplies the row vector x A^T from the right.

    Args:
        x: (..., d_in).
        A: (rank, d_in).
        B: (d_out, rank).
        P: (rank, rank), or None for conventional LoRA (the identity).
        Q: (rank,) or (1, rank), or None for conventional LoRA (zero).
        scaling: alpha / rank.

    Returns:
        (..., d_out).
    """
    inner = x @ A.T
    if P is not None:
        inner = inner @ P
    if Q is not None:
        inner = inner + Q.reshape(-1)
    return scaling * (inner @ B.T)


def pq_merged(
    A: Tensor,
    B: Tensor,
    P: Tensor,
    Q: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """One branch as a change of the base layer's weight and bias.

    Args:
        A: (rank, d_in).
        B: (d_out, rank).
        P: (rank, rank).
        Q: (rank,) or (1, rank).
        scaling: alpha / rank.

    Returns:
        ``scaling * B P^T A`` (d_out, d_in) and ``scaling * B Q`` (d_out,).
    """
    return scaling * (B @ P.T @ A), scaling * (B @ Q.reshape(-1))


def scalar_gate(bias: Tensor) -> Tensor:
    """The paper's gate: one number per layer; the sigmoid of ``bias`` (), which starts at 0."""
    return bias.sigmoid()


def input_gate(
    x: Tensor,
    w_gate: Tensor,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The released code's gate: the sigmoid of the mean over tokens of ``x . w_gate``.

    The released code averages over padding too; a mask leaves it out.

    Args:
        x: (batch, tokens, d_in), or (rows, d_in) with one gate per row.
        w_gate: (d_in,) or (d_in, 1).
        mask: (batch, tokens), true or 1 at real tokens, at least one per sequence; all when
            omitted. Not for two-dimensional ``x``.
        noise: (batch, tokens), added to the tokens' logits; none when omitted.

    Returns:
        (batch, 1, 1), or (rows, 1): the weight of the global branch.

    Raises:
        AdapterError: ``x`` has another number of dimensions, or the mask does not fit.
    """
    if (
        x.ndim not in (2, 3)
        or (mask is not None and mask.shape != x.shape[:2])
        or (mask is not None and x.ndim == 2)
    ):
        shape = None if mask is None else tuple(mask.shape)
        raise AdapterError(
            "the input gate takes x (batch, tokens, d_in) with a mask (batch, tokens), or x "
            f"(rows, d_in) without; got x {tuple(x.shape)}, mask {shape}"
        )
    logits = x @ w_gate.reshape(-1)
    if noise is not None:
        logits = logits + noise
    if x.ndim == 2:
        return logits.sigmoid()[:, None]
    if mask is None:
        return logits.mean(dim=1).sigmoid()[:, None, None]
    real = mask.to(logits.dtype)
    # The product with 0 alone would let a non-finite padding value through.
    logits = torch.where(mask.bool(), logits, torch.zeros_like(logits))
    return (logits.sum(dim=1) / real.sum(dim=1)).sigmoid()[:, None, None]


def gated(base: Tensor, global_delta: Tensor, local_delta: Tensor, gate: Tensor) -> Tensor:
    """``base + gate * global + (1 - gate) * local``; all shapes broadcast."""
    return base + gate * global_delta + (1 - gate) * local_delta
