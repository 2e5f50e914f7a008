"""Contract of a strategy: a server half and a client half, both pure.

Pure means: no files, no devices, no communication, no global state. A strategy receives plain data
and returns plain data; the runtime trains, the communicator moves bytes.

A round is one *stage* or several, one after the other; most strategies have one, ``train``. A stage
goes like this: ``select`` -> for each client of the cohort ``prepare`` -> (the engine does the work
that it returned) -> ``advance``, which may ask for more work -> ... -> ``finish`` -> ``plan`` over
the new headers, and over the relevance that the communicator computed if ``similarity`` names one
-> the communicator executes the plan; its result is the downlink of the next stage.

After the last round the stages of ``final_stages`` run once, for every client, also for clients
that never took part in a round; then all clients are evaluated.

:class:`ClientBase` and :class:`StrategyBase` have the usual answers; a strategy inherits from them
and writes down what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    MixingPlan,
    NearestQuery,
    Relevance,
    SharedTensors,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, ModelRef, Result, Served, Work
from fedml_plugin_fedmosaic.equations.relevance import Similarity
from fedml_plugin_fedmosaic.strategies.common import draw_cohort, layouts_by_client

ServerState = Mapping[str, Any]
"""Plain data: JSON values and tensors in nested dictionaries with string keys."""

TRAIN = "train"
"""The stage that every round begins with."""

SERVER = "server"
"""A stage in which one client per signature acts for the server; what it sends is no uplink."""


class ClientHalf(Protocol):
    """What a client does before and after local training; ``context.stage`` names the stage."""

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The client's state before its first round, from freshly injected adapter tensors."""
        ...

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Puts the downlink (may be empty) into the state and says what to do first.

        Raises:
            PlanError: the downlink holds a key or a shape that the client does not have.
        """
        ...

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Called when the work of the last turn is done: the next state and the next work.

        Args:
            results: by the names of the last turn's work. Trained tensors are in the state
                already, as ``Pass.into`` says.
            state: after the work.
            context: of the round.

        Returns:
            The state, and further work; none ends the stage.
        """
        ...

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Turns what was trained into an update and the next state.

        Args:
            result: of the stage's last pass; without losses if the stage trained nothing.
            state: after the last turn.
            context: of the round.
            header: with the numbers that the runtime knows; ``notes`` are the strategy's.
        """
        ...

    def serve(self, view: str, task: str, state: ClientState) -> Served:
        """The model that answers a task in one of the reported views."""
        ...


class Strategy(Protocol):
    """The server half; ``client`` is the client half.

    Attributes:
        name: registry name.
        adapter: registry name of the adapter it trains.
        needs_sketch: whether headers must carry a sketch of the proxy's gradients.
        needs_held_out: whether clients keep samples away from training.
        needs_public: whether the run needs public samples.
        translates: whether logits on public samples reach clients of other vocabularies, whose
            engines then have to know the words.
        cost: what a local step costs; the runtime derives the steps of a round from it.
        stages: stages of a round, in order; the first one is ``train``.
        final_stages: stages after the last round, for all clients.
        eval_view: the view of a client's model that is reported; ``serve`` says what it means.
        final_views: further views that are reported after the last round.
        Options: frozen pydantic dataclass of the strategy's own options; ``strategy_args``.
    """

    name: ClassVar[str]
    needs_sketch: ClassVar[bool]
    needs_public: ClassVar[bool]
    final_views: ClassVar[tuple[str, ...]]
    eval_view: ClassVar[str]
    Options: ClassVar[type]

    @property
    def adapter(self) -> str:
        """Registry name of the adapter, with the strategy's options."""
        ...

    @property
    def needs_held_out(self) -> bool:
        """Whether clients keep samples away from training, with the strategy's options."""
        ...

    @property
    def translates(self) -> bool:
        """Whether logits cross vocabularies, with the strategy's options."""
        ...

    @property
    def cost(self) -> Cost:
        """What a local step costs, with the strategy's options."""
        ...

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of a round."""
        ...

    @property
    def final_stages(self) -> tuple[str, ...]:
        """Stages after the last round."""
        ...

    @property
    def client(self) -> ClientHalf:
        """The client half."""
        ...

    @property
    def similarity(self) -> Similarity | None:
        """Which similarity of the clients' sketches ``plan`` needs; None for none."""
        ...

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """The server's state before round 0.

        Raises:
            PlanError: the clients cannot take part together under this strategy.
        """
        ...

    def select(self, state: ServerState, round_idx: int, clients_per_round: int) -> tuple[int, ...]:
        """The cohort of the stage ``train``: ascending client ids."""
        ...

    def queries(
        self, state: ServerState, headers: Sequence[UpdateHeader]
    ) -> tuple[NearestQuery, ...] | None:
        """Whose nearest clients ``plan`` needs, by ``similarity``, instead of the whole matrix.

        Args:
            state: the state so far.
            headers: those that ``plan`` gets next.

        Returns:
            Queries, whose answers ``plan`` finds in ``relevance.neighbours``; None for the matrix.
        """
        ...

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,
    ) -> tuple[ServerState, MixingPlan]:
        """Takes in the headers of ``train``; returns the next state and who receives what.

        Args:
            state: the state so far.
            headers: of the clients that took part, without their sketches' values.
            relevance: between these clients and everyone who took part before; None if
                ``similarity`` is None.
        """
        ...

    def select_stage(
        self, state: ServerState, stage: str, round_idx: int, cohort: Sequence[int]
    ) -> tuple[int, ...]:
        """Who takes part in a later stage: ascending client ids, all of them for a final stage.

        Args:
            state: the state so far.
            stage: one of ``stages`` but the first, or of ``final_stages``.
            round_idx: 0-based round; the number of rounds in a final stage.
            cohort: of ``train`` in this round; everyone in a final stage.
        """
        ...

    def plan_stage(
        self, state: ServerState, stage: str, headers: Sequence[UpdateHeader]
    ) -> tuple[ServerState, MixingPlan]:
        """As :meth:`plan`, for a later stage."""
        ...


