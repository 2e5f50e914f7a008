"""FedDPA: first the global adapter, then a personal one that works beside it.

A round of S steps begins with the received global adapter w. With o_g, o_l the outputs of the two
adapters in every layer::

    first half   w_i <- steps on CE(base + s o_g)
    second half  v_i <- steps on CE(base + s (o_g + o_l) / 2)     w_i fixed at its value so far

w becomes the average of the w_i inside each layout of tensors; the personal v_i are never sent.
Evaluated: both together, half and half.

Source: Yang et al. 2024 (arXiv 2403.19211), as the baseline "FedDPA" of FedMosaic
(arXiv 2506.11024), which replaces the instance-wise weight of the two adapters by one half.
Differences to the released code: the personal adapters are not averaged; an odd number of steps is
allowed (the global adapter gets one more).

Clients of different architectures: averages are made inside each signature.
"""

from __future__ import annotations

from typing import ClassVar

from fedml_plugin_fedmosaic.core.types import (
    Branch,
    ClientContext,
    ClientState,
    SharedTensors,
    View,
)
from fedml_plugin_fedmosaic.core.work import Pass, Work
from fedml_plugin_fedmosaic.strategies.ditto import TwoBranchClient
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgOptions


class FedDPAClient(TwoBranchClient):
    """Trains one adapter after the other."""

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Receives the global adapter; two passes share the round's batches.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        later = context.num_steps // 2
        first = Pass(
            name="global",
            view=View.GLOBAL,
            train=frozenset({Branch.GLOBAL}),
            num_steps=context.num_steps - later,
        )
        second = Pass(
            name="personal",
            view=View.GATED,
            train=frozenset({Branch.LOCAL}),
            num_steps=later,
            first_step=first.num_steps,
        )
        return self.receive(downlink, state), (first, second) if later else (first,)


class FedDPA(FedAvg):
    """Averages of the global adapters."""

    name: ClassVar[str] = "feddpa"
    adapter: ClassVar[str] = "dual_lora"
    eval_view: ClassVar[str] = "gated"

    def __init__(self, options: FedAvgOptions) -> None:
        self.options = options
        self._client = FedDPAClient()
