"""A client that ran out of memory: what is said about it, and how its memory is given back."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import OutOfMemory
from fedml_plugin_fedmosaic.engine.memory import in_short, ran_out_of_memory, smaller_model

SKETCH, EVALUATE = "sketch", "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the clients of a run need memory for.

    Attributes:
        experiment: the run.
        models: client id -> name of its model.
        proxy: name of the model whose gradients are compared; None without sketches.
    """

    experiment: Experiment
    models: Mapping[int, str]
    proxy: str | None = None

    def reason(self, client_id: int, stage: str, error: BaseException) -> str:
        """The error in short, with the model, the batches and gradient checkpointing."""
        described = _described(self.experiment, self._model(client_id, stage), stage)
        return f"{in_short(error)} ({described})"

    def hint(self, client_id: int, stage: str) -> str:
        """Options of the configuration that lower the need."""
        advice = _advice(self.experiment, self._model(client_id, stage), stage)
        if stage == EVALUATE or self.experiment.faults.policy == "drop":
            return advice
        return f"{advice}; with faults.policy: drop such a client is left out of the round"

    def _model(self, client_id: int, stage: str) -> str | None:
        return self.proxy if stage == SKETCH else self.models.get(client_id)


@contextmanager
def evaluation_memory(experiment: Experiment, model: str) -> Iterator[None]:
    """Turns memory that runs out while a base model is evaluated into an error that says so.

    Raises:
        OutOfMemory: it did.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"evaluation of the base model: {in_short(error)} "
            f"({_described(experiment, model, EVALUATE)})",
            hint=_advice(experiment, model, EVALUATE),
        ) from error


def _described(experiment: Experiment, model: str | None, stage: str) -> str:
    kind = "proxy model" if stage == SKETCH else "model"
    parts = [] if model is None else [f"{kind} {model!r}"]
    if stage == EVALUATE:
        parts.append(f"batches of {_samples(experiment.evaluation.batch_size)}")
    else:
        parts.append(f"micro-batches of {_samples(experiment.optim.batch_size)}")
    if stage not in (SKETCH, EVALUATE):
        on = "on" if experiment.engine.gradient_checkpointing else "off"
        parts.append(f"gradient checkpointing {on}")
    return ", ".join(parts)


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"


def _advice(experiment: Experiment, model: str | None, stage: str) -> str:
    ways = []
    if stage == EVALUATE:
        if experiment.evaluation.batch_size > 1:
            ways.append(f"evaluation.batch_size: {experiment.evaluation.batch_size // 2}")
    else:
        ways += _smaller_batches(experiment)
        if stage != SKETCH and not experiment.engine.gradient_checkpointing:
            ways.append("engine_args.gradient_checkpointing: true")
    if model is not None and model in experiment.models:
        spec = experiment.models[model]
        ways += smaller_model(model, spec, using_gpu=experiment.device.using_gpu)
    text = f"set {', or '.join(ways)}; " if ways else ""
    return f"{text}'fedmosaic run --estimate' says what a client needs"


def _smaller_batches(experiment: Experiment) -> tuple[str, ...]:
    """Smaller micro-batches with as many samples per optimizer step as before."""
    size, steps = experiment.optim.batch_size, experiment.optim.grad_accumulation
    if size == 1:
        return ()
    factor = 2 if size % 2 == 0 else size
    return (f"optim.batch_size: {size // factor} with optim.grad_accumulation: {steps * factor}",)


def let_go(error: BaseException) -> bool:
    """Lets go of what the failed functions held: their tensors would live as long as the error.

    Returns:
        Whether memory had run out.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    out_of_memory = False
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        out_of_memory |= ran_out_of_memory(current)
        traceback.clear_frames(current.__traceback__)
        queue += [current.__cause__, current.__context__]
    return out_of_memory


def free_memory() -> None:
    """Gives memory that nobody uses back, on the accelerator, too: the next client may need it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
