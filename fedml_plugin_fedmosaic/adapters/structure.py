"""Finds the linears of a text tower that carry adapters, by structure and not by family name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedml_plugin_fedmosaic.core.errors import AdapterError

ALL_LINEAR = "all-linear"
"""Stands for every linear of a decoder layer, whatever the architecture calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One linear of a decoder layer.

    Attributes:
        name: dotted name inside the model.
        layer: 0-based decoder layer.
        module: last part of the name, e.g. ``q_proj``.
        in_features: input width.
        out_features: output width.
    """

    name: str
    layer: int
    module: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTower:
    """The decoder of a model.

    Attributes:
        name: dotted name of the module that owns the decoder layers; empty for the model itself.
        num_layers: decoder layers.
        targets: linears that carry adapters, by layer, in module order.
    """

    name: str
    num_layers: int
    targets: tuple[Target, ...]


def find_text_tower(
    model: nn.Module, target_modules: Iterable[str], num_layers: int | None = None
) -> TextTower:
    """Finds decoder layers and their target linears.

    Vision tower, projector and output head are never searched when the model says which part of
    it is the decoder, as all generative Hugging Face models do (``get_decoder``).

    Args:
        model: a Hugging Face model, plain or already carrying adapters.
        target_modules: last names of the linears; each must be in every decoder layer once.
            ``all-linear`` alone: all that the first decoder layer has.
        num_layers: decoder layers; read from the model's configuration when omitted.

    Returns:
        The tower and its targets.

    Raises:
        AdapterError: no list of so many layers or more than one, or a target is missing, occurs
            twice in a layer, or is not a linear.
    """
    wanted = sorted(set(target_modules))
    if not wanted:
        raise AdapterError(
            "no target modules are given; expected at least one linear such as q_proj",
            hint="set adapter.target_modules",
        )
    count = _configured_layers(model) if num_layers is None else num_layers
    owner, layers_name, layers = _decoder_layers(model, count)
    wanted = resolved_names(wanted, linear_names(layers[0]))
    targets: list[Target] = []
    problems: list[str] = []
    for index, layer in enumerate(layers):
        found = dict(_linears(layer, wanted, problems, f"{layers_name}.{index}"))
        for module in wanted:
            paths = [path for path in found if path.rpartition(".")[2] == module]
            if len(paths) != 1:
                problems.append(f"layer {index}: {len(paths)} linears are called {module!r}")
                continue
            linear = found[paths[0]]
            targets.append(
                Target(
                    name=f"{layers_name}.{index}.{paths[0]}",
                    layer=index,
                    module=module,
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                )
            )
    if problems:
        known = linear_names(layers[0])
        raise AdapterError(
            "target modules do not fit the model; expected each in every decoder layer once: "
            + "; ".join(problems[:6])
            + (f"; and {len(problems) - 6} more" if len(problems) > 6 else ""),
            hint=f"linears of a decoder layer of this model: {', '.join(known) or 'none'}",
        )
    return TextTower(name=owner, num_layers=count, targets=tuple(targets))


def linear_names(layer: nn.Module) -> list[str]:
    """Last names of a decoder layer's linears, ascending; adapters on them do not count."""
    return sorted({path.rpartition(".")[2] for path, _ in _linears(layer, None, [], "")})


def resolved_names(target_modules: Iterable[str], linears: Iterable[str]) -> list[str]:
    """Last names of the linears that target modules stand for, ascending.

    Args:
        target_modules: as configured; ``all-linear`` alone stands for all.
        linears: what a decoder layer of the model has, see :func:`linear_names`.
    """
    wanted = sorted(set(target_modules))
    return sorted(set(linears)) if wanted == [ALL_LINEAR] else wanted


def _configured_layers(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text_config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise AdapterError(
            f"{type(model).__name__} does not say how many decoder layers it has",
            hint="give num_layers",
        )
    return count


def _decoder_layers(model: Any, count: int) -> tuple[str, str, nn.ModuleList]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    root = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = [
        (_join(root, name), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # A list inside a layer (say, as many experts as layers) is not the list of layers.
    outer = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if len(outer) != 1:
        raise AdapterError(
            f"expected one list of {count} decoder layers in {type(decoder).__name__}, "
            f"found {len(outer)}: {', '.join(name for name, _ in outer) or 'none'}",
            hint="use a decoder-only text tower such as Llama or Gemma, and its true depth",
        )
    name, layers = outer[0]
    return name.rpartition(".")[0], name, layers


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _linears(
    layer: nn.Module, wanted: list[str] | None, problems: list[str], where: str
) -> Iterator[tuple[str, nn.Linear]]:
    """Linears of a layer; a linear inside an adapter's wrapper goes by the wrapper's name."""
    wrappers: list[str] = []
    for name, module in layer.named_modules():
        if any(name.startswith(f"{wrapper}.") for wrapper in wrappers):
            continue
        base: Any = module
        if _is_adapted(module):
            wrappers.append(name)
            base = module.get_base_layer()
        if wanted is not None and name.rpartition(".")[2] not in wanted:
            continue
        if isinstance(base, nn.Linear):
            yield name, base
        elif wanted is not None:
            problems.append(f"{where}.{name} is {type(base).__name__}, not a linear")


def _is_adapted(module: Any) -> bool:
    """Whether a module is PEFT's wrapper of a layer.

    Nothing is while PEFT is not imported, which takes seconds that a look at a model does not need.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
