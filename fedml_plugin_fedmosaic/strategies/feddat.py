"""FedDAT: a global adapter and a personal one that teach each other beside a frozen copy.

A round begins with the received global adapter w, of which the client keeps a frozen copy w0. With
outputs o of an adapter in every layer, the personal model p uses (o_w0 + o_v) / 2 and the global
model g uses o_w. On every micro-batch, with T = 2::

    w_i <- step on (CE(g) + 4 KL(softmax(z_p / T) || softmax(z_g / T))) / 2     z_p fixed
    v_i <- step on (CE(p) + 4 KL(softmax(z_g / T) || softmax(z_p / T))) / 2   z_g from above

w becomes the average of the w_i inside each layout of tensors; the personal v_i are never sent.
Evaluated: the personal model p.

Source: Chen et al. 2024 (arXiv 2308.12305; dual adapter teacher, mutual knowledge distillation), as
the baseline "FedDAT" of FedMosaic (arXiv 2506.11024). A step costs three forward and two backward
passes. Differences to the released code: the personal adapters are not averaged; the third branch
is not a branch of the layer but a set of tensors that takes the global branch's place.

Clients of different architectures: averages are made inside each signature.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.types import (
    Branch,
    ClientContext,
    ClientState,
    SharedTensors,
    View,
)
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    ModelRef,
    Objective,
    Pass,
    Served,
    Work,
)
from fedml_plugin_fedmosaic.strategies.ditto import ANCHOR, TwoBranchClient
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgOptions

PERSONAL = ModelRef(overlay=(ANCHOR,), view=View.GATED)
"""The frozen received adapter and the personal one, half and half."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FedDATOptions(FedAvgOptions):
    """Options of FedDAT."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Temperature of the mutual distillation (T); its square is the weight of the term."""


class FedDATClient(TwoBranchClient):
    """Trains both adapters with each other as teachers.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: FedDATOptions) -> None:
        self._options = options

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Receives the global adapter, then one pass over both.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        personal = Objective(
            view=View.GATED,
            train=frozenset({Branch.LOCAL}),
            overlay=(ANCHOR,),
            task_weight=0.5,
            distil=(self._taught_by(ModelRef(view=View.GLOBAL)),),
        )
        one = Pass(
            name="mutual",
            view=View.GLOBAL,
            train=frozenset({Branch.GLOBAL}),
            num_steps=context.num_steps,
            task_weight=0.5,
            distil=(self._taught_by(PERSONAL),),
            also=(personal,),
        )
        return self.receive(downlink, state), (one,)

    def _taught_by(self, teacher: ModelRef) -> Distillation:
        temperature = self._options.temperature
        return Distillation(
            weight=0.5 * temperature**2, temperature=temperature, teachers=(teacher,)
        )

    def serve(self, view: str, task: str, state: ClientState) -> Served:
        """In the gated view the personal model; other views are branches as they are."""
        if view == View.GATED:
            return Served(model=PERSONAL)
        return super().serve(view, task, state)


class FedDAT(FedAvg):
    """Averages of the global adapters."""

    name: ClassVar[str] = "feddat"
    adapter: ClassVar[str] = "dual_lora"
    eval_view: ClassVar[str] = "gated"
    Options: ClassVar[type] = FedDATOptions

    def __init__(self, options: FedDATOptions) -> None:
        self.options = options
        self._client = FedDATClient(options)

    @property
    def cost(self) -> Cost:
        """Three forward passes (one of a teacher) and two backward passes."""
        return Cost(forwards=3, backwards=2)
