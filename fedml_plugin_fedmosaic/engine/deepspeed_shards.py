"""What this rank holds of the trained tensors under ZeRO: reading, writing, putting together.

DeepSpeed keeps three copies of a trained tensor apart: the tensor that the model computes with, a
float32 master copy of it, and AdamW's two moments, each cut into pieces over the ranks. Writing the
first alone changes one forward pass only: the next optimizer step overwrites it from the master
copy. So every write goes to both, and every read comes from the master copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import AdapterError, IntegrationError
from fedml_plugin_fedmosaic.core.types import AdapterKey, AdapterState, Moments, OptimizerState
from fedml_plugin_fedmosaic.engine.deepspeed_world import GroupWorld

_FIRST, _SECOND, _STEP = "exp_avg", "exp_avg_sq", "step"
Parameters = Mapping[AdapterKey, nn.Parameter]


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a parameter is cut over the ranks (ZeRO stage 3)."""
    return hasattr(parameter, "ds_tensor")


@torch.no_grad()
def write_weights(parameters: Parameters, state: AdapterState, rank: int) -> None:
    """Writes the tensors that the model computes with; every rank holds the whole ``state``.

    Args:
        parameters: of the model.
        state: a value for each of them.
        rank: this process inside its group.
    """
    for key, parameter in parameters.items():
        value = state[key]
        if not is_partitioned(parameter):
            parameter.copy_(value)
            continue
        partitioned: Any = parameter
        _fill(partitioned.ds_tensor, value, rank * partitioned.ds_tensor.ds_numel)
        if parameter.numel() == partitioned.ds_numel:
            # Small tensors stay whole on every rank.
            parameter.copy_(value)


def _fill(piece: Tensor, value: Tensor, start: int) -> None:
    """Copies the elements of ``value`` from ``start`` on; the padding at the end stays."""
    flat = value.reshape(-1)
    count = min(piece.numel(), flat.numel() - start)
    if count > 0:
        piece.view(-1)[:count].copy_(flat[start : start + count])


class Shards:
    """The pieces of one ZeRO optimizer.

    Args:
        zero: DeepSpeed's optimizer, around a ``torch.optim.AdamW``.
        stage: ZeRO stage.
        world: the rank group.

    Raises:
        IntegrationError: the optimizer is of a kind whose pieces are not known.
    """

    def __init__(self, zero: Any, stage: int, world: GroupWorld) -> None:
        self._zero = zero
        self._stage = stage
        self._world = world
        name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
        if not hasattr(zero, name):
            raise IntegrationError(
                f"ZeRO stage {stage} gave a {type(zero).__name__}, whose master weights cannot be "
                "reached",
                hint="leave data_types.grad_accum_dtype out of the DeepSpeed file",
            )
        self._flat: Sequence[Tensor] = getattr(zero, name)
        self._scaler = dict(vars(zero.loss_scaler)) if hasattr(zero, "loss_scaler") else {}

    def write_masters(self, parameters: Parameters, state: AdapterState) -> None:
        """Writes the float32 master copies of trained parameters."""
        for key, parameter in parameters.items():
            self._write(parameter, state[key], None)

    def reset(self) -> None:
        """Forgets moments, steps and the loss scale: the optimizer is as it was when it was made.

        In place, because DeepSpeed keeps references to these tensors.
        """
        for state in self._zero.optimizer.state.values():
            for name in (_FIRST, _SECOND, _STEP):
                state[name].zero_()
        if self._scaler:
            vars(self._zero.loss_scaler).update(self._scaler)

    def write_moments(self, parameters: Parameters, moments: OptimizerState) -> None:
        """Gives trained parameters the moments they had.

        AdamW counts steps once per group of parameters here, not per parameter; if they differ,
        the group goes on from the largest.

        Raises:
            AdapterError: a tensor's moments have another shape than the tensor.
        """
        self._make_states()
        for key, parameter in parameters.items():
            saved = moments.get(key)
            if saved is None:
                continue
            shape = _shape(parameter)
            if saved.first.shape != shape or saved.second.shape != shape:
                raise AdapterError(
                    f"moments of {key}: shapes {tuple(saved.first.shape)} and "
                    f"{tuple(saved.second.shape)}, expected {tuple(shape)}",
                    hint="moments must come from the same adapter structure",
                )
            self._write(parameter, saved.first, _FIRST)
            self._write(parameter, saved.second, _SECOND)
        steps = [saved.step for key, saved in moments.items() if key in parameters]
        for state in self._zero.optimizer.state.values():
            state[_STEP].fill_(float(max(steps, default=0)))

    def read(self, parameters: Parameters) -> dict[AdapterKey, Tensor]:
        """The whole master copies, float32 on the CPU, gathered block by block."""
        return dict(self._gather(parameters, None))

    def read_moments(self, parameters: Parameters) -> dict[AdapterKey, Moments]:
        """The whole moments; empty before the first step."""
        states = list(self._zero.optimizer.state.values())
        if not states:
            return {}
        step = int(max(float(state[_STEP]) for state in states))
        first = dict(self._gather(parameters, _FIRST))
        second = dict(self._gather(parameters, _SECOND))
        return {key: Moments(step=step, first=first[key], second=second[key]) for key in first}

    def _gather(
        self, parameters: Parameters, state: str | None
    ) -> Iterable[tuple[AdapterKey, Tensor]]:
        for _, keys in groupby(sorted(parameters), key=lambda key: key.block):
            block = list(keys)
            sizes = [_shape(parameters[key]).numel() for key in block]
            buffer = torch.zeros(sum(sizes), device=self._world.device)
            for key, part in zip(block, torch.split(buffer, sizes), strict=True):
                piece, start = self._piece(parameters[key], state)
                count = min(piece.numel(), part.numel() - start)
                if count > 0:
                    part[start : start + count].copy_(piece.view(-1)[:count])
            self._world.merge_bits(buffer)
            for key, part in zip(block, torch.split(buffer.cpu(), sizes), strict=True):
                yield key, part.reshape(_shape(parameters[key])).clone()

    def _write(self, parameter: nn.Parameter, value: Tensor, state: str | None) -> None:
        piece, start = self._piece(parameter, state)
        _fill(piece, value, start)

    def _piece(self, parameter: Any, state: str | None) -> tuple[Tensor, int]:
        """This rank's piece, a view, and where it starts in the flat parameter."""
        if self._stage == 3:
            size = parameter.ds_tensor.ds_numel
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._flat[group]
            found = flat if state is None else self._zero.optimizer.state[flat][state]
            return found.detach().narrow(0, offset, size), self._world.rank * size
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            return torch.empty(0), 0
        address = mapping.hp_fragment_address
        flat = self._flat[mapping.param_group_index]
        found = flat if state is None else self._zero.optimizer.state[flat][state]
        piece = found.detach().narrow(0, address.start, address.numel)
        return piece, mapping.lp_fragment_address.start

    def _make_states(self) -> None:
        """What AdamW would make in its first step."""
        states = self._zero.optimizer.state
        for flat in self._flat:
            if not states.get(flat):
                states[flat] = {
                    _STEP: torch.zeros((), dtype=torch.float32, device=flat.device),
                    _FIRST: torch.zeros_like(flat),
                    _SECOND: torch.zeros_like(flat),
                }


def _shape(parameter: Any) -> torch.Size:
    shape: torch.Size = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


__all__ = ["Shards", "is_partitioned", "write_weights"]
