"""A tiny model whose tokenizer knows letters only, beside the word-level ones of tiny_models."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tiny_models import LLAMA_TEMPLATE, SPECIAL, text_config
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def letter_tokenizer() -> Any:
    """One token per letter or mark; white space is no token."""
    special = ["<pad>", "<unk>", *SPECIAL["llama"]]
    letters = [*string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex("."), behavior="isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        bos_token=SPECIAL["llama"][0],
        eos_token=SPECIAL["llama"][-1],
        additional_special_tokens=list(SPECIAL["llama"]),
    )
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def save_letter_model(folder: Path, *, seed: int = 0, **shape: Any) -> Path:
    """Writes a tiny random Llama that reads letters."""
    tokenizer = letter_tokenizer()
    config = text_config("llama", len(tokenizer), **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
