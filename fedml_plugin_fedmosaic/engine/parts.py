"""The parts of a loaded model, found by structure and not by a list of families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import ConfigError


def full_shape(weight: Tensor) -> torch.Size:
    """Shape of a weight, also if this rank holds only a piece of it."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def decoder_layers(text_model: nn.Module, num_layers: int, name: str) -> nn.ModuleList:
    """The list of decoder layers of a text tower.

    Raises:
        ConfigError: no list of that length.
    """
    for child in text_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return child
    raise ConfigError(
        f"model {name!r}: expected a list of {num_layers} decoder layers in "
        f"{type(text_model).__name__}, got none",
        hint="use a decoder-only text tower such as Llama, Qwen, Gemma, Mistral or Phi",
    )


def final_norm(text_model: nn.Module, hidden: int, name: str) -> nn.Module:
    """The normalisation before the head: the last one of the tower's own.

    Raises:
        ConfigError: none of that width.
    """
    norms = [
        child
        for child in text_model.children()
        if isinstance(weight := getattr(child, "weight", None), Tensor)
        and tuple(full_shape(weight)) == (hidden,)
    ]
    if not norms:
        raise ConfigError(f"model {name!r}: no final normalisation of width {hidden} found")
    return norms[-1]


def last_down_projection(name: str, model: Any) -> nn.Module:
    """The linear that ends the feed-forward part of the last decoder layer."""
    config = model.config.get_text_config()
    layer = decoder_layers(model.get_decoder(), config.num_hidden_layers, name)[-1]
    return layer.get_submodule(down_projection(layer, config, name))


def down_projection(layer: nn.Module, text_config: Any, name: str) -> str:
    """Dotted name, inside a decoder layer, of the linear that ends its feed-forward part.

    It is the last linear into the residual stream; the configuration's inner width, if it has
    one, tells it from the attention's.

    Raises:
        ConfigError: there is none.
    """
    hidden = int(text_config.hidden_size)
    inner = getattr(text_config, "intermediate_size", None)
    found = [
        module_name
        for module_name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == hidden
        and inner in (None, module.in_features)
    ]
    if not found:
        kinds = sorted({type(module).__name__ for module in layer.modules()})
        raise ConfigError(
            f"model {name!r}: no linear from {inner or 'any width'} to {hidden} in its last "
            f"decoder layer, which is made of {', '.join(kinds)}",
            hint="use a decoder with a dense feed-forward part, such as Llama, Gemma or Phi",
        )
    return str(found[-1])
