"""Options of TAP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.equations.tap import MarginKind


def _number(value: float) -> float:
    if math.isnan(value):
        raise ValueError("a margin is a number, .inf (never replace) or -.inf (always replace)")
    return value


Margin = Annotated[float, AfterValidator(_number)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TapOptions:
    """Options of TAP."""

    exchange: Literal["family", "colora", "none"] = "family"
    """Who is averaged: clients of one shape class; ``colora``: P and Q also across architectures;
    ``none``: nobody, every client's federated adapters are its own."""
    sets: Literal["both", "key", "shared"] = "both"
    """Adapters of a forward pass: the shared one plus the key's, or one of them alone."""
    key: Literal["task", "modality"] = "task"
    """What has an adapter of its own: (modalities, task), or modalities alone."""
    test: Literal["held_out", "train"] = "held_out"
    """Losses that are compared: of both models now, on samples kept away from training; or the mean
    losses of training, the personal one from the client's last participation, as released."""
    test_samples: Annotated[int, Field(ge=1)] | None = 64
    """At most so many held-out samples per comparison; all when omitted."""
    margin: Margin = 0.01
    """Margin mu of a replacement; ``.inf`` never replaces, ``-.inf`` always."""
    margin_kind: MarginKind = "relative"
    """L_F < (1 - mu) L_P, or L_F + mu < L_P as released."""
    margins: Mapping[str, Margin] = Field(default_factory=dict)
    """Margins of single tasks (of modalities with ``key: modality``), by name."""
    vote: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction rho of a client's keys that must be replaced for the shared adapter to be replaced
    with them; 0: one is enough, as released."""
    distillation: Factor = 1.0
    """Weight lambda of the distillation after the last round. Released: 1 for text classification,
    0.002 for all else; 0 is plain fine-tuning."""
    distillations: Mapping[str, Factor] = Field(default_factory=dict)
    """Weights of single tasks, by name."""
    temperature: Temperature = 1.0
    """Temperature T of the distillation; its weight is lambda T^2."""
    temperatures: Mapping[str, Temperature] = Field(default_factory=dict)
    """Temperatures of single tasks, by name."""
    final_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of each of the two passes after the last round; omitted: as many as a pass of
    a round has."""
    final_lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor on the learning rates after the last round."""

    def margin_of(self, name: str) -> float:
        """The margin of a task, or of modalities."""
        return self.margins.get(name, self.margin)

    def distillation_of(self, name: str) -> float:
        """The weight of a task, or of modalities."""
        return self.distillations.get(name, self.distillation)

    def temperature_of(self, name: str) -> float:
        """The temperature of a task, or of modalities."""
        return self.temperatures.get(name, self.temperature)

    @property
    def named(self) -> frozenset[str]:
        """All tasks or modalities that have a value of their own."""
        return frozenset({*self.margins, *self.distillations, *self.temperatures})
