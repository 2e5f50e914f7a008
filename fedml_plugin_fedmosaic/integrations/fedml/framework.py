"""Extends the ``fedml`` package itself: start, data, model and device of a run of ours.

A FedML main calls ``fedml.init``, ``fedml.device.get_device``, ``fedml.data.load``,
``fedml.model.create`` and ``FedMLRunner(...).run()``. For an algorithm of this plugin the data and
the models come from our own configuration, so FedML's loaders (which know built-in sets only, and
download them) are passed over, and nothing connects to FedML's servers. For every other algorithm
each of these functions is FedML's, called with the very same arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fedml_plugin_fedmosaic.integrations.fedml.compat import is_ours, require

_UNSUPPORTED_RUNNERS = (
    "_init_cross_silo_runner",
    "_init_cheetah_runner",
    "_init_model_serving_runner",
    "_init_cross_device_runner",
)


def extend(fedml: ModuleType) -> None:
    """Extends ``fedml`` in place.

    Raises:
        IntegrationError: a function that we extend is missing; nothing is changed then.
    """
    require(fedml, "init", "load_arguments", "FedMLRunner", "device", "data", "model", "mlops")
    require(fedml.device, "get_device")
    require(fedml.data, "load")
    require(fedml.model, "create")
    require(fedml.FedMLRunner, *_UNSUPPORTED_RUNNERS)
    fedml.init = _extended_init(fedml, fedml.init)  # type: ignore[attr-defined]
    fedml.device.get_device = _unless_ours(fedml.device.get_device, _device)
    fedml.data.load = _unless_ours(fedml.data.load, _no_data)
    fedml.model.create = _unless_ours(fedml.model.create, _no_model)
    for name in _UNSUPPORTED_RUNNERS:
        setattr(fedml.FedMLRunner, name, _refusing(getattr(fedml.FedMLRunner, name)))


def _extended_init(fedml: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(args: Any = None, *rest: Any, **options: Any) -> Any:
        if args is None:
            args = fedml.load_arguments(fedml._global_training_type, fedml._global_comm_backend)
        if not is_ours(args):
            return original(args, *rest, **options)
        from fedml_plugin_fedmosaic.integrations.fedml.args import experiment_from_args, fill_args

        for name in ("training_type", "backend"):
            chosen = getattr(fedml, f"_global_{name.replace('backend', 'comm_backend')}", None)
            if chosen is not None and not hasattr(args, name):
                setattr(args, name, chosen)
        fill_args(args, experiment_from_args(args))
        if len(rest) < 2:
            # FedML's log set-up sends every print() of the program to standard error.
            options.setdefault("should_init_logs", False)
        with _offline():
            return original(args, *rest, **options)

    return init


@contextmanager
def _offline() -> Iterator[None]:
    """Without FedML's attempt to fetch its servers' configuration (five times, 2.5 s)."""
    from fedml.core import mlops

    require(mlops, "fetch_config")
    original = mlops.fetch_config

    def fetch_config(args: Any, version: str = "release") -> bool:
        args.version = args.config_version = version
        return False

    mlops.fetch_config = fetch_config
    try:
        yield
    finally:
        mlops.fetch_config = original


def _unless_ours(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def choose(args: Any, *rest: Any, **options: Any) -> Any:
        chosen = ours if is_ours(args) else original
        return chosen(args, *rest, **options)

    return choose


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_runner(self: Any, args: Any, *rest: Any, **options: Any) -> Any:
        if is_ours(args):
            from fedml_plugin_fedmosaic.integrations.fedml.args import refuse_unsupported

            refuse_unsupported(args)
        return original(self, args, *rest, **options)

    return init_runner


def _device(args: Any) -> Any:
    """The device a main program sees; the run chooses its own, by the same keys."""
    import torch

    if getattr(args, "using_gpu", False) and torch.cuda.is_available():
        return torch.device("cuda", int(getattr(args, "gpu_id", 0) or 0))
    return torch.device("cpu")


def _no_data(args: Any) -> tuple[list[Any], int]:
    """FedML's data set contract, empty, and an output dimension of 0."""
    del args
    return [0, 0, [], [], {}, {}, {}, 0], 0


def _no_model(args: Any, output_dim: int = 0) -> Any:
    """A model without parameters in the place of FedML's."""
    import torch

    del args, output_dim
    return torch.nn.Identity()
