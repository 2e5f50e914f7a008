"""What surrounds an optimizer step: randomness, learning rate, and whether its loss is finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

_WARM_UP = 0.1


class NonFiniteLossError(RuntimeError):
    """A training loss became infinite or not a number."""


def rate_factor(schedule: Literal["constant", "cosine"], step: int, num_steps: int) -> float:
    """Factor on the learning rates at a step of a pass; cosine has 10 % warm-up and ends at 0."""
    if schedule == "constant":
        return 1.0
    warm_up = math.ceil(_WARM_UP * num_steps)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up)))


def raise_unless_finite(model: str, value: float, step: int, num_steps: int) -> None:
    """Stops a training that cannot go on.

    Raises:
        NonFiniteLossError: the loss is infinite or not a number.
    """
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"the loss of model {model!r} is {value} at step {step + 1} of "
            f"{num_steps}; lower optim.learning_rate and optim.pq_learning_rate, set "
            "optim.max_grad_norm, or use dtype float32"
        )


@contextmanager
def own_generator(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Gives the model generators of its own; restores the global ones afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, device_type="cuda"):

        def reseed(seed: int) -> None:
            # torch.manual_seed would also queue a seed for every accelerator, with a stack trace.
            torch.default_generator.manual_seed(seed)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)

        yield reseed
