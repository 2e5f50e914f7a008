"""Public samples: texts and images that no client owns, for the alignment of models.

In the published layout they lie beside the clients' splits, as
``dataset/<name>/public/dataset-<subset>.json``; rows that base models were pretrained with
(``pretrain``) will do as well, and so will any JSON file of samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.drake import read_file

SPLITS = ("public", "pretrain")
"""Folders of samples that no client owns; the first that there is."""
_PART = 1 << 16


def public_split(root: Path) -> tuple[Sample, ...]:
    """All public samples below a data root, in the order of the files' names; perhaps none.

    Args:
        root: folder that holds ``dataset/``.

    Raises:
        DataError: a sample is wrong.
    """
    return next((found for split in SPLITS if (found := _all_of(root, split))), ())


def samples_at(path: Path) -> tuple[Sample, ...]:
    """The samples of a file or folder.

    Args:
        path: a JSON list of samples, whose images are named relative to the data root if it lies
            in one and else to its own folder; or a data root, which gives its public split, or if
            it has none all its training files.

    Raises:
        DataError: nothing is there, or a sample is wrong.
    """
    if path.is_dir():
        found = public_split(path) or _all_of(path, "train")
        if not found:
            raise DataError(
                f"public data {str(path)!r}: expected files "
                "dataset/<name>/{public,train}/dataset-<subset>.json inside, got none",
                hint="give the folder above dataset/, or a JSON file of samples",
            )
        return found
    if not path.is_file():
        raise DataError(
            f"public data {str(path)!r}: expected a JSON file or a data root, got nothing there"
        )
    inside = len(path.parents) > 3 and path.parents[2].name == "dataset"
    return read_file(path, path.parents[3] if inside else path.parent, path.stem)


def _all_of(root: Path, split: str) -> tuple[Sample, ...]:
    files = sorted(root.glob(f"dataset/*/{split}/dataset-*.json"))
    return tuple(
        sample
        for path in files
        for sample in read_file(
            path, root, f"{path.parts[-3]}-{path.stem.removeprefix('dataset-')}"
        )
    )


def samples_digest(samples: Iterable[Sample]) -> str:
    """Names the content of samples: their texts in order, and their images by size and beginning.

    Raises:
        DataError: an image is missing.
    """
    digest = hashlib.blake2b(digest_size=16)
    images: dict[Path, bytes] = {}
    for sample in samples:
        for text in sample.turns:
            digest.update(f"{len(text)}:{text}".encode())
        for path in sample.images:
            if path not in images:
                images[path] = _image_mark(path)
            digest.update(images[path])
        digest.update(b"\0")
    return digest.hexdigest()


def _image_mark(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            beginning = file.read(_PART)
        return hashlib.blake2b(
            path.stat().st_size.to_bytes(8, "little") + beginning, digest_size=16
        ).digest()
    except OSError as error:
        raise DataError(
            f"image {path}: cannot be read: {error.strerror}", hint="check the data folder"
        ) from error
