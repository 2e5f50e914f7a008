"""A client as the loop sees it: its data over time, its engine, its state, its client half."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import AdapterError, DataError
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import (
    FitProgress,
    LocalResult,
    Pass,
    Probe,
    ProbeResult,
    Result,
    Samples,
    Served,
    Work,
)
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample
from fedml_plugin_fedmosaic.engine.base import ShouldStop, StepCallback
from fedml_plugin_fedmosaic.engine.factory import make_engine
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.equations.gradient import smooth
from fedml_plugin_fedmosaic.equations.translation import Wording
from fedml_plugin_fedmosaic.runtime.alignment import load_alignment, wants_alignment
from fedml_plugin_fedmosaic.runtime.alignment_files import Alignment
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals
from fedml_plugin_fedmosaic.runtime.supply import (
    balanced_batches,
    batch_size,
    one_epoch,
    set_aside,
    shuffled_batches,
    with_public,
)
from fedml_plugin_fedmosaic.strategies.base import TRAIN, Strategy, relative_steps


class EnginePool:
    """One engine per base model, made on first use; clients of a model take turns on it.

    Args:
        experiment: the run.
        bundles: base models by name.
        adapter: adapter of the strategy, unless the configuration names one.
    """

    def __init__(
        self, experiment: Experiment, bundles: Mapping[str, ModelBundle], adapter: str
    ) -> None:
        chosen = experiment.adapter.type
        self.adapter = adapter if chosen == "auto" else chosen
        _ = ADAPTERS[self.adapter]
        self._experiment = experiment
        self._bundles = bundles
        self._engines: dict[str, TorchEngine] = {}

    def engine(self, model: str) -> TorchEngine:
        """The engine of a model."""
        if model not in self._engines:
            exp = self._experiment
            self._engines[model] = make_engine(
                self._bundles[model],
                exp.adapter,
                self.adapter,
                exp.optim,
                exp.evaluation,
                exp.engine,
                seed=derive_seed(exp.common.random_seed, "adapter"),
                alignment=self._alignment(model),
            )
        return self._engines[model]

    def _alignment(self, model: str) -> Alignment | None:
        exp, source = self._experiment, self._experiment.adapter.alignment
        if source is None or not wants_alignment(exp, self.adapter):
            return None
        info = self._bundles[model].info
        return load_alignment(source, model, exp.models[model], info, exp.adapter)

    def close(self) -> None:
        """Takes the adapters out of the base models."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSnapshot:
    """A client between two rounds."""

    state: ClientState
    arrivals: Mapping[str, Any]


