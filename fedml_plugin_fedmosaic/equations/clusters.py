"""Clusters of clients: k-means with a start that depends on the points only.

Source: the E and M steps of FeSEM (multi-center federated learning, arXiv 2005.01026). The start is
farthest-first traversal (Gonzalez 1985) from the point nearest to the mean, so that neither a seed
nor the names of clients decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError


def farthest_first(points: Tensor, count: int) -> Tensor:
    """Centres far from each other.

    Args:
        points: (n, d) floating point, n >= 1.
        count: centres wanted.

    Returns:
        (min(count, n), d), rows of ``points``: the one nearest to the mean, then always the one
        with the largest distance to its nearest centre; of equal ones the first.

    Raises:
        PlanError: no point, or fewer than one centre.
    """
    if points.ndim != 2 or len(points) == 0 or count < 1:
        raise PlanError(f"cannot choose {count} centres among points {tuple(points.shape)}")
    chosen = [int(squared_distances(points, points.mean(dim=0, keepdim=True)).argmin())]
    nearest = squared_distances(points, points[chosen]).amin(dim=1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, squared_distances(points, points[chosen[-1:]])[:, 0])
    return points[chosen].clone()


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """(n, m) float64 squared Euclidean distances of (n, d) points and (m, d) centres."""
    differences = points.double()[:, None, :] - centres.double()[None, :, :]
    return differences.square().sum(dim=2)


def alternate(
    points: Tensor, centres: Tensor, weights: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """E and M steps until nothing changes.

    E: every point goes to its nearest centre (of equal ones the first). M: every centre becomes the
    weighted mean of its points; one without points stays.

    Args:
        points: (n, d).
        centres: (m, d), the start.
        weights: (n,) positive.
        iterations: largest number of E steps, at least 1.

    Returns:
        Which centre each point belongs to, (n,) int64, and the centres after the last M step.
    """
    centres = centres.clone()
    belongs = torch.full((len(points),), -1, dtype=torch.int64)
    for _ in range(iterations):
        found = squared_distances(points, centres).argmin(dim=1)
        if torch.equal(found, belongs):
            break
        belongs = found
        for centre in sorted({*belongs.tolist()}):
            mine = belongs == centre
            share = weights[mine].double() / weights[mine].double().sum()
            centres[centre] = (share @ points[mine].double()).to(centres.dtype)
    return belongs, centres
