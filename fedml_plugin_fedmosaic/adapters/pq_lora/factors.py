"""The tensors of an adapter layer: what they are called, which are trained, how they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.adapters.initial import kaiming_rows, orthonormal_rows
from fedml_plugin_fedmosaic.adapters.pq_lora.config import PQLoraConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, Part

Slot = tuple[Branch, Part]

SLOTS: Mapping[Slot, str] = {
    (Branch.SHARED, Part.A): "pq_lora_A",
    (Branch.SHARED, Part.B): "pq_lora_B",
    (Branch.SHARED, Part.GATE): "pq_lora_gate",
    (Branch.LOCAL, Part.P): "pq_lora_P_local",
    (Branch.LOCAL, Part.Q): "pq_lora_Q_local",
    (Branch.GLOBAL, Part.P): "pq_lora_P_global",
    (Branch.GLOBAL, Part.Q): "pq_lora_Q_global",
    (Branch.LOCAL, Part.A): "pq_lora_A_local",
    (Branch.LOCAL, Part.B): "pq_lora_B_local",
    (Branch.GLOBAL, Part.A): "pq_lora_A_global",
    (Branch.GLOBAL, Part.B): "pq_lora_B_global",
}
NEVER_TRAINED: frozenset[Slot] = frozenset({(Branch.SHARED, Part.A), (Branch.SHARED, Part.B)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a linear sits and how wide it is."""

    block: int
    layer: int
    module: str
    in_features: int
    out_features: int


def initial_values(config: PQLoraConfig, place: Place, *, is_pq: bool) -> dict[Slot, Tensor]:
    """Initial values of one layer.

    PQ layers: orthonormal A and B by block and module, so that equal widths get equal factors in
    every architecture; P = 0, Q = 0. Conventional layers: one Kaiming draw of A for both branches,
    B = 0. The gate starts in the middle.

    Args:
        config: what the adapter looks like.
        place: the linear.
        is_pq: PQ-LoRA instead of conventional dual LoRA.

    Returns:
        CPU tensors by slot; orthonormal ones in float64.

    Raises:
        AdapterError: the rank is larger than a width of a PQ layer's linear.
    """
    rank, seed = config.r, config.init_seed
    gate = torch.zeros(() if config.gate == "scalar" else (place.in_features,))
    values: dict[Slot, Tensor] = {(Branch.SHARED, Part.GATE): gate}
    if is_pq:
        where = f"layer {place.layer}, {place.module}"
        check_rank(rank, place.in_features, place.out_features, where)
        name = (place.block, place.module)
        values[Branch.SHARED, Part.A] = orthonormal_rows(rank, place.in_features, seed, *name, "A")
        columns = orthonormal_rows(rank, place.out_features, seed, *name, "B")
        values[Branch.SHARED, Part.B] = columns.T.contiguous()
    draw = None if is_pq else kaiming_rows(rank, place.in_features, seed, place.layer, place.module)
    for side in (Branch.LOCAL, Branch.GLOBAL):
        if draw is None:
            values[side, Part.P] = torch.zeros(rank, rank)
            values[side, Part.Q] = torch.zeros(rank)
        else:
            values[side, Part.A] = draw.clone()
            values[side, Part.B] = torch.zeros(place.out_features, rank)
    return values


def check_rank(rank: int, in_features: int, out_features: int, where: str) -> None:
    """Refuses a rank that orthonormal factors cannot have.

    Args:
        rank: rank.
        in_features: width that A's rows have.
        out_features: width that B's columns have.
        where: the linear, for the message.

    Raises:
        AdapterError: the rank is too large.
    """
    limit = min(in_features, out_features)
    if rank > limit:
        raise AdapterError(
            f"rank {rank} is too large for {where}: its linear is {in_features} -> "
            f"{out_features}, and orthonormal A and B need a rank of at most {limit}",
            hint=f"set adapter.rank to {limit} or less, or leave {where.rpartition(' ')[2]!r} out "
            "of adapter.target_modules",
        )
