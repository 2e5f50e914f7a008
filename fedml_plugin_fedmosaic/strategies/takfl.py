"""TAKFL: averages that learn from each architecture separately and add up what they learned.

Clients train and send adapters and logits on public samples as in FedDistill. For every layout of
tensors m with average theta_m, and every teacher architecture s (all of them, m too) whose clients'
mean logits are zbar_s, the server trains a copy of theta_m on the public samples to minimise::

    9 KL_3(zbar_s || z) + 0.01 * 400 KL_20(z(theta_m) || z)
    KL_T(a || b) = KL(softmax(a / T) || softmax(b / T)) on the supervised tokens

and merges the results by task arithmetic::

    theta_m <- theta_m + mean over s of (theta_m,s - theta_m)

The clients of layout m start from it. Evaluated: the local model.

Source: Morafah et al. 2024 (arXiv 2409.18461), as the baseline "TAKFL" of FedMosaic
(arXiv 2506.11024). Differences to the released code: the task vectors are what they are meant to be
(there each is the difference of a tensor and itself, so that TAKFL is FedAvg), and every teacher
starts from the average (there from where the last teacher ended).

Clients of different architectures: adapters are averaged inside each signature; teachers are all
signatures. Where a teacher has another vocabulary than the student, its most probable tokens are
put into the student's words ("Choose a strategy" says how); with ``vocabularies: own`` it does not
teach. Compute: server and clients together count 3.75 forward passes per public sample and client,
which is right for 10 clients of 2 to 3 architectures and makes the 75 steps of the published table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    AdapterState,
    ClientContext,
    ClientState,
    SharedTensors,
    channel_of,
)
from fedml_plugin_fedmosaic.core.work import Distillation, ModelRef, Work
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvgOptions
from fedml_plugin_fedmosaic.strategies.feddistill import TEACHER, FedDistill, TaughtClient
from fedml_plugin_fedmosaic.strategies.teaching import (
    MODEL,
    TranslationOptions,
    logit_channel,
    spoken_in,
    voices,
    with_tensors,
)

_SLOT = "teacher-"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TAKFLOptions(FedAvgOptions, TranslationOptions):
    """Options of TAKFL."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    """Temperature of the distillation; its square is the weight of the term."""
    own_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    """Temperature of the self-distillation; its square is part of the weight of the term."""
    own_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Weight of the self-distillation, beside the square of its temperature."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs over the public samples per teacher and round."""


class TAKFLClient(TaughtClient):
    """As a host it trains one copy of the average per teacher.

    Args:
        options: the strategy's options.
    """

    def __init__(self, options: TAKFLOptions) -> None:
        super().__init__(options.temperature, options.epochs, top_tokens=options.top_tokens)
        self._options = options

    def prepare_server(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """One pass per teacher, each from the average."""
        options = self._options
        own = Distillation(
            weight=options.own_weight * options.own_temperature**2,
            temperature=options.own_temperature,
            teachers=(ModelRef(overlay=(MODEL,), view=self._view),),
        )
        slots = sorted({channel_of(k) for k in downlink if channel_of(k).startswith(_SLOT)})
        passes = []
        for slot in slots:
            taught = replace(self.taught(slot, downlink, context), weight=options.temperature**2)
            passes.append(self.server_pass(f"{MODEL}.{slot}", (taught, own), context))
        return with_tensors(state, TEACHER, self.answers(slots, downlink)), tuple(passes)

    def server_model(self, state: ClientState) -> AdapterState:
        """The average and the mean of the task vectors."""
        average = state.sets[MODEL]
        students = [value for name, value in sorted(state.sets.items()) if name.startswith(_PREFIX)]
        return task_arithmetic(average, students)


_PREFIX = f"{MODEL}."


def task_arithmetic(average: AdapterState, students: Sequence[AdapterState]) -> AdapterState:
    """``average + mean over students of (student - average)``; the average without students.

    Args:
        average: tensors by key.
        students: the same tensors after learning from one teacher each.
    """
    if not students:
        return average
    return {
        key: value + torch.stack([student[key] - value for student in students]).mean(0)
        for key, value in average.items()
    }


class TAKFL(FedDistill):
    """Averages that learn from each architecture separately."""

    name: ClassVar[str] = "takfl"
    Options: ClassVar[type] = TAKFLOptions

    def __init__(self, options: TAKFLOptions) -> None:
        self.options = options
        self._translation = options
        self._client = TAKFLClient(options)

    @property
    def cost(self) -> Cost:
        """One logit pass per client; per pair of 2.5 models 4, and 1 per model, over 10 clients."""
        return Cost(public=3.75)

    def teachers(self, state: Mapping[str, Any], host: int) -> list[tuple[str, str, Sequence[int]]]:
        """One slot per layout that has sent logits, and vocabulary in it."""
        slots: list[tuple[str, str, Sequence[int]]] = []
        for vocabulary, clients in voices(state, state["taught"], host, self._translation).items():
            sources: dict[str, list[int]] = {}
            for client in clients:
                layout = state["layouts"][str(client)].get(CHANNEL_CONV)
                if layout is not None:
                    sources.setdefault(layout, []).append(client)
            for layout, known in sources.items():
                slot = spoken_in(f"{_SLOT}{layout}", vocabulary)
                slots.append((slot, logit_channel(vocabulary), known))
        return sorted(slots)
