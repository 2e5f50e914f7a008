"""What single tokens say, in one alphabet for all tokenizers: their UTF-8 bytes.

Byte-level BPE writes each byte as some printable character, SentencePiece writes characters, a mark
for a space and ``<0x0A>`` for a byte outside its vocabulary. Compared as they are written, such
tokens agree on plain English words only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_BYTE_SPACE = "\u0120"
_SENTENCE_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, in Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return letters


class TokenTexts:
    """Token ids to texts that can be compared across tokenizers.

    Args:
        tokenizer: Hugging Face tokenizer; whether it is byte-level is read from its vocabulary.
        spaces: whether texts keep their spaces, however the tokenizer writes them.
    """

    def __init__(self, tokenizer: Any, *, spaces: bool = False) -> None:
        self._tokenizer = tokenizer
        self._blank = " " if spaces else ""
        vocabulary = tokenizer.get_vocab()
        self._byte_level = any(token.startswith(_BYTE_SPACE) for token in vocabulary)
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One text per token: each character stands for one byte (Latin-1).

        Without ``spaces``, tokens that hold nothing but spaces have an empty text.
        """
        missing = [token for token in dict.fromkeys(ids) if token not in self._known]
        if missing:
            written = self._tokenizer.convert_ids_to_tokens(missing)
            self._known.update(zip(missing, map(self._text, written), strict=True))
        return [self._known[token] for token in ids]

    def _text(self, token: str | None) -> str:
        if token is None:
            return ""
        if self._byte_level:
            letters = _bytes_of_letters()
            if all(letter in letters for letter in token):
                content = bytes(letters[letter] for letter in token)
                return content.decode("latin-1").replace(" ", self._blank)
        elif byte := _BYTE.fullmatch(token):
            return chr(int(byte.group(1), 16)).replace(" ", self._blank)
        text = token.replace(_SENTENCE_SPACE, " ")
        return text.encode("utf-8", "surrogatepass").decode("latin-1").replace(" ", self._blank)
