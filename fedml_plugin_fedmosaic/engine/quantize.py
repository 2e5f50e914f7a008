"""Weights of 8 bits for a model that is only the proxy of the sketches.

Weight-only: each row of a linear's weight becomes integers from -128 to 127 and one scale
(torchao's ``Int8WeightOnlyConfig``); activations keep their dtype. No client can
train such a model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping

from torch import nn

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError


def check_quantised(models: Mapping[str, ModelSpec], trained: Collection[str]) -> None:
    """Finds quantised models that cannot be used before a weight is read.

    Args:
        models: the models of a run, by name.
        trained: names of those that a client trains.

    Raises:
        ConfigError: a client trains one, or torchao is not installed.
    """
    for name, spec in models.items():
        if spec.quantization == "none":
            continue
        if name in trained:
            raise ConfigError(
                f"model {name!r} has quantization {spec.quantization}, but a client trains it",
                hint=f"models.{name} needs quantization: none; to quantise only the proxy, "
                "add another entry with the same path and quantization: int8 and name that one in "
                "sketch_args.sketch.proxy",
            )
        _require_torchao(name)


def quantise_linears(name: str, body: nn.Module, keep: Collection[nn.Module]) -> None:
    """Replaces the weights of a frozen model's linears by 8-bit ones, in place.

    Args:
        name: the model's name in the configuration.
        body: its linears ``(out, in)`` get int8 weights with one scale per output row. Sub-classes
            of ``nn.Linear`` stay as they are, because some modules read their weights directly.
        keep: linears whose weights somebody reads; they stay in full precision.

    Raises:
        ConfigError: torchao is not installed, or ``body`` has no linear to quantise.
    """
    _require_torchao(name)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    kept = {id(module) for module in keep}
    linears = {
        id(module)
        for module in body.modules()
        if type(module) is nn.Linear and id(module) not in kept
    }
    if not linears:
        raise ConfigError(
            f"model {name!r}: quantization int8 found no linear besides the ones that stay as they "
            "are",
            hint="set quantization: none",
        )
    quantize_(
        body,
        # The settings of torch's compiler belong to the whole process.
        Int8WeightOnlyConfig(set_inductor_config=False),
        filter_fn=lambda module, _: id(module) in linears,
    )


def _require_torchao(name: str) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"model {name!r} has quantization int8, which needs torchao; it is not installed",
            hint="pip install 'fedml-plugin-fedmosaic[quantize]'",
        )
