"""Tokens of different alphabets say the same thing in bytes."""

from __future__ import annotations

import pytest
from letter_model import letter_tokenizer
from tiny_models import build_tokenizer
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from fedml_plugin_fedmosaic.engine.token_text import TokenTexts

TEXT = "Grüße, 世界\nline  two 🙂 naïve"


def in_bytes(text):
    return text.replace(" ", "").encode().decode("latin-1")


def byte_level():
    """Byte-level BPE without merges: one token per byte."""
    letters = sorted(ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


class Sentence:
    """Writes tokens as SentencePiece does."""

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: index for index, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[index] for index in ids]


def test_byte_level_tokens_are_bytes():
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)(tokenizer.encode(TEXT))
    assert "".join(texts) == in_bytes(TEXT)
    assert all(len(text) <= 1 for text in texts)


def test_sentencepiece_tokens_are_bytes():
    tokens = ["\u2581Gr", "üße", ",", "\u2581\u2581", "<0xE4>", "<0xB8>", "<0x96>", "<0x0A>", "界"]
    texts = TokenTexts(Sentence(tokens))(range(len(tokens)))
    assert "".join(texts) == in_bytes("Grüße,世\n界")
    assert texts[3] == ""


@pytest.mark.parametrize("tokenizer", [letter_tokenizer(), build_tokenizer("llama")])
def test_plain_tokens_stay_as_they_are(tokenizer):
    ids = tokenizer.encode("which bird ?", add_special_tokens=False)
    assert "".join(TokenTexts(tokenizer)(ids)) == "whichbird?"


def test_special_tokens_of_a_byte_level_vocabulary_are_texts():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "<|end of it|>"})
    assert TokenTexts(tokenizer)([tokenizer.eos_token_id]) == ["<|endofit|>"]
