"""``dp_args``: differential privacy by FedML's own mechanisms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PrivacyConfig:
    """``dp_args``: FedML's differential privacy, in FedML's flat spelling."""

    enable_dp: bool = False
    """Noise on updates through FedML's hooks."""
    dp_solution_type: Literal["ldp", "cdp"] = "ldp"
    """Local (each client) or central (server)."""
    mechanism_type: Literal["laplace", "gaussian"] = "gaussian"
    """Noise mechanism."""
    epsilon: _Positive = 0.5
    """FedML's epsilon."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """FedML's delta."""
    sensitivity: _Positive = 1.0
    """FedML's sensitivity."""
    clipping_norm: _Positive | None = None
    """Clipping norm of the central mechanism."""
