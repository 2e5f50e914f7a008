"""Tiny random models, tokenizers and samples for tests; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedml_plugin_fedmosaic.data.base import Sample

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nyou are a helpful assistant<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"llama": LLAMA_TEMPLATE, "qwen2": QWEN_TEMPLATE}
SPECIAL = {
    "llama": ["<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|im_start|>", "<|im_end|>"],
}
_VOCABULARY = (
    "user assistant system you are a helpful which what is the in this these image images animal "
    "colour answer choice list choose from of same true false yes no Yes No True False cat dog "
    "bird fish red green blue one two three four five A B C D Image and first second Choice : [ ] "
    ", . ? ! ' - your with not fit does hello world good bad"
)
WORDS = _VOCABULARY.split()


def build_tokenizer(family: str = "llama", template: str | None = None) -> Any:
    """A word-level tokenizer with the chat template of a family and a byte-free vocabulary."""
    special = ["<pad>", "<unk>", "<image>", *SPECIAL[family]]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*special, *WORDS]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    end = SPECIAL[family][-1]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        eos_token=end,
        bos_token=SPECIAL[family][0],
        additional_special_tokens=["<image>", *SPECIAL[family]],
    )
    tokenizer.chat_template = template or TEMPLATES[family]
    return tokenizer


def text_config(family: str, vocab_size: int, *, hidden: int = 32, layers: int = 4) -> Any:
    """A tiny text configuration."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,  # so that a frozen head can become certain
    }
    return LlamaConfig(**shape) if family == "llama" else Qwen2Config(**shape)


def save_text_model(
    folder: Path, family: str = "llama", *, seed: int = 0, tied: bool = False, **shape: Any
) -> Path:
    """Writes a tiny random causal language model with its tokenizer."""
    tokenizer = build_tokenizer(family)
    config = text_config(family, len(tokenizer), **shape)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (LlamaForCausalLM if family == "llama" else Qwen2ForCausalLM)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_llava(
    folder: Path, family: str = "llama", *, seed: int = 0, image_size: int = 16, **shape: Any
) -> Path:
    """Writes a tiny random LLaVA over a CLIP tower: 4 image tokens per 16-pixel image."""
    tokenizer = build_tokenizer(family)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        projection_dim=24,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(family, len(tokenizer), **shape),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size=size, do_center_crop=True
    ).save_pretrained(folder)
    return folder


def save_image(path: Path, colour: str, size: tuple[int, int] = (20, 16)) -> Path:
    """Writes a one-colour image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def text_samples(count: int, task: str = "words-0") -> tuple[Sample, ...]:
    """Questions without images, of different lengths."""
    animals = ("cat", "dog", "bird", "fish")
    return tuple(
        Sample(
            sample_id=str(index),
            task=task,
            turns=(
                "which animal is this ? " * (1 + index % 3)
                + "Choice list:[cat, dog, bird, fish]. your answer is :",
                animals[index % 4],
            ),
        )
        for index in range(count)
    )


def image_samples(
    folder: Path, count: int, task: str = "colours-0", images: Sequence[int] = (1, 2, 0)
) -> tuple[Sample, ...]:
    """Questions with ``images[i % len]`` images each."""
    colours = ("red", "green", "blue")
    samples = []
    for index in range(count):
        number = images[index % len(images)]
        paths = tuple(
            save_image(folder / f"{task}-{index}-{k}.png", colours[(index + k) % 3])
            for k in range(number)
        )
        samples.append(
            Sample(
                sample_id=str(index),
                task=task,
                turns=(
                    "<image>" * number + "what colour is this ? Choice list:[red, green, blue].",
                    colours[index % 3],
                ),
                images=paths,
            )
        )
    return tuple(samples)


def linear_bytes(module: torch.nn.Module) -> int:
    """Bytes of the weights of all linears, with the scales of quantised ones."""

    def size(weight: Any) -> int:
        if not hasattr(weight, "__tensor_flatten__"):
            return int(weight.nbytes)
        return sum(size(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])

    linears = (part for part in module.modules() if isinstance(part, torch.nn.Linear))
    return sum(size(linear.weight) for linear in linears)
