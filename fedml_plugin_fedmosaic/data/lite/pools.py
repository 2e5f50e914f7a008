"""Pools: labelled images of one source, read from zip files or from an installed package.

Which images a downloaded pool has, and what is known about each (label, category, ..), is an index
inside this package; the zip files hold nothing but the images.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import cast, get_args

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.quickstart.images import (
    AUDIENCES,
    ImageRef,
    PoolName,
    images_of,
    read_png,
)

Facts = Mapping[str, str]

PACKAGED: tuple[PoolName, ...] = ("mnist", "scans", "shapes")
"""Pools that come with packages which this one depends on."""

LEVELS = 3
"""Strengths of a distortion, 1 (weak) to 3 (strong)."""

_SIDE = 64


@dataclass(frozen=True, slots=True, order=True)
class Picture:
    """One image of a built data set: an image of a pool, as it is or changed.

    Attributes:
        pool: name of the pool.
        name: name inside the pool.
        change: empty, or ``<change>-<level>`` of :data:`CHANGES`.
    """

    pool: str
    name: str
    change: str = ""

    @property
    def filename(self) -> str:
        """Path below the folder of images; unique over all pools and changes."""
        stem, _, suffix = self.name.replace("/", "-").rpartition(".")
        if self.change:
            return f"{self.pool}/{stem}-{self.change.replace(' ', '-')}.png"
        return f"{self.pool}/{stem}.{suffix.lower()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Images with facts.

    Attributes:
        name: of the pool.
        facts: by image name, in the order of the names.
        read: the file's content by image name.
    """

    name: str
    facts: Mapping[str, Facts]
    read: Callable[[str], bytes]

    def digest(self) -> str:
        """A digest of all images with their names: equal digests mean the same pool."""
        total = hashlib.blake2b(digest_size=16)
        for name in self.facts:
            total.update(name.encode() + b"\0" + hashlib.blake2b(self.read(name)).digest())
        return total.hexdigest()

    def content(self, picture: Picture) -> bytes:
        """The bytes of the file that shows a picture; PNG if it was changed."""
        raw = self.read(picture.name)
        if not picture.change:
            return raw
        kind, _, level = picture.change.rpartition("-")
        with Image.open(io.BytesIO(raw)) as source:
            image = source.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        CHANGES[kind](image, int(level), picture.name).save(stream, "PNG")
        return stream.getvalue()


@cache
def pool_index(name: str) -> Mapping[str, Mapping[str, str]]:
    """What the package knows about a downloaded pool's images: facts by image name, sorted.

    Beside the facts, ``member`` is the image's path in its source and ``colour`` the mean colour
    (hexadecimal) by which a download is checked.

    Raises:
        DataError: no such pool.
    """
    resource = resources.files("fedml_plugin_fedmosaic") / "assets" / "lite" / "index.zip"
    with zipfile.ZipFile(io.BytesIO(resource.read_bytes())) as archive:
        known = sorted(member.removesuffix(".json") for member in archive.namelist())
        if name not in known:
            raise DataError(f"no pool {name!r}; known: {', '.join(known)}")
        entries: list[dict[str, str]] = json.loads(archive.read(f"{name}.json"))
    return {entry.pop("file"): entry for entry in sorted(entries, key=lambda item: item["file"])}


def open_archives(name: str, paths: Sequence[Path], prefix: str = "") -> Pool:
    """A pool whose images are in zip files, by the names of the index.

    Args:
        name: of the pool.
        paths: zip files; an image is taken from the first that has it.
        prefix: regular expression of what stands before the names in the files.

    Raises:
        DataError: a file is missing or damaged, or lacks an image.
    """
    index = pool_index(name)
    content: dict[str, bytes] = {}
    try:
        for path in paths:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    key = re.sub(f"^{prefix}", "", member)
                    if key in index and key not in content:
                        content[key] = archive.read(member)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"pool {name}: {paths[0]} cannot be read: {error}",
            hint="expected a zip of images; remove it, and it is fetched again",
        ) from error
    missing = [key for key in index if key not in content]
    if missing:
        raise DataError(
            f"pool {name}: expected {len(index)} images in {paths[0]}, {len(missing)} are missing: "
            f"{', '.join(missing[:3])}",
            hint="remove the file, and it is fetched again",
        )
    return Pool(name=name, facts=index, read=content.__getitem__)


def open_packaged(name: str, images_per_label: int) -> Pool:
    """A pool of an installed package.

    Args:
        name: one of :data:`PACKAGED`.
        images_per_label: how many images of each label to take, drawn once for all.
    """
    if name not in get_args(PoolName):
        raise DataError(f"no package holds the pool {name!r}; known: {', '.join(PACKAGED)}")
    pool = cast(PoolName, name)
    by_label: dict[str, list[ImageRef]] = {}
    for audience in AUDIENCES:
        for label, images in images_of(pool, audience).items():
            by_label.setdefault(label, []).extend(images)
    refs: dict[str, ImageRef] = {}
    for label, found in sorted(by_label.items()):
        found.sort()
        python_random(0, "lite pool", name, label).shuffle(found)
        for ref in found[:images_per_label]:
            stem = ref.name.removesuffix(".png").replace("/", "-")
            refs[f"{stem}.png"] = ref
    return Pool(
        name=name,
        facts={key: {"label": ref.label} for key, ref in sorted(refs.items())},
        read=lambda key: read_png(refs[key]),
    )


def _blur(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return image.filter(ImageFilter.GaussianBlur((1.2, 2.4, 4.4)[level - 1]))


def _dark(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return ImageEnhance.Brightness(image).enhance((0.65, 0.4, 0.2)[level - 1])


def _pale(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return ImageEnhance.Contrast(image).enhance((0.6, 0.35, 0.15)[level - 1])


def _noise(image: Image.Image, level: int, name: str) -> Image.Image:
    strength = (30, 60, 110)[level - 1]
    # Another photo and another strength have another grain; the same ones always the same.
    grain = python_random(0, "grain", name, level).randbytes(3 * image.width * image.height)
    layer = Image.frombytes("RGB", image.size, grain)
    return Image.blend(image, layer, strength / 255)


def _flip(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return ImageOps.flip(image)


def _gray(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return ImageOps.grayscale(image).convert("RGB")


def _negative(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return ImageOps.invert(image)


def _plain(image: Image.Image, level: int, name: str) -> Image.Image:  # noqa: ARG001
    return image


CHANGES: Mapping[str, Callable[[Image.Image, int, str], Image.Image]] = {
    "blur": _blur,
    "darkness": _dark,
    "paleness": _pale,
    "noise": _noise,
    "flip": _flip,
    "gray": _gray,
    "negative": _negative,
    "plain": _plain,
}
"""Changes of an image by name: ``(image, level, name of the image) -> image``."""
