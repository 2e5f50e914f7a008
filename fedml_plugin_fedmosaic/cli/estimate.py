"""The estimate of ``fedmosaic run``: its options, and its lines of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.config.sections import Experiment
    from fedml_plugin_fedmosaic.engine.estimate import Memory
    from fedml_plugin_fedmosaic.runtime.estimate import ModelEstimate, RunEstimate

_GIB = 2**30
_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What an estimate takes for granted.

    Attributes:
        tflops: sustained throughput of one GPU in 1e12 operations per second; None: the usual.
        sample_tokens: length of a sample, image tokens included; None: the usual.
    """

    tflops: float | None = None
    sample_tokens: int | None = None


def estimate_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--estimate``, ``--gpu-tflops`` and ``--sample-tokens``."""
    for decorate in (
        click.option(
            "--sample-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help="For the estimate: tokens of a sample with its images.",
        ),
        click.option(
            "--gpu-tflops",
            type=click.FloatRange(min=0, min_open=True),
            metavar="N",
            help="For the estimate: sustained TFLOP/s of one GPU; 150 by default.",
        ),
        click.option(
            "--estimate",
            is_flag=True,
            help="Print sizes, GPU memory and time only; needs no data, no weights and no GPU.",
        ),
    ):
        function = decorate(function)
    return function


def lines_of(
    experiment: Experiment,
    ranks: int | None,
    assumptions: Assumptions | None,
    clients: Sequence[tuple[int, str]] | None = None,
) -> list[tuple[str, str]]:
    """What a run asks for, as (label, value) lines.

    Args:
        experiment: validated configuration.
        ranks: of the job; as a cluster would be asked when None.
        assumptions: the usual ones when None.
        clients: ids and model names; from the scenario when None.

    Raises:
        ConfigError: something that decides the sizes is not known.
    """
    from fedml_plugin_fedmosaic.runtime.estimate import DEFAULT_TFLOPS, estimate_run

    given = assumptions or Assumptions()
    found = estimate_run(
        experiment,
        clients,
        ranks=ranks,
        tflops=given.tflops or DEFAULT_TFLOPS,
        sample_tokens=given.sample_tokens,
    )
    return estimate_lines(found, on_gpu=experiment.device.using_gpu)


def estimate_lines(estimate: RunEstimate, *, on_gpu: bool) -> list[tuple[str, str]]:
    """(label, value) lines: what is trained, sent and held, and how long it takes.

    Args:
        estimate: of a run.
        on_gpu: whether the run trains on GPUs; times are for GPUs and left out otherwise.
    """
    lines: list[tuple[str, str]] = []
    for model in estimate.models.values():
        lines += _model_lines(model, on_gpu=on_gpu)
    if estimate.sketch is not None:
        rows, columns = estimate.sketch
        lines.append(
            (
                "sketch",
                f"{rows} x {columns} of {estimate.proxy}: {_megabytes(rows * columns)} per client "
                "and round",
            )
        )
    if on_gpu:
        lines.append(("fullest GPU", f"{_gib(estimate.peak)} GiB"))
        lines += _time_lines(estimate)
    return lines


def _model_lines(model: ModelEstimate, *, on_gpu: bool) -> list[tuple[str, str]]:
    size, shape = model.size, model.shape
    parts = [f"layer-wise {size.conventional:,}"]
    if size.pq:
        parts = [f"P and Q {size.pq:,}", *parts, f"gate {size.gate:,}"]
    frozen = f"; frozen {size.frozen:,}" if size.frozen else ""
    lines = [
        (f"estimate {model.name}", f"{shape.parameters:,} parameters ({shape.source})"),
        ("  trained", f"{size.trainable:,} ({', '.join(parts)}){frozen}"),
        ("  sent", f"{_megabytes(model.upload)} per client and round, and as much received"),
    ]
    return [*lines, *_memory_lines(model)] if on_gpu else lines


def _memory_lines(model: ModelEstimate) -> list[tuple[str, str]]:
    memory = model.memory
    held = {
        "base": memory.base,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "AdamW": memory.optimizer,
        "gathered": memory.gathered,
        "activations": memory.activations,
        "proxy": memory.proxy,
    }
    parts = [f"{name} {_gib(value)}" for name, value in held.items() if value]
    if memory.activations != model.checkpointed:
        parts[parts.index(f"activations {_gib(memory.activations)}")] += (
            f" ({_gib(model.checkpointed)} with gradient_checkpointing)"
        )
    shown = ", ".join(parts)
    host = f"; {_gib(memory.host)} GiB offloaded" if memory.host else ""
    variants = ", ".join(f"{name} {_variant(value)}" for name, value in model.variants.items())
    return [
        ("  GiB per GPU", f"{_gib(memory.total)} ({shown}){host}"),
        (f"  on {model.variant_ranks} GPUs", f"GiB per GPU: {variants}"),
    ]


def _variant(memory: Memory) -> str:
    host = f" (+ {_gib(memory.host)} in host memory)" if memory.host else ""
    return f"{_gib(memory.total)}{host}"


def _time_lines(estimate: RunEstimate) -> list[tuple[str, str]]:
    from fedml_plugin_fedmosaic.report.numbers import seconds

    gpus = estimate.topology.size
    lines = [
        (
            "round",
            f"{seconds(estimate.round_s)} for {estimate.steps} steps on {gpus} GPU(s) at "
            f"{estimate.tflops:g} TFLOP/s each",
        ),
        (
            "training",
            f"{estimate.hours:.1f} h for {estimate.rounds} rounds, {estimate.gpu_hours:.1f} GPU "
            "hours; without communication and reading",
        ),
    ]
    scoring = ", ".join(
        f"{model.name} {seconds(model.scoring_s)}" for model in estimate.models.values()
    )
    lengths = ", ".join(
        sorted({f"{model.sample.tokens} tokens" for model in estimate.models.values()})
    )
    lines.append(("scoring", f"1,000 test samples with the longest answers: {scoring}"))
    lines.append(("assumed", f"samples of {lengths}, image tokens included (--sample-tokens)"))
    return lines


def _megabytes(values: int) -> str:
    """Float32 as sent, and bfloat16 as papers count it; 1 MB is 1e6 bytes."""
    return f"{_FLOAT32 * values / 1e6:.2f} MB ({2 * values / 1e6:.2f} in bfloat16)"


def _gib(value: float) -> str:
    return f"{value / _GIB:.1f}"