class ClientRunner:
    """One client through all rounds of one strategy.

    Attributes:
        manifest: what the server knows of the client.
        state: what survives a round.
    """

    def __init__(
        self,
        *,
        manifest: ClientManifest,
        data: ClientData,
        engine: TorchEngine,
        strategy: Strategy,
        experiment: Experiment,
        public: Sequence[Sample] = (),
        held_out: Sequence[Sample] = (),
    ) -> None:
        self.manifest = manifest
        self.data = data
        self._public = tuple(public)
        self._held_out = tuple(held_out)
        self.engine = engine
        self._strategy = strategy
        self._experiment = experiment
        self._seed = experiment.common.random_seed
        self._arrivals = Arrivals(data, experiment)
        self._batches: Sequence[Sequence[Sample]] = ()
        self._result: LocalResult | None = None
        self.state: ClientState = strategy.client.init_state(
            engine.initial_adapter(), self.context(0)
        )

    @property
    def client_id(self) -> int:
        """0-based, as in the manifest."""
        return self.manifest.client_id

    def snapshot(self) -> ClientSnapshot:
        """Where the client stands, for :meth:`restore`; cheap, because states are never changed."""
        return ClientSnapshot(state=self.state, arrivals=self._arrivals.state())

    def restore(self, snapshot: ClientSnapshot) -> None:
        """Goes back to a snapshot: samples drawn since then are drawn again in the next round."""
        self.state = snapshot.state
        self._arrivals.restore(snapshot.arrivals)
        self._batches = ()
        self._result = None

    def adopt(self, state: ClientState) -> None:
        """Takes a saved state of after a round, with the arrivals that belong to it.

        Raises:
            CheckpointError: the state remembers samples that the client does not have.
        """
        self.state = state
        self._arrivals.restore(state.extra["arrivals"])
        self._batches = ()
        self._result = None

    def go_on(self, state: ClientState) -> None:
        """Takes a saved state of inside the round; the round's batches stay as drawn."""
        self.state = state

    def context(self, round_idx: int, stage: str = TRAIN) -> ClientContext:
        """What the client half may know in a stage of a round."""
        steps = self._experiment.optim.num_steps * relative_steps(self._strategy)
        return ClientContext(
            manifest=self.manifest,
            round_idx=round_idx,
            num_rounds=self._experiment.train.comm_round,
            num_steps=max(1, round(steps)),
            seed=self._seed,
            stage=stage,
            public_steps=math.ceil(len(self._public) / batch_size(self._experiment)),
        )

    def prepare(
        self, downlink: SharedTensors, round_idx: int, stage: str = TRAIN
    ) -> tuple[Work, ...]:
        """Takes the downlink in, draws batches in the round's first stage, says what to do."""
        context = self.context(round_idx, stage)
        self.state, works = self._strategy.client.prepare(downlink, self.state, context)
        self._batches = ()
        if stage == TRAIN:
            self._batches = self._arrivals.batches(round_idx, context.num_steps)
        self._result = None
        return works

    def advance(
        self, results: Mapping[str, Result], round_idx: int, stage: str = TRAIN
    ) -> tuple[Work, ...]:
        """Tells the client half what its work has given; returns what to do next."""
        self.state, works = self._strategy.client.advance(
            results, self.state, self.context(round_idx, stage)
        )
        return works

    def _drawn(self, work: Work, round_idx: int, num_steps: int) -> Sequence[Sequence[Sample]]:
        """Batches for a piece of work."""
        size = batch_size(self._experiment)
        name = ("work samples", self.client_id, round_idx, work.salt or work.name)
        samples: Sequence[Sample]
        match work.samples:
            case Samples.ROUND:
                first = work.first_step if isinstance(work, Pass) else 0
                return self._batches[first : first + num_steps]
            case Samples.REPLAY:
                samples = self._arrivals.arrived(round_idx + 1)
            case Samples.HELD_OUT:
                samples = self._held_out
            case Samples.PUBLIC:
                samples = self._with_targets(work)
        if not samples:
            raise DataError(f"client {self.client_id}: {work.name!r} has no {work.samples} samples")
        if isinstance(work, Probe):
            return one_epoch(samples, size, self._seed, *name)
        balanced = work.samples is Samples.REPLAY and self._experiment.data.stream == "balanced"
        make = balanced_batches if balanced else shuffled_batches
        return make(samples, num_steps, size, self._seed, *name)

    def _with_targets(self, work: Work) -> Sequence[Sample]:
        """The public samples; where logits are distilled, those whose logits were received."""
        prefixes = {
            term.targets
            for item in (work.objectives if isinstance(work, Pass) else ())
            for term in item.distil
            if term.targets
        }
        return [
            sample
            for sample in self._public
            if all(f"{prefix}/{sample.key}" in self.state.tensors for prefix in prefixes)
        ]

    def wording(self) -> Wording:
        """What others need to understand this client's logits on the public samples."""
        return self.engine.translator.wording(self._public)

    def look(self, probe: Probe, round_idx: int) -> ProbeResult:
        """Carries out a probe."""
        if probe.samples in (Samples.HELD_OUT, Samples.PUBLIC):
            samples = list(self._held_out if probe.samples is Samples.HELD_OUT else self._public)
        else:
            drawn = self._drawn(probe, round_idx, len(self._batches))
            samples = list({item.key: item for batch in drawn for item in batch}.values())
        sets = _named(self.state, probe)
        return self.engine.probe(probe, self.state.adapter, sets, samples[: probe.limit])

    def fit(
        self,
        pass_: Pass,
        round_idx: int,
        on_step: StepCallback,
        *,
        progress: FitProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> LocalResult:
        """Trains one pass on the round's batches, or goes on with a pass that was stopped.

        Raises:
            FitStopped: ``should_stop`` said so; the state is that of before the pass.
        """
        optim = self._experiment.optim
        num_rounds = self._experiment.train.comm_round
        share = min(round_idx, num_rounds) / max(num_rounds, 1)
        scale = 1.0 - (1.0 - optim.final_lr_fraction) * share
        # AdamW's moments are kept by tensor of the adapter; sets have none of their own.
        own = not pass_.into and not pass_.route
        state = self.state
        result = self.engine.fit(
            replace(pass_, lr_scale=pass_.lr_scale * scale),
            laid_over(state, pass_.overlay),
            self._drawn(pass_, round_idx, pass_.num_steps),
            seed=derive_seed(self._seed, "fit", self.manifest.client_id, round_idx, pass_.name),
            on_step=on_step,
            moments=state.moments if own else None,
            progress=progress,
            should_stop=should_stop,
            sets=_named(state, pass_),
            tensors=state.tensors,
        )
        sets = {**state.sets, **result.sets}
        adapter = result.adapter
        if pass_.into or pass_.overlay:
            branches = {branch for item in pass_.objectives for branch in item.train}
            trained = {key: value for key, value in adapter.items() if key.branch in branches}
            adapter = state.adapter
            if pass_.into:
                sets[pass_.into] = {**sets.get(pass_.into, {}), **trained}
            else:
                adapter = {**adapter, **trained}
        moments = {**state.moments, **result.moments} if own else state.moments
        self.state = replace(state, adapter=adapter, sets=sets, moments=moments)
        self._result = result
        return result

    def sketch(self, sketcher: SketchEngine, round_idx: int) -> None:
        """Computes the round's sketch and smooths it over the rounds."""
        current = sketcher.compute(
            self._batches, client_id=self.manifest.client_id, round_idx=round_idx
        )
        state, similarity = self.state, self._strategy.similarity
        compressed = self._experiment.sketch.floats is not None
        previous = state.sketch_average if compressed else state.sketch
        average = smooth(previous, current, self._experiment.sketch.ema)
        self.state = replace(
            state,
            sketch=sketcher.share(average, similarity or "columns"),
            # Column lengths are divided out of what is shared, so that cannot be averaged on.
            sketch_average=average if compressed else None,
        )

    def finish(self, round_idx: int, stage: str = TRAIN) -> ClientUpdate:
        """Makes the update and the next state."""
        result = self._result
        if result is None:
            if stage == TRAIN:
                raise RuntimeError("finish() before fit(): the strategy asked for no pass")
            result = LocalResult(
                adapter=self.state.adapter, losses=(), num_examples=0, num_tokens=0, duration_s=0.0
            )
        header = UpdateHeader(
            client_id=self.manifest.client_id,
            round_idx=round_idx,
            num_examples=self._num_examples() if stage == TRAIN else result.num_examples,
            sketch=self.state.sketch if self._strategy.needs_sketch and stage == TRAIN else None,
        )
        update, state = self._strategy.client.finish(
            result, self.state, self.context(round_idx, stage), header
        )
        self.state = replace(
            state,
            participations=state.participations + (stage == TRAIN),
            extra={**state.extra, "arrivals": self._arrivals.state()},
        )
        return update

    def _num_examples(self) -> int:
        """Different samples of the round: steps times batch size is the same for all clients."""
        return len({sample.key for batch in self._batches for sample in batch})

    def serve(self, view: str, task: str) -> Served:
        """The model that answers a task in a view."""
        return self._strategy.client.serve(view, task, self.state)


def build_clients(
    experiment: Experiment,
    data: FederatedData,
    pool: EnginePool,
    strategy: Strategy,
    owned: Collection[int],
) -> dict[int, ClientRunner]:
    """The clients of this rank's group, in ascending id."""
    runners: dict[int, ClientRunner] = {}
    public: Sequence[Sample] = ()
    if strategy.needs_public:
        data, public = with_public(experiment, data)
    for whole in data.clients:
        client, held_out = whole, tuple[Sample, ...]()
        if strategy.needs_held_out:
            client, held_out = set_aside(
                whole, experiment.data.reserve, experiment.common.random_seed, "held out"
            )
        if client.client_id not in owned:
            continue
        engine = pool.engine(client.model_id)
        manifest = ClientManifest(
            client_id=client.client_id,
            model=client.model_id,
            family=engine.info.family,
            signature=engine.info.signature,
            num_layers=engine.info.num_layers,
            num_blocks=experiment.adapter.num_blocks,
            num_examples=sum(len(samples) for samples in client.train),
            tasks=tuple(task.name for task in client.tasks),
            layouts=engine.layouts(),
            vocabulary=engine.vocabulary(),
            task_examples={
                task.name: len(samples)
                for task, samples in zip(client.tasks, client.train, strict=True)
            },
            modalities={
                task.name: "image+text" if any(sample.images for sample in samples) else "text"
                for task, samples in zip(client.tasks, client.train, strict=True)
            },
        )
        runners[client.client_id] = ClientRunner(
            manifest=manifest,
            data=client,
            engine=engine,
            strategy=strategy,
            experiment=experiment,
            public=public,
            held_out=held_out,
        )
    return runners


def _named(state: ClientState, work: Work) -> dict[str, AdapterState]:
    """The sets that a piece of work names; the engine copies each to the model's device."""
    names = work.set_names
    return {name: tensors for name, tensors in state.sets.items() if name in names}


def laid_over(state: ClientState, overlay: Sequence[str]) -> AdapterState:
    """A client's adapter with named sets laid over it; the adapter itself without any.

    Raises:
        AdapterError: there is no such set.
    """
    if not overlay:
        return state.adapter
    merged = dict(state.adapter)
    for name in overlay:
        if name not in state.sets:
            known = ", ".join(state.sets) or "none"
            raise AdapterError(
                f"client {state.client_id} has no adapter set {name!r}; it has: {known}",
                hint="prepare() or advance() must put it into ClientState.sets",
            )
        merged.update(state.sets[name])
    return merged
