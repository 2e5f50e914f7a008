"""What we rely on in FedML 0.9.6, checked before anything is changed."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from fedml_plugin_fedmosaic.core.errors import IntegrationError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES

KNOWN_FEDML = "0.9.6"
_OPTIMIZER_PREFIX = "FedML_FEDERATED_OPTIMIZER_"


def fedml_version() -> str:
    """Version of the installed FedML, without importing it; ``"none"`` without one."""
    try:
        return version("fedml")
    except PackageNotFoundError:
        return "none"


def require(module: ModuleType | type, *names: str) -> None:
    """Checks that a FedML module or class has what we are about to extend.

    Raises:
        IntegrationError: an attribute is missing; installed and known version are named.
    """
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise IntegrationError(
            f"{module.__name__} of FedML {fedml_version()} has no {', '.join(missing)}",
            hint=f"this plugin knows FedML {KNOWN_FEDML}: pip install fedml=={KNOWN_FEDML}",
        )


def fedml_optimizers() -> frozenset[str]:
    """Lower-case names of the algorithms that FedML itself has."""
    constants = vars(import_module("fedml.constants"))
    return frozenset(
        str(value).lower()
        for name, value in constants.items()
        if name.startswith(_OPTIMIZER_PREFIX)
    )


def optimizer_of(args: Any) -> str:
    """``args.federated_optimizer`` in lower case; empty when there is none."""
    return str(getattr(args, "federated_optimizer", "") or "").lower()


def is_ours(args: Any) -> bool:
    """Whether FedML's arguments ask for an algorithm of this plugin.

    A name that FedML has itself (``FedAvg``) is always FedML's, in any spelling.
    """
    name = optimizer_of(args)
    return bool(name) and name not in fedml_optimizers() and name in STRATEGIES
