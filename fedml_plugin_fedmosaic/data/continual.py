"""Scores of a client whose tasks arrive one after the other: forgetting and forward transfer.

A curve maps 0-based rounds to a score in [0, 1]; rounds without an evaluation are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

Curve = Mapping[int, float]
"""Round -> score."""


def forgetting(curve: Curve, first: int, last: int) -> float | None:
    """How far a task's score has fallen below its best since its samples stopped arriving.

    Source: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018 (arXiv
    1801.10112): the best earlier score minus the last one.

    Args:
        curve: scores on the task.
        first: round in which its first samples arrive.
        last: round in which its last samples arrive.

    Returns:
        A number in [-1, 1], negative if the last score is the best; None while the task's samples
        still arrive (nothing can be forgotten yet) or without an evaluation before the last one.
    """
    if not curve:
        return None
    end = max(curve)
    before = [value for round_idx, value in curve.items() if first <= round_idx < end]
    return max(before) - curve[end] if before and last < end else None


def forward_transfer(curve: Curve, first: int, untrained: float) -> float | None:
    """How much better than the base model a client does on a task before it sees its samples.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017
    (arXiv 1706.08840): the score just before the task arrives minus that of an untrained model.

    Args:
        curve: scores on the task.
        first: round in which its first samples arrive.
        untrained: score of the untouched base model.

    Returns:
        A number in [-1, 1]; None if no evaluation lies before ``first``.
    """
    before = [round_idx for round_idx in curve if 0 <= round_idx < first]
    return curve[max(before)] - untrained if before else None
