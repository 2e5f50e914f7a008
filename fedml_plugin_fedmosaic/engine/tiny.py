"""Small vision-language architectures of two families and their word-level tokenizer.

They exercise the classes of the real checkpoints (``LlavaForConditionalGeneration`` over a
Llama-like or Qwen2-like text tower) at a size that trains on a laptop's processor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.engine.tower import NUM_TOKENS, CachedTowerConfig

Family = Literal["llama", "qwen2"]

IMAGE_TOKEN = "<image>"  # noqa: S105 - a mark in a text
CHOICES_OPEN = "Choice list:["
CHOICES_CLOSE = "]. Your answer is:"
_FIXED = "|".join(re.escape(mark) for mark in (IMAGE_TOKEN, CHOICES_OPEN, CHOICES_CLOSE))
_MAX_POSITIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyArch:
    """Sizes of one architecture; every linear is at least 32 wide, so rank 16 adapters fit."""

    name: str
    family: Family
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    initializer_range: float = 0.02


ARCHITECTURES: Mapping[str, TinyArch] = {
    arch.name: arch
    for arch in (
        TinyArch(
            name="llama-small", family="llama",
            hidden=96, layers=4, heads=4, kv_heads=2, intermediate=256,
        ),
        TinyArch(
            name="llama-large", family="llama",
            hidden=128, layers=6, heads=4, kv_heads=2, intermediate=320,
        ),
        TinyArch(
            name="qwen2-small", family="qwen2",
            hidden=96, layers=4, heads=6, kv_heads=2, intermediate=224,
        ),
        TinyArch(
            name="qwen2-large", family="qwen2",
            hidden=128, layers=6, heads=8, kv_heads=2, intermediate=288,
        ),
    )
}  # fmt: skip

LITE_ARCHITECTURES: Mapping[str, TinyArch] = {
    arch.name: arch
    for arch in (
        TinyArch(
            name="lite-llama-small", family="llama",
            hidden=128, layers=4, heads=4, kv_heads=2, intermediate=384, initializer_range=0.06,
        ),
        TinyArch(
            name="lite-llama-large", family="llama",
            hidden=160, layers=6, heads=4, kv_heads=2, intermediate=448, initializer_range=0.06,
        ),
        TinyArch(
            name="lite-qwen2-small", family="qwen2",
            hidden=128, layers=4, heads=8, kv_heads=2, intermediate=352, initializer_range=0.06,
        ),
    )
}  # fmt: skip
"""Those of DRAKE-lite: larger, because its tasks relate several images."""


@dataclass(frozen=True, slots=True)
class _Marks:
    """A family's special tokens, named as in the real checkpoints."""

    bos: str
    end_of_turn: str
    pad: str
    user: str
    assistant: str


_MARKS: Mapping[Family, _Marks] = {
    "llama": _Marks("<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|user|>", "<|assistant|>"),
    "qwen2": _Marks("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_user|>", "<|im_bot|>"),
}
_UNKNOWN = "<unk>"

# One token per turn mark. Content may be a string or a list of parts, as for real processors.
_CHAT_TEMPLATE = (
    "{{ '%(bos)s' }}"
    "{%% for message in messages %%}"
    "{%% if message['content'] is string %%}{%% set text = message['content'] %%}"
    "{%% else %%}{%% set ns = namespace(t='') %%}{%% for part in message['content'] %%}"
    "{%% set ns.t = ns.t + ('<image>' if part['type'] == 'image' else part['text']) %%}"
    "{%% endfor %%}{%% set text = ns.t %%}{%% endif %%}"
    "{%% if message['role'] == 'assistant' %%}{{ '%(assistant)s' }}"
    "{%% generation %%}{{ text + '%(end)s' }}{%% endgeneration %%}"
    "{%% else %%}{{ '%(user)s' + text + '%(end)s' }}{%% endif %%}"
    "{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '%(assistant)s' }}{%% endif %%}"
)


def words_of(texts: Iterable[str]) -> tuple[str, ...]:
    """All words of some texts as the tokenizer cuts them, sorted."""
    words: set[str] = set()
    for text in texts:
        bare = re.sub(_FIXED, " ", text)
        words.update(re.findall(r"\w+|[^\w\s,]", bare))
    return tuple(sorted(words))


def build_tokenizer(words: Iterable[str], family: Family) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a closed vocabulary, with a chat template.

    Commas and white space separate words and are no tokens; the fixed parts of a multi-choice
    prompt are one token each, so that prompts are short.

    Args:
        words: the vocabulary (see :func:`words_of`).
        family: decides the special tokens and the order of the vocabulary.
    """
    marks = _MARKS[family]
    special = [marks.pad, marks.bos, marks.end_of_turn, marks.user, marks.assistant]
    special += [IMAGE_TOKEN, _UNKNOWN]
    known = sorted(set(words), reverse=family == "qwen2")
    vocabulary = {word: i for i, word in enumerate([*special, CHOICES_OPEN, CHOICES_CLOSE, *known])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s,]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"[^\w\s]"), behavior="isolated"),
        ]
    )
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
    core.add_tokens([AddedToken(t, normalized=False) for t in (CHOICES_OPEN, CHOICES_CLOSE)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=marks.bos,
        eos_token=marks.end_of_turn,
        pad_token=marks.pad,
        unk_token=_UNKNOWN,
        additional_special_tokens=[IMAGE_TOKEN, marks.user, marks.assistant],
        padding_side="left",
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE % {
        "bos": marks.bos,
        "user": marks.user,
        "assistant": marks.assistant,
        "end": marks.end_of_turn,
    }
    return tokenizer


def _text_config(arch: TinyArch, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": arch.hidden,
        "intermediate_size": arch.intermediate,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "max_position_embeddings": _MAX_POSITIONS,
        "initializer_range": arch.initializer_range,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**sizes) if arch.family == "llama" else Qwen2Config(**sizes)


def build_model(
    arch: TinyArch, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> LlavaForConditionalGeneration:
    """A randomly initialised model over cached features, float32.

    The global generator of torch, which transformers' initialisation uses, is left as it was.

    Raises:
        ConfigError: the tokenizer has no image token.
    """
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if not isinstance(image_id, int) or image_id == tokenizer.unk_token_id:
        raise ConfigError(f"the tokenizer has no {IMAGE_TOKEN} token")
    config = LlavaConfig(
        vision_config=CachedTowerConfig(),
        text_config=_text_config(arch, tokenizer),
        image_token_index=image_id,
        image_seq_length=NUM_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialise", arch.name) % 2**63)
        return LlavaForConditionalGeneration(config)
