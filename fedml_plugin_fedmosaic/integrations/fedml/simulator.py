"""Extends FedML's simulators, single process and MPI, by the algorithms of this plugin."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.integrations.fedml.compat import (
    fedml_optimizers,
    is_ours,
    optimizer_of,
    require,
)

_CLASSES = ("SimulatorSingleProcess", "SimulatorMPI")


def extend(module: ModuleType) -> None:
    """Wraps ``__init__`` and ``run`` of both simulators in place.

    Raises:
        IntegrationError: a simulator is missing; nothing is changed then.
    """
    require(module, *_CLASSES)
    for name in _CLASSES:
        require(getattr(module, name), "run")
    for name in _CLASSES:
        _extend_class(getattr(module, name))


def _extend_class(simulator: Any) -> None:
    stock_init, stock_run = simulator.__init__, simulator.run

    @functools.wraps(stock_init)
    def __init__(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if not is_ours(args):
            try:
                stock_init(self, args, *rest, **options)
            except Exception as error:
                _explain(error, args)
                raise
            return
        from fedml_plugin_fedmosaic.integrations.fedml.runner import Runner

        self.fl_trainer = Runner(args, *rest, **options)
        self.run_fedmosaic = self.fl_trainer.run

    @functools.wraps(stock_run)
    def run(self: Any) -> None:
        if hasattr(self, "run_fedmosaic"):
            self.run_fedmosaic()
        else:
            stock_run(self)

    simulator.__init__ = __init__
    simulator.run = run


def _explain(error: Exception, args: Any) -> None:
    """FedML ends in ``Exception("Exception")`` for a name it does not know; says what is known."""
    name = optimizer_of(args)
    if name not in fedml_optimizers():
        ours = ", ".join(sorted(set(STRATEGIES) - fedml_optimizers()))
        error.add_note(
            f"federated_optimizer {getattr(args, 'federated_optimizer', None)!r} is neither "
            f"FedML's nor this plugin's ({ours})"
        )
