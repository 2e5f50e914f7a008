"""Writes one view of an adapter as a plain PEFT LoRA adapter.

A PQ layer computes ``s (x A^T P + Q) B^T``, which is LoRA with ``A' = A``, ``B' = B P^T`` and the
bias ``B Q`` inside the scaling, where PEFT's ``lora_bias`` has it too. A scalar gate is a number,
so it is mixed into P and Q; a gated conventional layer becomes one LoRA of twice the rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.adapters.handle import AdapterHandle, PlainLayer
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import View

_PREFIX = "base_model.model."


def export_plain_lora(injected: InjectedAdapter, out_dir: Path, view: View) -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` for stock ``peft``.

    ``peft.PeftModel.from_pretrained(base_model, out_dir)`` then computes what this view computes;
    neither this package nor its PEFT method is needed there.

    Args:
        injected: what one of the shelf's functions returned.
        out_dir: folder to write; made if missing.
        view: local, global, or gated with a scalar gate.

    Returns:
        ``out_dir``.

    Raises:
        AdapterError: the view is no fixed weight (input gate) or has no adapter, or the adapter
            does not know how to become plain LoRA.
    """
    if not isinstance(injected, AdapterHandle):
        raise AdapterError(
            f"{type(injected).__name__} cannot be written as plain LoRA",
            hint="only adapters derived from adapters.handle.AdapterHandle can",
        )
    layers = injected.plain(view)
    rank, scaling = injected.shape()
    with_bias = any(layer.bias is not None for layer in layers.values())
    peft_config = _config(layers, rank, scaling, with_bias)
    model: Any = injected.model
    own = next(iter(model.peft_config.values()))
    peft_config.base_model_name_or_path = own.base_model_name_or_path
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = _cpu(layer.A)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = _cpu(layer.B)
        if with_bias:
            bias = torch.zeros(layer.B.shape[0]) if layer.bias is None else layer.bias
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = _cpu(bias)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config.save_pretrained(str(out_dir))
    return out_dir


def _config(
    layers: dict[str, PlainLayer], rank: int, scaling: float, with_bias: bool
) -> LoraConfig:
    others = {name: layer.A.shape[0] for name, layer in layers.items() if layer.A.shape[0] != rank}
    # PEFT divides alpha by each layer's own rank; names are patterns there.
    return LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,
        lora_dropout=0.0,
        target_modules=sorted(layers),
        rank_pattern={re.escape(name): value for name, value in others.items()},
        alpha_pattern={re.escape(name): scaling * value for name, value in others.items()},
        lora_bias=with_bias,
        inference_mode=True,
    )


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().clone()