class ClientBase:
    """Usual answers of a client half: a fresh adapter, one turn of work, views are views."""

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The freshly injected adapter."""
        return ClientState(client_id=context.manifest.client_id, adapter=dict(adapter))

    def advance(
        self,
        results: Mapping[str, Result],  # noqa: ARG002 - the contract's signature
        state: ClientState,
        context: ClientContext,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Nothing more to do."""
        return state, ()

    def serve(self, view: str, task: str, state: ClientState) -> Served:  # noqa: ARG002
        """The adapter as it is, in the view of that name."""
        return Served(model=ModelRef(view=View(view)))


class StrategyBase:
    """Usual answers of a server half: one stage, plain cost, no sketch, a cohort by seed.

    ``select`` expects a state with ``seed`` and ``layouts``, as ``init`` makes it. ``__init__`` of
    a strategy puts its client half into ``_client``.
    """

    _client: ClientHalf

    needs_sketch: ClassVar[bool] = False
    needs_public: ClassVar[bool] = False
    eval_view: ClassVar[str] = "local"
    final_views: ClassVar[tuple[str, ...]] = ()

    @property
    def client(self) -> ClientHalf:
        """The client half."""
        return self._client

    @property
    def needs_held_out(self) -> bool:
        """False."""
        return False

    @property
    def translates(self) -> bool:
        """False."""
        return False

    @property
    def cost(self) -> Cost:
        """One forward and one backward pass."""
        return Cost()

    @property
    def stages(self) -> tuple[str, ...]:
        """Only ``train``."""
        return (TRAIN,)

    @property
    def final_stages(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def similarity(self) -> Similarity | None:
        """None."""
        return None

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the seed and the clients' layouts (see ``common.layouts_by_client``).

        Raises:
            PlanError: no client, or an id twice.
        """
        return {"seed": seed, "layouts": layouts_by_client(manifests)}

    def select(self, state: ServerState, round_idx: int, clients_per_round: int) -> tuple[int, ...]:
        """A cohort drawn without replacement from seed and round."""
        return draw_cohort(map(int, state["layouts"]), state["seed"], round_idx, clients_per_round)

    def queries(
        self,
        state: ServerState,  # noqa: ARG002 - the contract's signature
        headers: Sequence[UpdateHeader],  # noqa: ARG002 - the contract's signature
    ) -> tuple[NearestQuery, ...] | None:
        """None: the whole matrix."""
        return None

    def select_stage(
        self,
        state: ServerState,  # noqa: ARG002 - the contract's signature
        stage: str,  # noqa: ARG002 - the contract's signature
        round_idx: int,  # noqa: ARG002 - the contract's signature
        cohort: Sequence[int],
    ) -> tuple[int, ...]:
        """The cohort of ``train``; everyone in a final stage."""
        return tuple(cohort)

    def plan_stage(
        self,
        state: ServerState,
        stage: str,  # noqa: ARG002 - the contract's signature
        headers: Sequence[UpdateHeader],  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """The same state; nobody receives anything."""
        return state, MixingPlan()


def relative_steps(strategy: Strategy) -> float:
    """Local steps of a round relative to plain local training, at equal compute."""
    return strategy.cost.share
