"""What is done to a FedML module right after its import.

The start-up module ``_fedmosaic_hook`` calls :func:`extend` with each module it waits for. The
work is in one module per target, imported only now, so that FedML's own commands pay for nothing
that they do not use.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_HERE = "fedml_plugin_fedmosaic.integrations.fedml"
_EXTENSIONS = {
    # FedML module: module of ours whose ``extend`` function takes it
    "fedml": f"{_HERE}.framework",
    "fedml.cli.modules.run": f"{_HERE}.command",
    "fedml.simulation.simulator": f"{_HERE}.simulator",
}
_MARK = "__fedmosaic_extended__"


def extend(module: ModuleType) -> None:
    """Extends one FedML module in place, once.

    Args:
        module: an imported FedML module; one that is not a target is left alone.

    Raises:
        IntegrationError: the module does not look like FedML 0.9.6; it is left as it was.
    """
    target = _EXTENSIONS.get(module.__name__)
    if target is None or getattr(module, _MARK, False):
        return
    import_module(target).extend(module)
    setattr(module, _MARK, True)


def activate() -> None:
    """Extends FedML where it is imported already, and later where it is not.

    The start-up hook does this by itself; ``import fedml_plugin_fedmosaic`` does it where that hook
    is switched off (``python -S``, or a site that removes ``.pth`` files).
    """
    import_module("_fedmosaic_hook").install()
