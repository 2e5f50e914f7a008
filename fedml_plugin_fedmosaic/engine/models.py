"""Loads a base model and finds its parts by structure, not by a list of class names.

Causal language models and LLaVA-like image-text models of Hugging Face are known. Nothing is ever
downloaded: a hub id must already be in the local cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils import cached_file, is_flash_attn_2_available

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.adapters.structure import linear_names
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError, IntegrationError
from fedml_plugin_fedmosaic.data.prompt import PLAIN_TEMPLATE, PromptEncoder
from fedml_plugin_fedmosaic.engine.base import ModelInfo
from fedml_plugin_fedmosaic.engine.deepspeed_world import GroupWorld
from fedml_plugin_fedmosaic.engine.derived import no_progress_bars
from fedml_plugin_fedmosaic.engine.memory import loading_memory
from fedml_plugin_fedmosaic.engine.parts import (
    decoder_layers,
    down_projection,
    final_norm,
    full_shape,
    last_down_projection,
)
from fedml_plugin_fedmosaic.engine.places import errors_named as errors_named
from fedml_plugin_fedmosaic.engine.places import model_folder
from fedml_plugin_fedmosaic.engine.places import resolve as resolve
from fedml_plugin_fedmosaic.engine.processor import (
    ImageSource,
    PixelSource,
    Processor,
    bundled_features,
)
from fedml_plugin_fedmosaic.engine.quantize import packed_options, quantise_linears

CACHED_TOWER = "cached_tower"

_SIGNATURE_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How a rank group shares a model.

    Attributes:
        group: the ranks.
        config: complete DeepSpeed configuration.
    """

    group: GroupWorld
    config: Mapping[str, Any]

    @property
    def cuts_weights(self) -> bool:
        """Whether no rank has the whole base model (ZeRO stage 3)."""
        return bool(self.config["zero_optimization"]["stage"] == 3)


@dataclass(slots=True, kw_only=True)
class ModelBundle:
    """A frozen base model, its processor and its parts.

    Attributes:
        model: Hugging Face model with a language-modelling head, in evaluation mode.
        processor: encodes samples for this model.
        info: what the rest of the program may know.
        num_layers: decoder layers.
        device: where the model is.
        text_model: decoder without head and without vision tower.
        decoder_layers: its layers.
        final_norm: the normalisation before the head.
        down_proj_name: dotted name of the last linear inside a decoder layer.
        adapter: what is injected at present; None if the base model is plain.
        sharding: the rank group that trains it with DeepSpeed; None: this process, with PyTorch.
    """

    model: Any
    processor: Processor
    info: ModelInfo
    num_layers: int
    device: torch.device
    text_model: nn.Module
    decoder_layers: nn.ModuleList
    final_norm: nn.Module
    down_proj_name: str
    adapter: InjectedAdapter | None = None
    sharding: Sharding | None = None

    @property
    def body(self) -> nn.Module:
        """The model without its head: same inputs, returns hidden states."""
        body: nn.Module = self.model.base_model
        return body

    @property
    def last_down_proj(self) -> nn.Module:
        """Down projection of the last layer (the adapter's wrapper while one is injected)."""
        return self.decoder_layers[-1].get_submodule(self.down_proj_name)

    @property
    def lm_head(self) -> Tensor:
        """Output embedding ``(V, d)``, tied to the input embedding or not."""
        weight = self.model.get_output_embeddings().weight
        if not isinstance(weight, Tensor):
            raise IntegrationError(f"model {self.info.name!r}: its output embedding has no weight")
        return weight

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits; often more than the tokenizer has tokens."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def norm_eps(self) -> float | None:
        """Epsilon of the final normalisation, if it says."""
        for name in ("variance_epsilon", "eps"):
            if hasattr(self.final_norm, name):
                return float(getattr(self.final_norm, name))
        return None


def load_model(name: str, spec: ModelSpec, device: torch.device) -> ModelBundle:
    """Loads a base model, frozen, with tokenizer and image processing.

    Args:
        name: the model's name in the configuration.
        spec: ``path`` is ``bundled:<name>``, a folder, or a hub id that is in the local cache.
        device: where to put it.

    Raises:
        ConfigError: no such model, files are missing or damaged, or the model is of a kind that
            this package cannot train.
        OutOfMemory: it does not fit into the memory of the device or the machine.
    """
    source = model_folder(name, spec)
    with loading_memory(name, spec, device):
        return _load(name, spec, device, source)


def _load(name: str, spec: ModelSpec, device: torch.device, source: str) -> ModelBundle:
    with errors_named(name, spec.path), no_progress_bars():
        loader, _ = model_class(source)
        model, report = loader.from_pretrained(
            source,
            local_files_only=True,
            use_safetensors=True,
            dtype=getattr(torch, spec.dtype),
            output_loading_info=True,
            **attention_options(spec, device),
            **packed_options(name, spec, device),
        )
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise ConfigError(
            f"model {name!r} at {spec.path!r}: expected all weights of its configuration, "
            f"{len(missing)} are missing or of another shape, e.g. {missing[0]}",
            hint="the checkpoint is incomplete or belongs to another config.json",
        )
    model.requires_grad_(False)
    model.eval()
    if spec.quantization == "int8":
        # The closed-form gradient reads the last down projection's weight; norms and head are not
        # among the body's linears.
        quantise_linears(name, model.base_model, keep=[last_down_projection(name, model)])
    if not spec.quantization.startswith("bnb_"):  # which loads them to where they belong
        model.to(device)
    return build_bundle(name, spec, model, source, device)


