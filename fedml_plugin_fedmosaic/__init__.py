"""FedMosaic for FedML: personalised federated fine-tuning of heterogeneous models.

The public names below are imported on first use, so that ``import fedml_plugin_fedmosaic`` costs
nothing::

    from fedml_plugin_fedmosaic import load_experiment, prepare_run

    summary = prepare_run(load_experiment(None)).execute()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.config.loader import dump_experiment, load_experiment
    from fedml_plugin_fedmosaic.config.sections import Experiment
    from fedml_plugin_fedmosaic.core.errors import FedMosaicError
    from fedml_plugin_fedmosaic.runtime.federation import prepare_run

__version__ = "0.1.0"

_LAZY = {
    "Experiment": "fedml_plugin_fedmosaic.config.sections",
    "FedMosaicError": "fedml_plugin_fedmosaic.core.errors",
    "Runner": "fedml_plugin_fedmosaic.integrations.fedml.runner",
    "dump_experiment": "fedml_plugin_fedmosaic.config.loader",
    "load_experiment": "fedml_plugin_fedmosaic.config.loader",
    "prepare_run": "fedml_plugin_fedmosaic.runtime.federation",
}

__all__ = [
    "Experiment",
    "FedMosaicError",
    "Runner",
    "__version__",
    "dump_experiment",
    "load_experiment",
    "prepare_run",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def _activate_hook() -> None:
    """Lets FedML know our names where Python started without the plugin's ``.pth`` file."""
    try:
        hook = import_module("_fedmosaic_hook")
    except ImportError:  # a checkout on PYTHONPATH; ``fedmosaic run`` needs no hook
        return
    hook.install()


_activate_hook()
