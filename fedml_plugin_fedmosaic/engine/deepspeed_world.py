"""The torch.distributed world of one rank group, and the little that its ranks tell each other.

Several rank groups live in one MPI job, so nothing here may look at MPI: a group meets over TCP at
the address that its :class:`~fedml_plugin_fedmosaic.core.types.ProcessWorld` names, with gloo on
the CPU and nccl on CUDA devices. Buffers only; nothing is pickled.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from fedml_plugin_fedmosaic.core.errors import AdapterError, CommError
from fedml_plugin_fedmosaic.core.types import ProcessWorld

_LOCAL_RANK_OF_MPI = "OMPI_COMM_WORLD_LOCAL_RANK"


class GroupWorld:
    """The ranks that train one client together; open as long as the process lives.

    Args:
        world: where the group meets.
        device: decides between gloo and nccl, and where buffers are.
        timeout_s: longest wait for another rank, in seconds.

    Attributes:
        world: as given.
        device: as given.
        rank: this process inside the group.
        size: ranks of the group.

    Raises:
        CommError: the group cannot meet, or this process already belongs to another world.
    """

    def __init__(self, world: ProcessWorld, device: torch.device, timeout_s: float) -> None:
        self.world = world
        self.device = device
        self.rank = world.rank
        self.size = world.size
        self._open(timeout_s)

    def _open(self, timeout_s: float) -> None:
        where = f"rank {self.rank} of a group of {self.size}"
        if distributed.is_initialized():
            found = (distributed.get_rank(), distributed.get_world_size())
            if found != (self.rank, self.size):
                raise CommError(
                    f"{where}: torch.distributed is already open as rank {found[0]} of {found[1]}",
                    hint="a process belongs to one rank group for the whole run",
                )
            return
        address = f"[{self.world.address}]" if ":" in self.world.address else self.world.address
        try:
            distributed.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                init_method=f"tcp://{address}:{self.world.port}",
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise CommError(
                f"{where}: cannot meet the others at {address}:{self.world.port}: {error}",
                hint="the ranks of a group must reach each other over TCP; see the docs on ranks",
            ) from error
        atexit.register(_close)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """The variables that DeepSpeed insists on, as this group sees the world.

        DeepSpeed compares ``LOCAL_RANK`` with what Open MPI says of the whole job, which is another
        number as soon as a group is smaller than the job.
        """
        index = self.device.index if self.device.type == "cuda" else None
        local_rank = self.world.local_rank if index is None else index
        wanted = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": self.world.address,
            "MASTER_PORT": str(self.world.port),
        }
        before = {name: os.environ.get(name) for name in (*wanted, _LOCAL_RANK_OF_MPI)}
        os.environ.pop(_LOCAL_RANK_OF_MPI, None)
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, float64; every rank gets them."""
        buffer = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(buffer)
        return [float(value) for value in buffer.tolist()]

    def merge_bits(self, buffer: Tensor) -> None:
        """Puts pieces together in place: each float32 element is non-zero on one rank at most.

        Added as integers, so that every bit survives, the sign of a zero too.
        """
        if self.size > 1:
            distributed.all_reduce(buffer.view(torch.int32))

    def lead(self, buffer: Tensor) -> Tensor:
        """The first rank's tensor, in place of the others' of the same shape."""
        if self.size > 1:
            distributed.broadcast(buffer, src=0)
        return buffer

    def texts(self, text: str) -> tuple[str, ...]:
        """Every rank's text, by rank."""
        if self.size == 1:
            return (text,)
        data = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(data)], device=self.device))
        longest = int(torch.stack(lengths).max())
        if longest == 0:
            return ("",) * self.size
        mine = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        everyone = [torch.zeros_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine)
        return tuple(
            bytes(buffer[: int(length)].tolist()).decode()
            for buffer, length in zip(everyone, lengths, strict=True)
        )


def _close() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def nothing_to_broadcast(deepspeed: Any) -> Iterator[None]:
    """Every rank has loaded the same model and drawn the same adapter; sending it is a waste.

    It would also fail: DeepSpeed cannot broadcast a tensor without axes, such as a scalar gate.
    """
    engine_class = deepspeed.DeepSpeedEngine
    before = engine_class._broadcast_model
    engine_class._broadcast_model = lambda _: None
    try:
        yield
    finally:
        engine_class._broadcast_model = before


class AllRanks:
    """A sharded model in evaluation: every rank runs the same passes and sees the same logits.

    Equal logits on all ranks make equal decisions (when a text ends, say), so that no rank stops
    while others wait for its part of the weights.
    """

    def __init__(self, engine: Any, group: GroupWorld) -> None:
        self._engine = engine
        self._group = group

    def __call__(self, **inputs: Any) -> Any:
        """One forward pass; the leader's logits on every rank."""
        # Weights that are gathered in inference mode could not be trained afterwards.
        with torch.inference_mode(mode=False), torch.no_grad():
            output = self._engine(**inputs)
            output.logits = self._group.lead(output.logits.contiguous())
            return output


def one_rank_only(what: str) -> AdapterError:
    """The error for work that several ranks cannot do together."""
    return AdapterError(
        f"{what}: DeepSpeed trains and evaluates one view with the task loss only",
        hint="train this strategy with ranks: 1 and engine: torch for all models",
    )
