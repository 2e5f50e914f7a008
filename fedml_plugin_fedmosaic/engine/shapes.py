"""Widths of a base model without its weights: from its configuration, or published ones.

An estimate needs widths only. A model that is in the cache is outlined from its own
``config.json``; of the models of the paper's experiments the published dimensions are known, so
that they can be looked at without any network. The image-text models are LLaVA-v1.5 models
(arXiv 2310.03744): a CLIP ViT-L/14 tower at 336 pixels, 576 tokens per image, and a projector of
two linears.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from fedml_plugin_fedmosaic.adapters.structure import find_text_tower
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.engine.hub import is_hub_id, snapshot
from fedml_plugin_fedmosaic.engine.models import CACHED_TOWER
from fedml_plugin_fedmosaic.engine.places import errors_named, model_folder

CONFIGURED = "config.json"
PUBLISHED = "published dimensions"
_VISION_PARAMETERS = 303_507_456  # CLIP ViT-L/14 at 336 pixels
_VISION_WIDTH = 1024
_IMAGE_TOKENS = 576


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear of a decoder layer.

    Attributes:
        layer: 0-based decoder layer.
        module: last part of its name, e.g. ``q_proj``.
        in_features: input width.
        out_features: output width.
    """

    layer: int
    module: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What an estimate has to know of a base model.

    Attributes:
        hidden: width h of the decoder.
        inner: width i of its feed-forward part.
        attention: heads times their width.
        key_value: key-value heads times their width.
        layers: decoder layers.
        vocab: tokens of the output head.
        parameters: of the whole model, with vision tower.
        vision_parameters: of the vision tower and the projector; 0 for a text model.
        image_tokens: tokens of one image; 0 for a text model.
        linears: of all decoder layers that may carry an adapter.
        source: ``config.json`` or ``published dimensions``.
    """

    hidden: int
    inner: int
    attention: int
    key_value: int
    layers: int
    vocab: int
    parameters: int
    vision_parameters: int
    image_tokens: int
    linears: tuple[Linear, ...]
    source: str

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the decoder's linears, which decide the work per token."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)


@dataclass(frozen=True, slots=True)
class _Text:
    """Dimensions of a published text model."""

    hidden: int
    inner: int
    layers: int
    attention: int
    key_value: int
    vocab: int
    tied: bool
    biases: bool


def _llama(hidden: int, inner: int, layers: int, key_value: int, *, tied: bool = True) -> _Text:
    return _Text(hidden, inner, layers, hidden, key_value, 128256, tied, biases=False)


def _qwen(hidden: int, inner: int, layers: int, key_value: int) -> _Text:
    return _Text(hidden, inner, layers, hidden, key_value, 151936, tied=True, biases=True)


_TEXT: Mapping[str, _Text] = {
    "llama3.2-1b": _llama(2048, 8192, 16, 512),
    "llama3.2-3b": _llama(3072, 8192, 28, 1024),
    "llama3.1-8b": _llama(4096, 14336, 32, 1024, tied=False),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 128),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 256),
    "qwen2.5-3b": _qwen(2048, 11008, 36, 256),
}
_NAME = re.compile(r"(llama|qwen)-?(\d\.\d)[-_](\d+(?:\.\d+)?b)(.*)")
_ENDINGS = ("", "_vl", "-vl", "-instruct", "-base")


def published_names() -> tuple[str, ...]:
    """Short names of the text models whose dimensions are built in, e.g. ``llama3.2-1b``."""
    return tuple(_TEXT)


def published_shape(path: str) -> ModelShape | None:
    """The dimensions of a model of the paper's experiments by its hub id or short name.

    Args:
        path: ``meta-llama/Llama-3.2-1B``, ``Qwen/Qwen2.5-0.5B-Instruct``,
            ``thkim0305/llama3.2_1B_vl`` and their like; an ending ``_vl`` means the LLaVA-v1.5
            model over it.

    Returns:
        None for a model that is not one of them.
    """
    found = _NAME.fullmatch(path.rpartition("/")[2].lower())
    if found is None or found[4] not in _ENDINGS:
        return None
    text = _TEXT.get(f"{found[1]}{found[2]}-{found[3]}")
    if text is None:
        return None
    shape = _text_shape(text)
    return _with_vision(shape) if found[4].endswith("vl") else shape


def _text_shape(text: _Text) -> ModelShape:
    widths = {
        "q_proj": (text.hidden, text.attention),
        "k_proj": (text.hidden, text.key_value),
        "v_proj": (text.hidden, text.key_value),
        "o_proj": (text.attention, text.hidden),
        "gate_proj": (text.hidden, text.inner),
        "up_proj": (text.hidden, text.inner),
        "down_proj": (text.inner, text.hidden),
    }
    linears = tuple(
        Linear(layer=layer, module=module, in_features=width[0], out_features=width[1])
        for layer in range(text.layers)
        for module, width in widths.items()
    )
    in_linears = sum(linear.in_features * linear.out_features for linear in linears)
    per_layer = 2 * text.hidden  # two normalisations
    if text.biases:
        per_layer += text.attention + 2 * text.key_value
    embeddings = text.vocab * text.hidden * (1 if text.tied else 2)
    return ModelShape(
        hidden=text.hidden,
        inner=text.inner,
        attention=text.attention,
        key_value=text.key_value,
        layers=text.layers,
        vocab=text.vocab,
        parameters=in_linears + text.layers * per_layer + text.hidden + embeddings,
        vision_parameters=0,
        image_tokens=0,
        linears=linears,
        source=PUBLISHED,
    )


def _with_vision(shape: ModelShape) -> ModelShape:
    projector = (_VISION_WIDTH + 1) * shape.hidden + (shape.hidden + 1) * shape.hidden
    vision = _VISION_PARAMETERS + projector
    return replace(
        shape,
        parameters=shape.parameters + vision,
        vision_parameters=vision,
        image_tokens=_IMAGE_TOKENS,
    )


def model_shape(
    name: str, spec: ModelSpec, target_modules: tuple[str, ...] = ()
) -> ModelShape | None:
    """A model's widths: of its own configuration where it is there, else the published ones.

    Args:
        name: the model's name in the configuration.
        spec: of the model.
        target_modules: linears that carry adapters; all of a Llama-like layer when empty.

    Returns:
        None for a hub model that is not in the cache and not one of the paper's.

    Raises:
        ConfigError: its ``config.json`` is damaged, or a folder does not exist.
        AdapterError: a target module is missing in the model.
    """
    if is_hub_id(spec.path) and snapshot(spec.path) is None:
        return published_shape(spec.path)
    return _configured_shape(name, spec, target_modules)


def _configured_shape(name: str, spec: ModelSpec, target_modules: tuple[str, ...]) -> ModelShape:
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
    text = config.get_text_config()
    targets = target_modules or ("q_proj", "k_proj", "v_proj", "o_proj")
    if not target_modules:
        targets = (*targets, "gate_proj", "up_proj", "down_proj")
    tower = find_text_tower(model, targets, text.num_hidden_layers)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    outside = 0
    if has_vision:
        decoder = sum(parameter.numel() for parameter in model.get_decoder().parameters())
        head = model.get_output_embeddings().weight
        tied = head is model.get_input_embeddings().weight
        outside = parameters - decoder - (0 if tied else head.numel())
    return ModelShape(
        hidden=int(text.hidden_size),
        inner=int(text.intermediate_size),
        attention=heads * width,
        key_value=int(getattr(text, "num_key_value_heads", heads)) * width,
        layers=int(text.num_hidden_layers),
        vocab=int(text.vocab_size),
        parameters=parameters,
        vision_parameters=outside,
        image_tokens=_image_tokens(config) if has_vision else 0,
        linears=tuple(
            Linear(
                layer=target.layer,
                module=target.module,
                in_features=target.in_features,
                out_features=target.out_features,
            )
            for target in tower.targets
        ),
        source=CONFIGURED,
    )


def _image_tokens(config: Any) -> int:
    """Tokens of one image: patches of the tower, or what the configuration says."""
    vision = config.vision_config
    if vision.model_type == CACHED_TOWER:
        return int(vision.num_tokens)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2
    return int(getattr(config, "image_seq_length", _IMAGE_TOKENS))
