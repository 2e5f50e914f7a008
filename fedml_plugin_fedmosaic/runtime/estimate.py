"""What a run will ask for: parameters, bytes sent, GPU memory per rank, and time per round.

Computed from the configuration, the scenario and the models' widths; no sample and no weight is
read. Times are floating-point operations over a given sustained throughput: communication, the
reading of images and the server's own work are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from fedml_plugin_fedmosaic.config.sections import DataConfig, Experiment, ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import SOURCES
from fedml_plugin_fedmosaic.data.scenario import ScenarioClient
from fedml_plugin_fedmosaic.engine.deepspeed_config import deal, read_deepspeed_json
from fedml_plugin_fedmosaic.engine.estimate import (
    BYTES,
    AdapterSize,
    Memory,
    SampleWork,
    Zero,
    activation_bytes,
    adapter_size,
    forward_flops,
    rank_memory,
    sketch_shape,
    training_flops,
)
from fedml_plugin_fedmosaic.engine.shapes import ModelShape, model_shape
from fedml_plugin_fedmosaic.launch.resources import default_resources
from fedml_plugin_fedmosaic.launch.topology import ClientLoad, Topology, plan_topology
from fedml_plugin_fedmosaic.runtime.setup import build_strategy
from fedml_plugin_fedmosaic.strategies.base import relative_steps

DEFAULT_TFLOPS = 150.0
"""Sustained throughput of one GPU: about 40 % of an A100's or 15 % of an H100's bf16 peak."""
_TEXT_TOKENS = 512
_PROMPT_TOKENS = 160
_IMAGES = 2
_FLOAT32 = 4


@runtime_checkable
class ScenarioSource(Protocol):
    """A data source that knows a scenario's clients without any sample."""

    def clients(self, config: DataConfig) -> tuple[ScenarioClient, ...]:
        """The clients of the scenario.

        Raises:
            DataError: there is no such scenario.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEstimate:
    """What a client of one model asks for.

    Attributes:
        name: the model's name in the configuration.
        num_clients: clients that have it.
        shape: its widths.
        size: its adapter.
        upload: values that a client sends per round, without the sketch.
        sample: of the work below.
        memory: of one rank, as configured.
        variants: the same under ``plain``, ``ZeRO-1`` and so on, over ``variant_ranks`` ranks.
        variant_ranks: see above.
        checkpointed: bytes of activations if layers are computed again in the backward pass.
        round_s: seconds of one client's round on the ranks that train it.
        scoring_s: seconds to answer 1,000 test samples with as many tokens as allowed.
    """

    name: str
    num_clients: int
    shape: ModelShape
    size: AdapterSize
    upload: int
    sample: SampleWork
    memory: Memory
    variants: Mapping[str, Memory]
    variant_ranks: int
    checkpointed: int
    round_s: float
    scoring_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What a whole run asks for.

    Attributes:
        models: by name.
        proxy: the model of the sketches; None if the strategy needs none.
        sketch: rows and columns of a sketch; None without.
        steps: optimizer steps of a client in a round.
        rounds: of the run.
        topology: which ranks train which clients.
        peak: bytes on the fullest GPU, where the models of all its clients stay loaded.
        round_s: seconds of a round: the longest group.
        tflops: the assumed throughput of one GPU, in 1e12 operations per second.
    """

    models: Mapping[str, ModelEstimate]
    proxy: str | None
    sketch: tuple[int, int] | None
    steps: int
    rounds: int
    topology: Topology
    peak: int
    round_s: float
    tflops: float

    @property
    def hours(self) -> float:
        """Hours of all rounds of local training."""
        return self.rounds * self.round_s / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs that the job holds."""
        return self.hours * self.topology.size


def scenario_clients(experiment: Experiment) -> list[tuple[int, str]] | None:
    """Client ids and their models, from the scenario alone; None if that cannot be said."""
    source = experiment.data.source
    if source not in SOURCES:
        return None
    feeder = SOURCES[source]()
    if not isinstance(feeder, ScenarioSource):
        return None
    return [(client.client_id, client.model_id) for client in feeder.clients(experiment.data)]


def estimate_run(
    experiment: Experiment,
    clients: Sequence[tuple[int, str]] | None = None,
    *,
    ranks: int | None = None,
    tflops: float = DEFAULT_TFLOPS,
    sample_tokens: int | None = None,
) -> RunEstimate:
    """Estimates a run.

    Args:
        experiment: validated configuration.
        clients: client ids and names of their models; those of the scenario when None.
        ranks: of the job; as a cluster would be asked when None.
        tflops: sustained throughput of one GPU, in 1e12 operations per second.
        sample_tokens: length of a sample, image tokens included; 512 for text, 160 and two images
            for image-text models when None.

    Raises:
        ConfigError: the widths of a model are not known, the scenario is not, or the ranks cannot
            train the clients.
        DataError: there is no such scenario.
    """
    found = scenario_clients(experiment) if clients is None else list(clients)
    if found is None:
        raise ConfigError(
            f"data set {experiment.data.source!r} does not say which clients it has before it is "
            "loaded",
            hint="use --dry-run, which loads it",
        )
    used = sorted({model for _, model in found})
    proxy = _proxy(experiment, used)
    shapes = _shapes(experiment, [*used, *([proxy] if proxy else [])])
    parts = _Parts(experiment, shapes, proxy, tflops * 1e12, sample_tokens)
    models = {name: parts.model(name, [m for _, m in found].count(name)) for name in used}
    topology = _topology(experiment, found, models, ranks)
    owner = dict(found)
    times = {client: models[name].round_s for client, name in found}
    return RunEstimate(
        models=models,
        proxy=proxy,
        sketch=None if proxy is None else sketch_shape(shapes[proxy], experiment.sketch),
        steps=parts.steps,
        rounds=experiment.train.comm_round,
        topology=topology,
        peak=max(
            _group_bytes([models[name] for name in {owner[c] for c in group.clients}])
            for group in topology.groups
            if group.clients
        ),
        round_s=max(sum(times[client] for client in group.clients) for group in topology.groups),
        tflops=tflops,
    )


def _group_bytes(models: Sequence[ModelEstimate]) -> int:
    """Bytes on a GPU that trains clients of these models, one after the other.

    Base models and adapters stay; gradients, moments and activations are those of one client at a
    time. A proxy that is one of the models is not loaded again.
    """
    stays = sum(model.memory.base + model.memory.adapter for model in models)
    alone = [model.memory for model in models]
    passing = max(memory.total - memory.base - memory.adapter - memory.proxy for memory in alone)
    return stays + passing + min(memory.proxy for memory in alone)


def _proxy(experiment: Experiment, used: Sequence[str]) -> str | None:
    if not build_strategy(experiment.algo, experiment).needs_sketch:
        return None
    if experiment.sketch.proxy is not None:
        return experiment.sketch.proxy
    shapes = _shapes(experiment, used)
    return min(shapes, key=lambda name: (shapes[name].parameters, name))


def _shapes(experiment: Experiment, names: Sequence[str]) -> dict[str, ModelShape]:
    shapes: dict[str, ModelShape] = {}
    for name in dict.fromkeys(names):
        if name not in experiment.models:
            raise ConfigError(
                f"the scenario uses model {name!r} that model_args.models does not define; "
                f"defined: {', '.join(experiment.models) or 'none'}"
            )
        spec = experiment.models[name]
        shape = model_shape(name, spec, experiment.adapter.target_modules)
        if shape is None:
            raise ConfigError(
                f"model {name!r}: the widths of {spec.path} are not known",
                hint=f"run 'fedmosaic models fetch {spec.path}' first; widths of the published "
                "Llama 3 and Qwen2.5 models are built in",
            )
        shapes[name] = shape
    return shapes


def _topology(
    experiment: Experiment,
    clients: Sequence[tuple[int, str]],
    models: Mapping[str, ModelEstimate],
    ranks: int | None,
) -> Topology:
    if ranks is None:
        ranks = default_resources(experiment).num_tasks
    loads = [
        ClientLoad(
            client_id=client,
            ranks=experiment.models[name].ranks,
            cost=models[name].shape.parameters,  # as the run itself plans
        )
        for client, name in clients
    ]
    return plan_topology(ranks, loads)


class _Parts:
    """Estimates of single models, with what they have in common."""

    def __init__(
        self,
        experiment: Experiment,
        shapes: Mapping[str, ModelShape],
        proxy: str | None,
        flops: float,
        sample_tokens: int | None,
    ) -> None:
        self._exp = experiment
        self._shapes = shapes
        self._proxy = proxy
        self._flops = flops
        self._tokens = sample_tokens
        strategy = build_strategy(experiment.algo, experiment)
        chosen = experiment.adapter.type
        self._kind = strategy.adapter if chosen == "auto" else chosen
        self.steps = max(1, round(experiment.optim.num_steps * relative_steps(strategy)))
        self._zero = _zero(experiment)

    def model(self, name: str, num_clients: int) -> ModelEstimate:
        """The estimate of one model."""
        shape, spec = self._shapes[name], self._exp.models[name]
        size = adapter_size(shape, self._exp.adapter, self._kind)
        sample = self._sample(shape)
        zero = self._zero_of(spec)
        variant_ranks = max(2, spec.ranks)
        return ModelEstimate(
            name=name,
            num_clients=num_clients,
            shape=shape,
            size=size,
            upload=size.upload if num_clients > 1 else size.pq or size.upload,
            sample=sample,
            memory=self._memory(name, size, sample, zero),
            variants={
                label: self._memory(name, size, sample, variant)
                for label, variant in _variants(variant_ranks).items()
            },
            variant_ranks=variant_ranks,
            checkpointed=self._activations(shape, spec, sample, zero, checkpointing=True),
            round_s=self._round_s(shape, size, sample, spec),
            scoring_s=self._scoring_s(shape, size, sample),
        )

    def _sample(self, shape: ModelShape) -> SampleWork:
        if not shape.image_tokens:
            return SampleWork(tokens=self._tokens or _TEXT_TOKENS, images=0)
        if self._tokens is None:
            return SampleWork(tokens=_PROMPT_TOKENS + _IMAGES * shape.image_tokens, images=_IMAGES)
        return SampleWork(tokens=self._tokens, images=self._tokens // shape.image_tokens)

    def _zero_of(self, spec: ModelSpec) -> Zero:
        if not spec.sharded:
            return Zero()
        stage, offload_optimizer, offload_parameters, live = self._zero
        return Zero(
            stage=stage,
            ranks=spec.ranks,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            live=live,
        )

    def _memory(self, name: str, size: AdapterSize, sample: SampleWork, zero: Zero) -> Memory:
        shape, spec = self._shapes[name], self._exp.models[name]
        beside = None
        if self._proxy is not None and (self._proxy != name or zero.stage == 3):
            beside = (self._shapes[self._proxy], self._exp.models[self._proxy])
        activations = self._activations(
            shape, spec, sample, zero, checkpointing=self._exp.engine.gradient_checkpointing
        )
        return rank_memory(shape, size, spec, zero, activations=activations, proxy=beside)

    def _activations(
        self,
        shape: ModelShape,
        spec: ModelSpec,
        sample: SampleWork,
        zero: Zero,
        *,
        checkpointing: bool,
    ) -> int:
        optim = self._exp.optim
        micro = optim.batch_size if zero.stage == 0 else deal(optim, zero.ranks).micro
        return activation_bytes(
            shape,
            self._exp.adapter,
            self._kind,
            tokens=micro * sample.tokens,
            base_bytes=BYTES[spec.dtype],
            adapter_bytes=_FLOAT32 if zero.stage == 0 else BYTES[spec.dtype],
            checkpointing=checkpointing,
        )

    def _round_s(
        self, shape: ModelShape, size: AdapterSize, sample: SampleWork, spec: ModelSpec
    ) -> float:
        optim, sketch = self._exp.optim, self._exp.sketch
        batch = optim.batch_size * optim.grad_accumulation
        checkpointing = self._exp.engine.gradient_checkpointing
        one = training_flops(shape, size, sample, checkpointing=checkpointing)
        seconds = self.steps * batch * one / (spec.ranks * self._flops)
        if self._proxy is not None:
            gradients = math.ceil(self.steps / sketch.frequency)
            samples = batch if sketch.samples == "update" else 1
            proxy = self._shapes[self._proxy]
            # On the leader alone; the same sample in the proxy's own image tokens.
            seconds += gradients * samples * forward_flops(proxy, sample) / self._flops
        return seconds

    def _scoring_s(self, shape: ModelShape, size: AdapterSize, sample: SampleWork) -> float:
        """Every rank of a group runs the whole batch, so its size does not matter."""
        prompt = forward_flops(shape, sample, extra=size.resident)
        answer = 2.0 * (shape.decoder_parameters + shape.hidden * shape.vocab + size.resident)
        tokens = self._exp.evaluation.max_new_tokens
        if self._exp.evaluation.mode == "likelihood":
            tokens = 0
        return 1000 * (prompt + tokens * answer) / self._flops


def _variants(ranks: int) -> dict[str, Zero]:
    variants = {"plain": Zero()}
    for stage in (1, 2, 3):
        variants[f"ZeRO-{stage}"] = Zero(stage=stage, ranks=ranks)
    variants["ZeRO-3 offload"] = Zero(
        stage=3, ranks=ranks, offload_optimizer=True, offload_parameters=True
    )
    return variants


def _zero(experiment: Experiment) -> tuple[Literal[1, 2, 3], bool, bool, int]:
    """Stage, what is offloaded, and live parameters of the run's DeepSpeed file."""
    section: dict[str, Any] = {}
    if experiment.engine.deepspeed is not None:
        section = read_deepspeed_json(experiment.engine.deepspeed).get("zero_optimization", {})
    stage = section.get("stage", 2)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"engine_args.deepspeed: zero_optimization.stage: expected 1, 2 or 3, got {stage!r}"
        )

    def offloaded(key: str) -> bool:
        return bool((section.get(key) or {}).get("device") == "cpu")

    live = section.get("stage3_max_live_parameters", 1e9)
    return (
        stage,
        offloaded("offload_optimizer"),
        offloaded("offload_param"),
        int(live) if isinstance(live, int | float) else 10**9,
    )
