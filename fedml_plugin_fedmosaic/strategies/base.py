"""Contract of a strategy: a server half and a client half, both pure.

Pure means: no files, no devices, no communication, no global state. A strategy receives plain data
and returns plain data; the runtime trains, the communicator moves bytes.

The order in a round is: ``select`` -> for each client of the cohort ``prepare`` -> (the engine
trains each pass) -> ``finish`` -> ``plan`` over the new headers, and over the relevance that the
communicator computed if ``similarity`` names one -> the communicator executes the plan; its result
is the downlink of the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    LocalResult,
    MixingPlan,
    Pass,
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.equations.relevance import Similarity

ServerState = Mapping[str, Any]
"""Plain data: JSON values and tensors in nested dictionaries with string keys."""


class ClientHalf(Protocol):
    """What a client does before and after local training."""

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The client's state before its first round, from freshly injected adapter tensors."""
        ...

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Pass, ...]]:
        """Puts the downlink (may be empty) into the state and says how to train.

        Raises:
            PlanError: the downlink holds a key or a shape that the client does not have.
        """
        ...

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Turns the trained adapter into an update and the next state."""
        ...


class Strategy(Protocol):
    """The server half; ``client`` is the client half.

    Attributes:
        name: registry name.
        adapter: registry name of the adapter it trains.
        needs_sketch: whether headers must carry a sketch.
        relative_steps: local steps of one round relative to SFT's at equal compute.
        eval_view: the view of a client's model that is reported.
        Options: frozen pydantic dataclass of the strategy's own options; ``strategy_args``.
    """

    name: ClassVar[str]
    adapter: ClassVar[str]
    needs_sketch: ClassVar[bool]
    relative_steps: ClassVar[float]
    eval_view: ClassVar[str]
    Options: ClassVar[type]

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
        """The cohort: ascending client ids."""
        ...

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,
    ) -> tuple[ServerState, MixingPlan]:
        """Takes in the round's headers; returns the next state and who receives what.

        Args:
            state: the state of the last round.
            headers: of the clients that took part, without their sketches' values.
            relevance: between these clients and everyone who took part before; None if
                ``similarity`` is None.
        """
        ...
