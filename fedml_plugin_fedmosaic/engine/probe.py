"""Losses, logits and hidden states of several models on the same samples, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.config.sections import OptimConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import View
from fedml_plugin_fedmosaic.core.work import Probe, ProbeResult
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.losses import cross_entropy, supervised
from fedml_plugin_fedmosaic.engine.objectives import num_models, view_logits
from fedml_plugin_fedmosaic.engine.processor import Batch, Processor
from fedml_plugin_fedmosaic.engine.sets import AdapterSets
from fedml_plugin_fedmosaic.engine.tally import Tally, means


@torch.no_grad()
def run_probe(
    probe: Probe,
    adapter: InjectedAdapter,
    sets: AdapterSets,
    samples: Sequence[Sample],
    processor: Processor,
    optim: OptimConfig,
    tally: Tally,
) -> ProbeResult:
    """Looks at models; see ``TorchEngine.probe``.

    Args:
        probe: which models, and what of them.
        adapter: in a model in evaluation mode, with the client's tensors.
        sets: of the client.
        samples: what they are shown; one label's losses are means over each task's samples.
        processor: of the model.
        optim: samples per forward pass.
        tally: takes the costs.

    Raises:
        AdapterError: hidden states of a view that is two models.
    """
    losses: dict[str, dict[str, float]] = {}
    tensors: dict[str, Tensor] = {}
    labels: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.task] = counts.get(sample.task, 0) + 1
    for label, model in sorted(probe.models.items()):
        own = Tally(0, counts)
        only = probe.tasks.get(label)
        shown = [sample for sample in samples if only is None or sample.task in only]
        with sets.laid(model.overlay):
            for start in range(0, len(shown), optim.batch_size):
                part = shown[start : start + optim.batch_size]
                inputs, positions, _ = processor.encode_supervised(part)
                logits = view_logits(adapter, model.view, inputs, positions)
                tally.passes(inputs, forwards=num_models(model.view))
                own.losses(part, cross_entropy(_Known(logits), inputs, positions))
                if probe.what == "loss":
                    continue
                values = logits
                if probe.what == "hidden":
                    values = _hidden(adapter, model.view, inputs, positions)
                    tally.passes(inputs, forwards=1)
                mask = supervised(inputs, positions)
                targets = inputs["labels"].index_select(1, positions + 1)
                for row, sample in enumerate(part):
                    chosen = values[row, mask[row]].to(device="cpu", dtype=torch.float32)
                    tensors[f"{label}/{sample.key}"] = chosen.contiguous()
                    labels[sample.key] = tuple(targets[row, mask[row]].tolist())
        losses[label] = means(own.sums())
    return ProbeResult(
        losses=losses, counts=counts, tensors=tensors, labels=labels, flops=tally.flops()
    )


def _hidden(adapter: InjectedAdapter, view: View, inputs: Batch, positions: Tensor) -> Tensor:
    """Last hidden states at the positions, ``(n, k, width)``."""
    if view is View.ENSEMBLE:
        raise AdapterError("an ensemble of two models has no hidden states of its own")
    adapter.set_view(view)
    model: Any = adapter.model
    given = {key: value for key, value in inputs.items() if key != "labels"}
    output = model(**given, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    last: Tensor = output.hidden_states[-1]
    return last.index_select(1, positions)


class _Known:
    """Stands for a model whose logits are known already."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **_: Any) -> _Known:
        return self
