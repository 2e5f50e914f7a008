"""What a pass has cost and how each task fares in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.data.base import Sample

FORWARD_FLOPS = 2.0
BACKWARD_FLOPS = 4.0
"""Per parameter and token: a multiplication and an addition, and twice that for two gradients."""

Total = Callable[[Sequence[float]], Sequence[float]]


class Tally:
    """Sums over the steps of a pass; losses stay on the device until they are asked for.

    Args:
        num_parameters: of the base model.
        tasks: of all samples of the pass.
        before: task -> (sum, samples) of the finished steps.
        flops: of the finished steps.
    """

    def __init__(
        self,
        num_parameters: int,
        tasks: Iterable[str],
        before: Mapping[str, tuple[float, int]] | None = None,
        flops: float = 0.0,
    ) -> None:
        self._num_parameters = num_parameters
        self._tasks = sorted(set(tasks))
        self._before = dict(before or {})
        self._seen: list[tuple[list[str], Tensor]] = []
        self._flops_before = flops
        self._tokens = 0.0

    def losses(self, samples: Sequence[Sample], values: Tensor) -> None:
        """Notes each sample's loss, float ``(n,)``."""
        self._seen.append(([sample.task for sample in samples], values.detach()))

    def passes(
        self, inputs: Mapping[str, Tensor], *, forwards: int = 0, backwards: int = 0
    ) -> None:
        """Notes passes over a batch."""
        per_token = FORWARD_FLOPS * forwards + BACKWARD_FLOPS * backwards
        self._tokens += per_token * inputs["input_ids"].numel()

    def flops(self, total: Total = list) -> float:
        """Floating-point operations so far.

        Args:
            total: adds over the ranks that train together.
        """
        return self._flops_before + total([self._tokens])[0] * self._num_parameters

    def sums(self, total: Total = list) -> dict[str, tuple[float, int]]:
        """Task -> (sum of losses, samples), for tasks with samples.

        Args:
            total: adds over the ranks that train together.
        """
        own = {task: [0.0, 0.0] for task in self._tasks}
        if self._seen:
            values = torch.cat([value.to(torch.float64) for _, value in self._seen]).tolist()
            names = [task for tasks, _ in self._seen for task in tasks]
            for task, value in zip(names, values, strict=True):
                own[task][0] += value
                own[task][1] += 1
        flat = total([number for task in self._tasks for number in own[task]])
        sums: dict[str, tuple[float, int]] = {}
        for index, task in enumerate(self._tasks):
            loss, count = self._before.get(task, (0.0, 0))
            sums[task] = (loss + flat[2 * index], count + int(flat[2 * index + 1]))
        return {task: entry for task, entry in sums.items() if entry[1]}


def means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Task -> mean loss."""
    return {task: loss / count for task, (loss, count) in sums.items()}
