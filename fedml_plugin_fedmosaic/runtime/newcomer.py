"""A client that joins after the last round: its first adapter, its batches, its first updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError, DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.core.types import CHANNEL_PQ, AdapterState, Branch, View, channel_of
from fedml_plugin_fedmosaic.core.work import FitProgress, Pass
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.base import FitStopped
from fedml_plugin_fedmosaic.engine.torch import TorchEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """A client of the finished run.

    Attributes:
        signature: of its model; tensors of one layer mean the same inside one signature only.
        adapter: its tensors after the last round.
    """

    signature: str
    adapter: AdapterState


def aggregated_adapter(
    fresh: AdapterState, signature: str, donors: Sequence[Donor]
) -> AdapterState:
    """A new client's adapter with the mean of what the clients have trained.

    The local branch (what clients upload) is averaged with equal weights: P and Q per block over
    all clients, whatever their architecture, everything else over clients of the same signature.
    Tensors that no client has, the received branch and what all share stay fresh.

    Args:
        fresh: freshly initialised tensors of the new client's model.
        signature: of that model.
        donors: clients of the finished run, at least one.

    Returns:
        A state with the keys and shapes of ``fresh``, float32.

    Raises:
        CheckpointError: no tensor of any client fits.
    """
    by_name: list[dict[str, torch.Tensor]] = [
        {
            key.share_key: tensor
            for key, tensor in donor.adapter.items()
            if key.branch is Branch.LOCAL
            and (donor.signature == signature or channel_of(key.share_key) == CHANNEL_PQ)
        }
        for donor in donors
    ]
    found = dict(fresh)
    used = 0
    for key, own in fresh.items():
        if key.branch is not Branch.LOCAL:
            continue
        tensors = [
            named[key.share_key].double()
            for named in by_name
            if key.share_key in named and named[key.share_key].shape == own.shape
        ]
        if tensors:
            found[key] = torch.stack(tensors).mean(0).to(own.dtype)
            used += 1
    if not used:
        raise CheckpointError(
            f"no client's adapter fits a model of signature {signature}; the clients have "
            f"{', '.join(sorted({donor.signature for donor in donors}))}",
            hint="name a model of the run with --model, or use a strategy that shares P and Q",
        )
    return found


def training_batches(
    samples: Sequence[Sample], count: int, size: int, seed: int, task: str
) -> list[tuple[Sample, ...]]:
    """Batches of a new client: all its samples in random order, again and again.

    Raises:
        DataError: the task has no training samples.
    """
    if not samples:
        raise DataError(f"task {task!r} has no training samples to adapt to")
    rng = python_random(seed, "adaptation", task)
    drawn: list[Sample] = []
    while len(drawn) < count * size:
        drawn += rng.sample(list(samples), len(samples))
    return [tuple(drawn[start : start + size]) for start in range(0, count * size, size)]


class _Steps:
    """Stops a pass at a number of optimizer steps."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._done = 0

    def count(self, done: int, total: int) -> None:  # noqa: ARG002 - the engine's signature
        """Called after every step."""
        self._done = done

    def reached(self) -> bool:
        """Whether the pass is to stop."""
        return self._done >= self._wanted


def adapt(
    engine: TorchEngine,
    start: AdapterState,
    batches: Sequence[Sequence[Sample]],
    updates: Sequence[int],
    score: Callable[[AdapterState], float],
    seed: int,
) -> dict[int, float]:
    """Trains the local branch from a start and scores it after some numbers of optimizer steps.

    One pass with one optimizer: it is stopped at each of the numbers and then goes on.

    Args:
        engine: of the new client's model.
        start: all adapter tensors.
        batches: one per step, as many as the largest of ``updates``.
        updates: numbers of steps, ascending.
        score: of an adapter.
        seed: of dropout.

    Returns:
        Steps -> score.
    """
    scores = {0: score(start)} if 0 in updates else {}
    pass_ = Pass(
        name="adaptation",
        view=View.LOCAL,
        train=frozenset({Branch.LOCAL}),
        num_steps=len(batches),
    )
    progress: FitProgress | None = None
    for count in (number for number in updates if number > 0):
        steps = _Steps(count)
        try:
            result = engine.fit(
                pass_,
                start,
                batches,
                seed=seed,
                on_step=steps.count,
                progress=progress,
                should_stop=steps.reached,
            )
            adapter = result.adapter
        except FitStopped as stopped:
            progress = stopped.progress
            adapter = progress.adapter
        scores[count] = score(adapter)
    return scores


def check_updates(updates: Iterable[int]) -> tuple[int, ...]:
    """Numbers of optimizer steps, ascending and each once.

    Raises:
        ConfigError: there is none, or one is negative.
    """
    numbers = tuple(sorted(set(updates)))
    if not numbers or numbers[0] < 0:
        raise ConfigError("--updates: expected numbers of steps from 0, for example 0,5,10,20,50")
    return numbers
