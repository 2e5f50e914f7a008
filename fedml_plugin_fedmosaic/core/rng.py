"""Seed streams: one root seed, one independent stream per purpose.

The same purpose (for example ``("fit", client, round)``) always gives the same numbers, whatever
else ran before and on whichever rank; nothing touches the global generators of torch or numpy.
"""

from __future__ import annotations

import hashlib
import random

import torch


def derive_seed(root: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose.

    Args:
        root: the experiment's seed.
        path: words and numbers that name the purpose, e.g. ``("fit", client_id, round_idx)``.

    Returns:
        An integer in [0, 2**63).
    """
    text = "/".join([str(int(root)), *(f"{type(part).__name__}:{part}" for part in path)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(root: int, *path: str | int) -> torch.Generator:
    """A CPU torch generator seeded for one purpose (see :func:`derive_seed`)."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(derive_seed(root, *path))
    return generator


def python_random(root: int, *path: str | int) -> random.Random:
    """A Python generator seeded for one purpose (see :func:`derive_seed`)."""
    return random.Random(derive_seed(root, *path))  # noqa: S311 - simulation, not cryptography
