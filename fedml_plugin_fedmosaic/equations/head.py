"""Cross entropy through the output embedding of any causal language model, in closed form.

Models differ after their last normalisation in a bias, a factor on the logits, and a soft cap
``c tanh(z / c)``. What comes before is not looked at here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 24
"""Largest number of logits, or of cast embedding entries, held at a time (64 MiB in float32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """What a model does to the products with its output embedding.

    Attributes:
        scale: factor on the logits.
        cap: soft cap c of the logits, ``c tanh(z / c)``; None: no cap.
    """

    scale: float = 1.0
    cap: float | None = None


@torch.no_grad()
def head_logits(
    normed: Tensor, lm_head: Tensor, bias: Tensor | None = None, form: HeadForm | None = None
) -> Tensor:
    """Logits of normalised hidden states.

    Args:
        normed: (n, d), outputs of the final normalisation.
        lm_head: (V, d), output embedding; any float dtype, cast in slices.
        bias: (V,) of the output embedding, if it has one.
        form: scale and cap; neither when omitted.

    Returns:
        (n, V), float64 if ``normed`` is float64, else float32.
    """
    form = form or HeadForm()
    dtype = torch.float64 if normed.dtype == torch.float64 else torch.float32
    x = normed.to(dtype)
    logits = torch.empty(len(x), len(lm_head), dtype=dtype, device=x.device)
    for part in _slices(lm_head, dtype):
        logits[:, part] = x @ lm_head[part].to(dtype).T
    if bias is not None:
        logits += bias.to(dtype)
    logits *= form.scale
    if form.cap is not None:
        logits.div_(form.cap).tanh_().mul_(form.cap)
    return logits


@torch.no_grad()
def head_gradient(
    normed: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    form: HeadForm | None = None,
) -> Tensor:
    """Gradient of the mean cross entropy w.r.t. the normalised hidden states.

    With y the logits and p their softmax, dL/dy = (p - onehot) / n; a cap multiplies it by
    1 - (y / c)^2, and the way back through scale and embedding is linear.

    Args:
        normed: (n, d), at the supervised positions.
        lm_head: (V, d).
        labels: (n,), integer token to be predicted at each position.
        bias: (V,), or None.
        form: scale and cap.

    Returns:
        (n, d) in the dtype of :func:`head_logits`.
    """
    form = form or HeadForm()
    parts = []
    step = max(1, _BLOCK_ELEMENTS // lm_head.shape[0])
    for start in range(0, len(normed), step):
        part = slice(start, min(start + step, len(normed)))
        logits = head_logits(normed[part], lm_head, bias, form)
        slope = None if form.cap is None else 1 - (logits / form.cap).square()
        delta = logits.softmax(dim=1)
        delta[torch.arange(len(delta), device=delta.device), labels[part]] -= 1
        if slope is not None:
            delta *= slope
        delta *= form.scale / len(normed)
        back = torch.zeros(len(delta), lm_head.shape[1], dtype=delta.dtype, device=delta.device)
        for rows in _slices(lm_head, delta.dtype):
            back.addmm_(delta[:, rows], lm_head[rows].to(delta.dtype))
        parts.append(back)
    return torch.cat(parts)


def _slices(lm_head: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices over the vocabulary; one if no cast is needed."""
    vocabulary, width = lm_head.shape
    step = vocabulary if lm_head.dtype == dtype else max(1, _BLOCK_ELEMENTS // width)
    return [slice(at, min(at + step, vocabulary)) for at in range(0, vocabulary, step)]