def attention_options(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    """Options of ``from_pretrained`` for the attention kernels.

    With ``auto``, transformers takes PyTorch's fused attention where the architecture allows it,
    and plain matrix products where not (soft-capped scores); flash attention is preferred on a GPU
    that has it, for half-precision weights.
    """
    if spec.attention != "auto":
        return {"attn_implementation": spec.attention}
    half = spec.dtype in ("bfloat16", "float16")
    if device.type == "cuda" and half and is_flash_attn_2_available():
        return {"attn_implementation": "flash_attention_2"}
    return {}


def model_class(source: str) -> tuple[Any, str | None]:
    """Transformers' class that loads a model, and the type of its vision tower, if it has one."""
    fields, _ = PretrainedConfig.get_config_dict(source, local_files_only=True)
    vision_type = (fields.get("vision_config") or {}).get("model_type")
    if vision_type == CACHED_TOWER:
        # Registers the model type with transformers.
        from fedml_plugin_fedmosaic.engine import tower as _tower  # noqa: F401
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    has_vision = getattr(config, "vision_config", None) is not None
    return (AutoModelForImageTextToText if has_vision else AutoModelForCausalLM), vision_type


def build_bundle(
    name: str, spec: ModelSpec, model: Any, source: str, device: torch.device
) -> ModelBundle:
    """Puts tokenizer and image processing beside a loaded, frozen model and finds its parts.

    Args:
        name: the model's name in the configuration.
        spec: of the model.
        model: with whole weights, or with weights cut over the ranks of a group.
        source: folder, or hub id in the local cache.
        device: where the model is.

    Raises:
        ConfigError: files are missing, or the model is of a kind that cannot be trained here.
    """
    loader, vision_type = model_class(source)
    with errors_named(name, spec.path):
        tokenizer = _load_tokenizer(source)
    has_vision = loader is AutoModelForImageTextToText
    images = _image_source(source, vision_type, name, spec.path) if has_vision else None
    return _bundle(name, spec, model, tokenizer, images, device)


def _bundle(
    name: str,
    spec: ModelSpec,
    model: Any,
    tokenizer: Any,
    images: ImageSource | None,
    device: torch.device,
) -> ModelBundle:
    text_config = model.config.get_text_config()
    text_model = model.get_decoder()
    layers = decoder_layers(text_model, text_config.num_hidden_layers, name)
    encoder = PromptEncoder(
        tokenizer,
        image_token_id=None if images is None else _image_token_id(model.config, name),
        tokens_per_image=0 if images is None else _tokens_per_image(model, images),
    )
    end_ids = {encoder.end_of_turn(), tokenizer.eos_token_id} - {None}
    dtype = getattr(torch, spec.dtype)
    num_parameters = sum(full_shape(parameter).numel() for parameter in model.parameters())
    return ModelBundle(
        model=model,
        processor=Processor(
            tokenizer=tokenizer,
            encoder=encoder,
            images=images,
            device=device,
            dtype=dtype,
            end_ids=[int(token) for token in end_ids if token is not None],
        ),
        info=ModelInfo(
            name=name,
            family=str(text_config.model_type),
            size=spec.size or size_label(num_parameters),
            signature=signature(text_config),
            num_layers=len(layers),
            num_parameters=num_parameters,
            linears=tuple(linear_names(layers[0])),
        ),
        num_layers=len(layers),
        device=device,
        text_model=text_model,
        decoder_layers=layers,
        final_norm=final_norm(text_model, text_config.hidden_size, name),
        down_proj_name=down_projection(layers[-1], text_config, name),
    )


def signature(text_config: PretrainedConfig) -> str:
    """Shape class of a text tower: equal signatures have interchangeable adapter tensors."""
    values = [getattr(text_config, field, None) for field in _SIGNATURE_FIELDS]
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=5).hexdigest()
    return f"{text_config.model_type}-{digest}"


def size_label(num_parameters: int) -> str:
    """A short label such as ``0.6M`` or ``1.2B``."""
    if num_parameters >= 100_000_000:
        return f"{num_parameters / 1e9:.1f}B"
    if num_parameters >= 100_000:
        return f"{num_parameters / 1e6:.1f}M"
    return f"{num_parameters / 1e3:.0f}K"


def _load_tokenizer(source: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if not tokenizer.chat_template:
        # Image-text checkpoints keep the template beside the processor.
        path = cached_file(
            source,
            "chat_template.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
        if path is not None:
            text = json.loads(Path(path).read_text(encoding="utf-8"))
            tokenizer.chat_template = text["chat_template"]
    if not tokenizer.chat_template and tokenizer.eos_token is not None:
        # A base model that was never taught a conversation.
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _image_source(source: str, vision_type: str | None, name: str, path: str) -> ImageSource:
    if vision_type == CACHED_TOWER:
        return bundled_features()
    with errors_named(name, path):
        return PixelSource(AutoImageProcessor.from_pretrained(source, local_files_only=True))


def _image_token_id(config: PretrainedConfig, name: str) -> int:
    for field in ("image_token_id", "image_token_index"):
        value = getattr(config, field, None)
        if value is not None:
            return int(value)
    raise ConfigError(f"model {name!r}: its config.json names no image_token_id")


@torch.no_grad()
def _tokens_per_image(model: Any, images: ImageSource) -> int:
    """Runs the vision tower once, because configurations describe the number in many ways."""
    vision = model.config.vision_config
    if vision.model_type == CACHED_TOWER:
        return int(vision.num_tokens)
    if not isinstance(images, PixelSource):
        raise IntegrationError("pixels of a vision tower must come from its image processor")
    if any(hasattr(weight, "ds_shape") for weight in model.parameters()):
        # Shapes are enough, and no rank has the whole tower.
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(model.config)
    pixels = images.blank().to(device=model.device, dtype=model.dtype)
    features = model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    return int(features[0].shape[-2])
