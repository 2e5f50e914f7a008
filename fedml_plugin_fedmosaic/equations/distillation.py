"""Distillation losses on logits.

With student logits z, teacher logits t, temperature T and p = softmax(t / T)::

    kl       sum over v of p_v (log p_v - log softmax(z / T)_v)
    soft_ce  - sum over v of p_v log softmax(z / T)_v

Neither holds the factor T^2 of Hinton et al. 2015 (arXiv 1503.02531); a caller that wants it puts
it into the weight of the term.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["kl", "soft_ce"]


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, kind: Divergence = "kl"
) -> Tensor:
    """How far the student's answers are from the teacher's, in nats.

    Args:
        student: logits, float ``(..., vocabulary)``.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T > 0, on both sides.
        kind: which divergence.

    Returns:
        Float ``(...)``, with gradients with respect to the student.
    """
    answers = (student / temperature).log_softmax(-1)
    wanted = (teacher.detach() / temperature).log_softmax(-1)
    probability = wanted.exp()
    if kind == "soft_ce":
        return -(probability * answers).sum(-1)
    # A teacher may rule a token out with -inf; 0 log 0 is 0.
    gap = torch.where(probability > 0, wanted - answers, torch.zeros_like(answers))
    return (probability * gap).sum(-1)
