"""A client as the loop sees it: its data over time, its engine, its state, its client half."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.core.types import (
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import FitProgress, LocalResult, Pass, Work
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample
from fedml_plugin_fedmosaic.engine.base import ShouldStop, StepCallback
from fedml_plugin_fedmosaic.engine.factory import make_engine
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.equations.gradient import smooth
from fedml_plugin_fedmosaic.runtime.alignment import load_alignment, wants_alignment
from fedml_plugin_fedmosaic.runtime.alignment_files import Alignment
from fedml_plugin_fedmosaic.runtime.arrivals import Arrivals
from fedml_plugin_fedmosaic.strategies.base import Strategy, relative_steps


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
    ) -> None:
        self.manifest = manifest
        self.data = data
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

    def context(self, round_idx: int) -> ClientContext:
        """What the client half may know in a round."""
        steps = self._experiment.optim.num_steps * relative_steps(self._strategy)
        return ClientContext(
            manifest=self.manifest,
            round_idx=round_idx,
            num_rounds=self._experiment.train.comm_round,
            num_steps=max(1, round(steps)),
            seed=self._seed,
        )

    def prepare(self, downlink: SharedTensors, round_idx: int) -> tuple[Work, ...]:
        """Takes the downlink in, draws the round's batches, and says which passes to train."""
        context = self.context(round_idx)
        self.state, passes = self._strategy.client.prepare(downlink, self.state, context)
        self._batches = self._arrivals.batches(round_idx, context.num_steps)
        self._result = None
        return passes

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
        share = round_idx / max(self._experiment.train.comm_round, 1)
        scale = 1.0 - (1.0 - optim.final_lr_fraction) * share
        result = self.engine.fit(
            replace(pass_, lr_scale=pass_.lr_scale * scale),
            self.state.adapter,
            self._batches[: pass_.num_steps],
            seed=derive_seed(self._seed, "fit", self.manifest.client_id, round_idx, pass_.name),
            on_step=on_step,
            moments=self.state.moments,
            progress=progress,
            should_stop=should_stop,
        )
        self.state = replace(
            self.state,
            adapter=result.adapter,
            moments={**self.state.moments, **result.moments},
        )
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

    def finish(self, round_idx: int) -> ClientUpdate:
        """Makes the update and the next state."""
        if self._result is None:
            raise RuntimeError("finish() before fit(): the strategy's prepare() returned no pass")
        header = UpdateHeader(
            client_id=self.manifest.client_id,
            round_idx=round_idx,
            num_examples=self._result.num_examples,
            sketch=self.state.sketch if self._strategy.needs_sketch else None,
        )
        update, state = self._strategy.client.finish(
            self._result, self.state, self.context(round_idx), header
        )
        self.state = replace(
            state,
            participations=state.participations + 1,
            extra={**state.extra, "arrivals": self._arrivals.state()},
        )
        return update


def build_clients(
    experiment: Experiment,
    data: FederatedData,
    pool: EnginePool,
    strategy: Strategy,
    owned: Collection[int],
) -> dict[int, ClientRunner]:
    """The clients of this rank's group, in ascending id."""
    runners: dict[int, ClientRunner] = {}
    for client in data.clients:
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
        )
        runners[client.client_id] = ClientRunner(
            manifest=manifest,
            data=client,
            engine=engine,
            strategy=strategy,
            experiment=experiment,
        )
    return runners
