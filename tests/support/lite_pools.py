"""Pools of DRAKE-lite with the real names and facts, and tiny made-up images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping

from PIL import Image

from fedml_plugin_fedmosaic.data.lite.pools import Pool, pool_index
from fedml_plugin_fedmosaic.data.lite.views import Library

DOWNLOADED = (
    "cifar10", "clipart", "fashion", "flags", "geirhos", "hands", "noto", "omniglot", "twemoji",
)  # fmt: skip
FORMS = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def png(seed: str, size: int = 6) -> bytes:
    """An image that looks like no other seed's."""
    pixels = hashlib.shake_256(seed.encode()).digest(3 * size * size)
    stream = io.BytesIO()
    Image.frombytes("RGB", (size, size), pixels).save(stream, "PNG")
    return stream.getvalue()


def made_pool(name: str, facts: Mapping[str, Mapping[str, str]]) -> Pool:
    return Pool(name=name, facts=facts, read=lambda key: png(f"{name}/{key}"))


def labelled(labels: tuple[str, ...], count: int) -> dict[str, dict[str, str]]:
    """So many images of every label."""
    return {
        f"{label.replace(' ', '-')}-{number:03d}.png": {"label": label}
        for label in labels
        for number in range(count)
    }


def made_library() -> Library:
    """All pools of both variants."""
    pools = {name: made_pool(name, pool_index(name)) for name in DOWNLOADED}
    digits = tuple(str(number) for number in range(10))
    for name in ("mnist", "scans"):
        pools[name] = made_pool(name, labelled(digits, 40))
    shapes = tuple(f"{colour} {form}" for colour in COLOURS for form in FORMS)
    pools["shapes"] = made_pool("shapes", labelled(shapes, 24))
    return Library(pools)
