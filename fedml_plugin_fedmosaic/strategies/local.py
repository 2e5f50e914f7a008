"""Local training only (SFT): every client keeps its own adapter and nothing is shared.

Equation, with T rounds and client i's data D_i::

    theta_i <- argmin over theta of CE(theta; D_i), continued from round to round

The baseline "SFT" of FedMosaic (arXiv 2506.11024). The released code also averages the adapters of
each architecture and then ignores the average; here nothing is sent at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    ClientContext,
    ClientState,
    ClientUpdate,
    MixingPlan,
    Relevance,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass
from fedml_plugin_fedmosaic.strategies.base import ClientBase, ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import check_participants, local_pass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LocalOptions:
    """Local training has no options."""


class LocalClient(ClientBase):
    """Trains the local branch on the client's own data."""

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Pass, ...]]:
        """One pass over the local branch.

        Raises:
            PlanError: the downlink is not empty.
        """
        if downlink:
            raise PlanError(
                f"client {state.client_id} trains alone but received {len(downlink)} tensors"
            )
        return state, (local_pass(context),)

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,  # noqa: ARG002 - the contract's signature
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """An update without tensors."""
        after = replace(state, adapter=dict(result.adapter))
        return ClientUpdate(header=header, tensors={}), after


class Local(StrategyBase):
    """Nobody receives anything."""

    name: ClassVar[str] = "local"
    adapter: ClassVar[str] = "lora"
    Options: ClassVar[type] = LocalOptions

    def __init__(self, options: LocalOptions) -> None:
        self.options = options
        self._client = LocalClient()

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """The same state and an empty plan."""
        check_participants(state["layouts"], [header.client_id for header in headers])
        return state, MixingPlan()
