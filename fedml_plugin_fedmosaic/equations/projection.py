"""Random projections of whole adapters: what a server needs to compare clients' weights.

A projection is linear and shared by all clients, so means of projections are projections of means,
and inner products are kept in expectation, with a standard deviation of about
``|x| |y| / sqrt(width)`` (count sketch: Charikar, Chen and Farach-Colton 2002; as a random
projection: Weinberger et al. 2009, arXiv 0902.2206). What is not longer than the projection is
kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.rng import torch_generator


def project(tensors: Mapping[str, Tensor], width: int, seed: int) -> Tensor:
    """All tensors, flattened and joined in the order of their names, as one short vector.

    Every entry goes, with a random sign, to one of the outputs; outputs get equally many entries of
    each tensor, up to one.

    Args:
        tensors: any shapes, floating point, on the CPU; the same names and shapes for all clients
            that are compared.
        width: numbers of the projection.
        seed: root seed of the run; the projection depends on it, on the names and on the sizes.

    Returns:
        (width,) float32. If there are at most ``width`` entries: these, then zeros.

    Raises:
        PlanError: no tensor, a width below 1, or values that are not finite.
    """
    if not tensors or width < 1:
        raise PlanError(f"cannot project {len(tensors)} tensors to {width} numbers")
    flat = {name: tensors[name].detach().reshape(-1).to(torch.float32) for name in sorted(tensors)}
    total = sum(values.numel() for values in flat.values())
    if total <= width:
        vector = torch.zeros(width)
        vector[:total] = torch.cat(list(flat.values()))
    else:
        vector = sum(
            (_projected(values, name, width, seed) for name, values in flat.items()),
            start=torch.zeros(width),
        )
    if not bool(vector.isfinite().all()):
        raise PlanError(
            "the weights to be compared hold NaN or infinite values",
            hint="lower the learning rate of this client",
        )
    return vector


def _projected(values: Tensor, name: str, width: int, seed: int) -> Tensor:
    count = values.numel()
    generator = torch_generator(seed, "projection", name, count, width)
    layers = -(-count // width)
    places = torch.randperm(layers * width, generator=generator)[:count]
    signs = torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1)
    padded = torch.zeros(layers * width)
    padded[places] = values * signs
    return padded.view(layers, width).sum(dim=0)
