"""What may be sent and what is believed: updates before aggregation, headers on receipt.

A strategy's client half makes an update; the host framework's hooks (differential privacy, attacks,
defences) may change it. What reaches the communicator has the keys, shapes and dtype that the
client half gave it, only finite numbers, and a norm within the limits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import ClientFailure, CommError
from fedml_plugin_fedmosaic.core.types import ClientUpdate, SharedTensors, UpdateHeader

STAGE = "update"
"""Stage of a :class:`ClientFailure` that refuses an update."""

_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateShape:
    """What an update must look like.

    Attributes:
        client_id: who sends it.
        round_idx: 0-based round of its training.
        shapes: share key -> shape.
        sketch: shape of the sketch; None if it must have none.
    """

    client_id: int
    round_idx: int
    shapes: Mapping[str, tuple[int, ...]]
    sketch: tuple[int, ...] | None = None

    @classmethod
    def of(cls, update: ClientUpdate) -> UpdateShape:
        """The shape of an update as the client half made it, before any hook."""
        sketch = update.header.sketch
        return cls(
            client_id=update.header.client_id,
            round_idx=update.header.round_idx,
            shapes={key: tuple(tensor.shape) for key, tensor in update.tensors.items()},
            sketch=None if sketch is None else tuple(sketch.shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NormLimits:
    """Upper bounds of an update's L2 norm, taken over all its tensors together.

    Attributes:
        absolute: largest norm; None for no bound.
        growth: largest ratio to the norm of the client's last update; None for no bound.
    """

    absolute: float | None = None
    growth: float | None = None


def update_norm(tensors: SharedTensors) -> float:
    """L2 norm over all tensors, accumulated in float64; NaN or infinite if a value is."""
    return math.hypot(*(_norm(tensor) for tensor in tensors.values()))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def check_update(
    update: ClientUpdate,
    expected: UpdateShape,
    limits: NormLimits | None = None,
    last: SharedTensors | None = None,
) -> None:
    """Refuses an update that must not be mixed.

    Args:
        update: what the client is about to send, or what the host framework made of it.
        expected: what it must look like.
        limits: bounds of its norm; none when omitted.
        last: the tensors of the client's last accepted update, for ``limits.growth``.

    Raises:
        ClientFailure: stage "update": a key is unknown or missing; a tensor is not a dense float32
            CPU tensor, has another shape, or holds NaN or infinite values (the key is named); the
            norm is too large; or the header does not belong to the update. Stage "sketch": the
            header's sketch is wrong in one of these ways, or is missing.
    """
    hostile = _sketch_problem(update.header.sketch, expected.sketch)
    if hostile is not None:
        reason = f"refused: {hostile}"
        raise ClientFailure(expected.client_id, expected.round_idx, "sketch", reason)
    problem = (
        _header_problem(update.header, expected)
        or _key_problem(update.tensors, expected.shapes)
        or next(
            (
                f"{key} {found}"
                for key, shape in sorted(expected.shapes.items())
                if (found := _tensor_problem(update.tensors[key], shape))
            ),
            None,
        )
        or _norm_problem(update.tensors, limits or NormLimits(), last)
    )
    if problem is not None:
        raise ClientFailure(expected.client_id, expected.round_idx, STAGE, f"refused: {problem}")


def _header_problem(header: UpdateHeader, expected: UpdateShape) -> str | None:
    claimed = (header.client_id, header.round_idx)
    if claimed != (expected.client_id, expected.round_idx):
        return (
            f"its header names client {header.client_id}, round {header.round_idx + 1}; expected "
            f"client {expected.client_id}, round {expected.round_idx + 1}"
        )
    if type(header.num_examples) is not int or header.num_examples < 0:
        return f"num_examples is {header.num_examples!r}; expected a whole number >= 0"
    return None


def _sketch_problem(sketch: Tensor | None, shape: tuple[int, ...] | None) -> str | None:
    if shape is None:
        return None if sketch is None else "it carries a sketch, but none was expected"
    if sketch is None:
        return f"it carries no sketch; expected one of shape {shape}"
    found = _tensor_problem(sketch, shape)
    return None if found is None else f"the sketch {found}"


def _key_problem(tensors: SharedTensors, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    unknown, missing = sorted(set(tensors) - set(shapes)), sorted(set(shapes) - set(tensors))
    found = [f"unknown {key}" for key in unknown] + [f"missing {key}" for key in missing]
    if not found:
        return None
    rest = len(found) - _NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"its keys differ: {', '.join(found[:_NAMED])}{more}"


def _tensor_problem(tensor: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with one tensor, as the end of a sentence; None if nothing is."""
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}; expected a tensor"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.layout} on {tensor.device}; expected a dense tensor on the CPU"
    if tensor.dtype != torch.float32:
        return f"is {tensor.dtype}; expected torch.float32"
    if tuple(tensor.shape) != shape:
        return f"has shape {tuple(tensor.shape)}; expected {shape}"
    if not math.isfinite(_norm(tensor)):
        broken = int((~torch.isfinite(tensor)).sum())
        return f"holds {broken} NaN or infinite values among {tensor.numel()}"
    return None


def _norm_problem(
    tensors: SharedTensors, limits: NormLimits, last: SharedTensors | None
) -> str | None:
    if limits.absolute is None and limits.growth is None:
        return None
    norm = update_norm(tensors)
    # A single tensor is easier to look at than the whole update.
    largest = max(tensors, key=lambda key: _norm(tensors[key]), default="no tensor")
    where = f"its norm {norm:.4g} (largest tensor {largest})"
    if limits.absolute is not None and norm > limits.absolute:
        return f"{where} is above faults.max_update_norm {limits.absolute:g}"
    before = update_norm(last) if limits.growth is not None and last else 0.0
    if limits.growth is not None and before > 0 and norm > limits.growth * before:
        return (
            f"{where} is {norm / before:.4g} times that of the client's last update; "
            f"faults.max_norm_growth is {limits.growth:g}"
        )
    return None


def check_headers(
    headers: Sequence[UpdateHeader], *, cohort: Collection[int], round_idx: int
) -> None:
    """Checks the claims of all ranks' headers on receipt; the same result on every rank.

    Args:
        headers: what :meth:`Communicator.exchange_headers` returned.
        cohort: clients that were asked to train.
        round_idx: the round that everyone is in.

    Raises:
        CommError: a header names a client outside the cohort, another round, an impossible number
            of examples, or holds a sketch that is no matrix or differs in shape from the others.
    """
    shapes: dict[tuple[int, ...], int] = {}
    for header in headers:
        where = f"the header of client {header.client_id}, round {round_idx + 1}"
        if header.client_id not in cohort:
            raise CommError(
                f"{where}: the client is not in the round's cohort {sorted(cohort)}",
                hint="all ranks must run the same configuration",
            )
        if header.round_idx != round_idx:
            raise CommError(f"{where} belongs to round {header.round_idx + 1}")
        if header.num_examples < 0:
            raise CommError(f"{where} claims {header.num_examples} examples")
        if header.sketch is None:
            continue
        # Whether it is finite has been checked by its owner, without reading everyone's again.
        if header.sketch.ndim != 2:
            raise CommError(f"{where}: a sketch of shape {tuple(header.sketch.shape)} is no matrix")
        shapes.setdefault(tuple(header.sketch.shape), header.client_id)
    if len(shapes) > 1:
        raise CommError(
            "sketches have different shapes: "
            + ", ".join(f"client {client} {shape}" for shape, client in shapes.items()),
            hint="all clients must use the same proxy model and the same sketch settings",
        )
