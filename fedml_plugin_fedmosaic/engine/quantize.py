"""Base models with weights of 8 or 4 bits.

``int8`` is for a model that is only the proxy of the sketches, and weight-only: each row of a
linear's weight becomes integers from -128 to 127 and one scale (torchao's
``Int8WeightOnlyConfig``); activations keep their dtype. No client can train such a model.

``bnb_int8`` and ``bnb_nf4`` are bitsandbytes' LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) and
4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
Gradients pass through their linears, so clients can train adapters, which stay in float32, on them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

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
        if spec.quantization.startswith("bnb_"):
            _require_bitsandbytes(name, spec)
            continue
        if name in trained:
            raise ConfigError(
                f"model {name!r} has quantization {spec.quantization}, but a client trains it",
                hint=f"models.{name} needs quantization: none; to quantise only the proxy, "
                "add another entry with the same path and quantization: int8 and name that one in "
                "sketch_args.sketch.proxy",
            )
        _require_torchao(name)


def packed_options(name: str, spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    """Options of ``from_pretrained`` that load a model's linears packed by bitsandbytes.

    Output embedding and norms keep ``spec.dtype``, which is also what products are computed in.

    Args:
        name: the model's name in the configuration.
        spec: of the model.
        device: where the weights go.

    Returns:
        Nothing unless ``spec.quantization`` is one of bitsandbytes'.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if not spec.quantization.startswith("bnb_"):
        return {}
    _require_bitsandbytes(name, spec)
    if spec.quantization == "bnb_int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        )
    return {"quantization_config": config, "device_map": {"": device}}


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


def _require_bitsandbytes(name: str, spec: ModelSpec) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model {name!r} has quantization {spec.quantization}, which needs bitsandbytes; it is "
            "not installed",
            hint="pip install 'fedml-plugin-fedmosaic[bitsandbytes]'",
        )
