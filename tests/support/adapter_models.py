"""Tiny random models without tokenizers, and adapter helpers, for tests of adapters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedml_plugin_fedmosaic.config.sections import AdapterConfig
from fedml_plugin_fedmosaic.core.types import Part

VOCAB = 64
IMAGE_ID = 63
NUM_LAYERS = 5


def text_config(family: str, layers: int = NUM_LAYERS, hidden: int = 32) -> Any:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**shape) if family == "llama" else Qwen2Config(**shape)


def build(kind: str = "llama", *, seed: int = 0, dtype: Any = torch.float32, **shape: Any) -> Any:
    """A frozen model: ``llama``, ``qwen2`` or ``llava`` (over a CLIP tower as deep as the text)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llava":
            config = LlavaConfig(
                vision_config=CLIPVisionConfig(
                    hidden_size=24,
                    intermediate_size=32,
                    num_hidden_layers=NUM_LAYERS,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=8,
                    projection_dim=24,
                ),
                text_config=text_config("qwen2", **shape),
                image_token_id=IMAGE_ID,
                vision_feature_layer=-1,
                vision_feature_select_strategy="default",
            )
            model = LlavaForConditionalGeneration(config)
        else:
            family = LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM
            model = family(text_config(kind, **shape))
        model = model.to(dtype)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False).eval()


def inputs(kind: str = "llama", *, dtype: Any = torch.float32, length: int = 9) -> dict[str, Any]:
    """A left-padded batch of two."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, IMAGE_ID, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "llava":
        ids[:, 4:8] = IMAGE_ID
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        batch["pixel_values"] = pixels.to(dtype)
    return batch


def config(**changes: Any) -> AdapterConfig:
    return AdapterConfig(**{"rank": 4, "alpha": 8.0, "num_blocks": 2, **changes})


def scramble(handle: Any, *, seed: int = 1, scale: float = 0.2, frozen: bool = False) -> None:
    """Random values in all tensors, so that branches and gates differ; A, B of PQ layers stay."""
    generator = torch.Generator().manual_seed(seed)
    state = handle.collect()
    for key, tensor in state.items():
        if key.branch == "shared" and key.part is not Part.GATE and not frozen:
            continue
        state[key] = torch.randn(tensor.shape, generator=generator) * scale
    handle.load(state)
