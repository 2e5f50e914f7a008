"""Tiny random models of many architectures, in milliseconds; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import build_tokenizer

HIDDEN, INNER, LAYERS, HEADS = 32, 80, 4, 4


@dataclass(frozen=True)
class Family:
    """One architecture: transformers' configuration class and what differs from the usual."""

    config: str
    linears: tuple[str, ...]
    down: str
    options: dict[str, Any] = field(default_factory=dict)


GATED = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
FUSED = ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")
PHI = ("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj")
NEOX = ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value")
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
FAMILIES = {
    "llama": Family("LlamaConfig", GATED, "mlp.down_proj"),
    "llama-tied": Family("LlamaConfig", GATED, "mlp.down_proj", {"tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", GATED, "mlp.down_proj"),
    "qwen2": Family("Qwen2Config", GATED, "mlp.down_proj"),
    "qwen3": Family("Qwen3Config", GATED, "mlp.down_proj", {"head_dim": 16}),
    "gemma": Family("GemmaConfig", GATED, "mlp.down_proj", {"head_dim": 8}),
    "gemma2": Family("Gemma2Config", GATED, "mlp.down_proj", GEMMA),
    "gemma3": Family("Gemma3TextConfig", GATED, "mlp.down_proj", GEMMA),
    "smollm3": Family("SmolLM3Config", GATED, "mlp.down_proj"),
    "phi": Family("PhiConfig", PHI, "mlp.fc2"),
    "phi3": Family("Phi3Config", FUSED, "mlp.down_proj"),
    "gpt-neox": Family("GPTNeoXConfig", NEOX, "mlp.dense_4h_to_h"),
    "granite": Family("GraniteConfig", GATED, "mlp.down_proj", {"logits_scaling": 4.0}),
    "cohere": Family("CohereConfig", GATED, "mlp.down_proj", {"logit_scale": 0.25}),
    "olmo2": Family("Olmo2Config", GATED, "mlp.down_proj"),
}
TOWERS = ("llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3")
"""Of image-text models."""


def family_config(name: str, vocab_size: int) -> Any:
    """A tiny configuration; soft caps are small enough to matter."""
    family = FAMILIES[name]
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,
        "tie_word_embeddings": name.startswith("gemma"),
        **family.options,
    }
    if name == "gpt-neox":
        del shape["num_key_value_heads"]
    if name == "gemma2":
        shape |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
    return getattr(transformers, family.config)(**shape)


def save_family(folder: Path, name: str, *, template: bool = True) -> Path:
    """Writes a tiny random causal language model of an architecture with its tokenizer."""
    tokenizer = build_tokenizer("llama")
    if not template:
        tokenizer.chat_template = None
    config = family_config(name, len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        _disturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_family_llava(folder: Path, name: str) -> Path:
    """Writes a tiny random LLaVA over CLIP with a text tower of an architecture."""
    tokenizer = build_tokenizer("llama")
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=24,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=family_config(name, len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
        _disturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=True
    ).save_pretrained(folder)
    return folder


def _disturb(model: torch.nn.Module) -> None:
    """Norm weights and biases of a fresh model are 1 and 0, which would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
