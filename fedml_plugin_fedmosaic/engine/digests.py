"""Short names of what must be equal between clients: layouts of tensors, and vocabularies."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedml_plugin_fedmosaic.core.types import CHANNEL_CONV, AdapterState, Branch, channel_of


def layout_digests(adapter: AdapterState, signature: str) -> dict[str, str]:
    """Channel -> digest of share keys and shapes of the local branch.

    Args:
        adapter: all tensors of a model's adapter.
        signature: of the model; layer-wise (``conv``) tensors only mean something inside it.
    """
    shapes: dict[str, list[tuple[str, list[int]]]] = {}
    for key, tensor in sorted(adapter.items()):
        if key.branch is Branch.LOCAL:
            entry = (key.share_key, list(tensor.shape))
            shapes.setdefault(channel_of(key.share_key), []).append(entry)
    digests = {}
    for channel, entries in shapes.items():
        scope = signature if channel == CHANNEL_CONV else ""
        text = json.dumps([scope, entries])
        digests[channel] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return digests


def vocabulary_digest(tokenizer: Any, width: int | None = None) -> str:
    """Digest of a tokenizer's tokens with their ids.

    Args:
        tokenizer: Hugging Face tokenizer.
        width: of the model's logits; part of the digest where it is not the number of tokens,
            because models of one family are padded to different widths.
    """
    words = sorted(tokenizer.get_vocab().items())
    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()
    return digest if width in (None, len(words)) else f"{digest}-{width}"
