"""Does the work that a client half asks for, without models: random steps, losses and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.rng import torch_generator
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    ClientContext,
    ClientState,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import (
    LocalResult,
    Pass,
    Probe,
    ProbeResult,
    Result,
    Samples,
    Work,
)

SAMPLES = 3
"""Samples that a probe sees; public ones have the same keys for all clients."""
TOKENS = 2
VOCABULARY = 7
WIDTH = 5


def do_turns(
    half: Any,
    downlink: SharedTensors,
    state: ClientState,
    context: ClientContext,
) -> tuple[ClientState, LocalResult, list[Work]]:
    """All turns of a stage: the state, the last pass's result, and what was asked for."""
    state, works = half.prepare(downlink, state, context)
    last = LocalResult(
        adapter=state.adapter, losses=(), num_examples=0, num_tokens=0, duration_s=0.0
    )
    done: list[Work] = []
    for _ in range(100):
        if not works:
            return state, replace(last, adapter=state.adapter if not done else last.adapter), done
        results: dict[str, Result] = {}
        for work in works:
            assert work.name not in results, "names of a turn's work are unique"
            done.append(work)
            if isinstance(work, Pass):
                last, state = toy_fit(work, state, context)
                results[work.name] = last
            else:
                results[work.name] = toy_probe(work, state, context)
        state, works = half.advance(results, state, context)
    raise AssertionError("a client half that never ends its turn")


def laid_over(state: ClientState, overlay: tuple[str, ...]) -> dict[Any, Tensor]:
    merged = dict(state.adapter)
    for name in overlay:
        merged.update(state.sets[name])
    return merged


def toy_fit(
    pass_: Pass, state: ClientState, context: ClientContext
) -> tuple[LocalResult, ClientState]:
    """Adds random steps to what the pass trains, and puts it where the pass says."""
    generator = torch_generator(
        context.seed, "fit", state.client_id, context.round_idx, context.stage, pass_.name
    )

    def moved(tensors: AdapterState) -> dict[Any, Tensor]:
        return {
            key: tensor + torch.randn(tensor.shape, generator=generator)
            for key, tensor in sorted(tensors.items())
        }

    base = laid_over(state, pass_.overlay)
    branches = {branch for item in pass_.objectives for branch in item.train}
    trained = moved({key: value for key, value in base.items() if key.branch in branches})
    routed = {name: moved(state.sets[name]) for name in dict.fromkeys(pass_.route.values())}
    sets, adapter = {**state.sets, **routed}, state.adapter
    if pass_.into:
        sets[pass_.into] = {**sets.get(pass_.into, {}), **trained}
    else:
        adapter = {**{key: value.clone() for key, value in adapter.items()}, **trained}
    result = LocalResult(
        adapter={**{key: value.clone() for key, value in base.items()}, **trained},
        losses=(1.0,) * pass_.num_steps,
        num_examples=20,
        num_tokens=40,
        duration_s=0.1,
        sets=routed,
        task_losses=dict.fromkeys(context.manifest.tasks, 1.0),
    )
    return result, replace(state, adapter=adapter, sets=sets)


def toy_probe(probe: Probe, state: ClientState, context: ClientContext) -> ProbeResult:
    """Random losses, logits and hidden states; finite, and of the right shapes."""
    for model in probe.models.values():
        laid_over(state, model.overlay)
    keys = sample_keys(probe.samples, context)
    keys = keys[: probe.limit]
    counts: dict[str, int] = {}
    for key in keys:
        task = key.rpartition("/")[0]
        counts[task] = counts.get(task, 0) + 1
    losses, tensors = {}, {}
    for label in probe.models:
        generator = torch_generator(
            context.seed, "probe", state.client_id, context.round_idx, probe.name, label
        )
        losses[label] = {task: float(torch.rand((), generator=generator)) for task in counts}
        if probe.what != "loss":
            width = VOCABULARY if probe.what == "logits" else WIDTH
            for key in keys:
                tensors[f"{label}/{key}"] = torch.randn(TOKENS, width, generator=generator)
    labels = {} if probe.what == "loss" else dict.fromkeys(keys, (1, 3))
    return ProbeResult(losses=losses, counts=counts, tensors=tensors, labels=labels)


def sample_keys(samples: Samples, context: ClientContext) -> list[str]:
    """Keys of the samples that a probe sees."""
    if samples is Samples.PUBLIC:
        return [f"public-0/{index}" for index in range(SAMPLES)]
    return [f"{task}/{index}" for task in context.manifest.tasks for index in range(SAMPLES)]


def toy_header(
    half: Any, state: ClientState, context: ClientContext, header: UpdateHeader
) -> UpdateHeader:
    """The header with the notes of a client that trains without a downlink."""
    state, result, _ = do_turns(half, {}, state, context)
    update: ClientUpdate = half.finish(result, state, context, header)[0]
    return update.header


def merged(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first with the channels of the second replaced."""
    channels = {name.partition("/")[0] for name in second}
    kept = {name: t for name, t in first.items() if name.partition("/")[0] not in channels}
    return {**kept, **second}
