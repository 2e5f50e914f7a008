"""Per-FedAvg, first order: an average from which a few steps make a good personal model.

The goal is not the model that is best for all, but the one that is best after each client has
trained it a little: min over w of the mean over clients of f_i(w - lr grad f_i(w)). Without second
derivatives a client's update is made of cycles, each on samples that no other one uses::

    w'  = w after ``inner_steps`` optimizer steps          (the personal model of the moment)
    w'' = w' after ``outer_steps`` further steps           (on other samples)
    w  <- w + (w'' - w')

so the steps taken at the personal model are applied where it came from. The server averages w
inside each layout as FedAvg does. After the last round every client adapts its copy with
``adapt_steps`` steps, and that is its model.

Source: Per-FedAvg (FO) (Fallah et al., NeurIPS 2020, arXiv 2002.07948).
Differences to it: AdamW instead of plain gradient steps, on both levels, as for all strategies
here; inner and outer loops may have several steps; no Hessian-vector products.
Across signatures: averages are per layout; nothing is shared across layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.types import (
    Branch,
    ClientContext,
    ClientState,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import (
    LocalResult,
    ModelRef,
    Pass,
    Result,
    Samples,
    Served,
    Work,
)
from fedml_plugin_fedmosaic.strategies.base import TRAIN
from fedml_plugin_fedmosaic.strategies.common import receive
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgClient, FedAvgOptions

FINAL = "adapt"
INNER, OUTER, ADAPTED = "inner", "outer", "adapted"
_LOCAL = frozenset({Branch.LOCAL})


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PerFedAvgOptions:
    """Options of Per-FedAvg."""

    weighting: Literal["uniform", "num_examples"] = "uniform"
    """Weights of the cohort's clients: equal, or by the samples used in the round."""
    inner_steps: Annotated[int, Field(ge=1)] = 5
    """Optimizer steps to the personal model of the moment."""
    outer_steps: Annotated[int, Field(ge=1)] = 5
    """Optimizer steps from there that count."""
    adapt_steps: Annotated[int, Field(ge=0)] = 20
    """Optimizer steps of each client after the last round; 0: none."""


class PerFedAvgClient(FedAvgClient):
    """Trains in cycles of inner and outer steps.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: PerFedAvgOptions) -> None:
        self._options = options

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Replaces the local branch by the downlink and begins the first cycle, or adapts.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        adapter = receive(state.adapter, downlink, Branch.LOCAL, state.client_id)
        state = replace(state, adapter=adapter, sets={})
        if context.stage == FINAL:
            adapt = Pass(
                name=FINAL,
                view=View.LOCAL,
                train=_LOCAL,
                num_steps=self._options.adapt_steps,
                into=ADAPTED,
                samples=Samples.REPLAY,
                salt=FINAL,
            )
            return state, (adapt,)
        if context.num_steps < 2:  # no cycle fits
            return super().prepare(downlink, state, context)
        return state, (self._pass(0, context, INNER),)

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """From the inner steps to the outer ones, and from there to the next cycle."""
        kind, _, number = next(iter(results), "").partition(" ")
        if kind not in (INNER, OUTER):
            return state, ()
        cycle = int(number)
        if kind == INNER:
            return state, (self._pass(cycle, context, OUTER),)
        inner, outer = state.sets[INNER], state.sets[OUTER]
        moved = {key: state.adapter[key] + (outer[key] - inner[key]) for key in sorted(outer)}
        state = replace(state, adapter={**state.adapter, **moved}, sets={})
        if cycle + 1 < len(self._cycles(context.num_steps)):
            return state, (self._pass(cycle + 1, context, INNER),)
        return state, ()

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads w, not the personal model of the moment; nothing after the last round."""
        if context.stage != TRAIN:
            return ClientUpdate(header=header, tensors={}), state
        return super().finish(replace(result, adapter=state.adapter), state, context, header)

    def serve(self, view: str, task: str, state: ClientState) -> Served:  # noqa: ARG002
        """The adapted model, before there is one the average; the same for every task."""
        overlay = (ADAPTED,) if ADAPTED in state.sets else ()
        return Served(model=ModelRef(overlay=overlay, view=View(view)))

    def _cycles(self, num_steps: int) -> list[tuple[int, int, int]]:
        """First step, inner and outer steps of each cycle; together all steps of the round.

        A single step at the end joins the last cycle.
        """
        inner, outer = self._options.inner_steps, self._options.outer_steps
        cycles: list[tuple[int, int, int]] = []
        first = 0
        while num_steps - first >= 2:
            rest = num_steps - first
            ahead = min(inner, rest - 1)
            behind = min(outer, rest - ahead)
            if rest - ahead - behind == 1:
                behind += 1
            cycles.append((first, ahead, behind))
            first += ahead + behind
        return cycles

    def _pass(self, cycle: int, context: ClientContext, kind: str) -> Pass:
        first, ahead, behind = self._cycles(context.num_steps)[cycle]
        inner = kind == INNER
        return Pass(
            name=f"{kind} {cycle}",
            view=View.LOCAL,
            train=_LOCAL,
            num_steps=ahead if inner else behind,
            overlay=() if inner else (INNER,),
            into=kind,
            first_step=first if inner else first + ahead,
        )


class PerFedAvg(FedAvg):
    """FedAvg of what is good to start from."""

    name: ClassVar[str] = "per_fedavg"
    Options: ClassVar[type] = PerFedAvgOptions

    def __init__(self, options: PerFedAvgOptions) -> None:
        super().__init__(FedAvgOptions(weighting=options.weighting))
        self._own = options
        self._client = PerFedAvgClient(options)

    @property
    def final_stages(self) -> tuple[str, ...]:
        """Adaptation, unless it has no steps."""
        return (FINAL,) if self._own.adapt_steps else ()
