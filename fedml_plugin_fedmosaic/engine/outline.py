"""What a base model is, read from its configuration without loading a weight."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from fedml_plugin_fedmosaic.adapters.structure import linear_names
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.engine.base import ModelInfo
from fedml_plugin_fedmosaic.engine.models import (
    CACHED_TOWER,
    errors_named,
    signature,
    size_label,
)
from fedml_plugin_fedmosaic.engine.parts import decoder_layers
from fedml_plugin_fedmosaic.engine.places import model_folder


def outline_model(name: str, spec: ModelSpec) -> ModelInfo:
    """The same as ``load_model(...).info``, for ranks that do not need the weights.

    The model is built on torch's meta device, which has shapes but no memory.

    Args:
        name: the model's name in the configuration.
        spec: as for ``load_model``.

    Raises:
        ConfigError: no such model, its configuration is damaged, or it has no list of decoder
            layers.
    """
    source = model_folder(name, spec)
    with errors_named(name, spec.path):
        fields, _ = PretrainedConfig.get_config_dict(source, local_files_only=True)
        if (fields.get("vision_config") or {}).get("model_type") == CACHED_TOWER:
            # Registers the model type with transformers.
            from fedml_plugin_fedmosaic.engine import tower as _tower  # noqa: F401
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        has_vision = getattr(config, "vision_config", None) is not None
        loader: Any = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        with torch.device("meta"):
            model = loader.from_config(config)
    text_config = config.get_text_config()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = decoder_layers(model.get_decoder(), text_config.num_hidden_layers, name)
    return ModelInfo(
        name=name,
        family=str(text_config.model_type),
        size=spec.size or size_label(num_parameters),
        signature=signature(text_config),
        num_layers=int(text_config.num_hidden_layers),
        num_parameters=num_parameters,
        linears=tuple(linear_names(layers[0])),
    )
