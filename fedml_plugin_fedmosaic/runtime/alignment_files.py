"""Alignment files: aligned A and B of one model, and a manifest that says what they are for.

``<folder>/<model>.safetensors`` holds ``<block>/<module>/A`` (r, d_in) and ``/B`` (d_out, r) in
float32; ``<folder>/<model>.json`` is the manifest. A slash in a model's name becomes ``--``. The
same pair lies in the user's cache under a name that says everything it was made from, so that it
is made once only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.runtime.alignment_quality import PairQuality

FORMAT = 1
"""Of files and manifests; also counts changes of the method, so that old caches are not used."""
METHOD = "matched A, canonical B (arXiv 2506.11024)"
_STRICT = ConfigDict(extra="forbid")

Alignment = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelIdentity:
    """Which model.

    Attributes:
        name: in the configuration it was made with; another configuration may call it otherwise.
        family: model type.
        size: label.
        signature: shape class.
        num_layers: decoder layers.
        num_parameters: of the whole model.
        weights: fingerprint of its files.
        dtype: in which it was observed.
    """

    name: str
    family: str
    size: str
    signature: str
    num_layers: int
    num_parameters: int
    weights: str
    dtype: str


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AlignmentManifest:
    """What an alignment file was made for, from and with.

    Attributes:
        format: see ``FORMAT``.
        key: name of everything that the tensors follow from.
        method: in words.
        model: whose A and B these are.
        anchor: whose coordinates they have.
        rank: r.
        num_blocks: N_B.
        target_modules: aligned linears of a block-end layer, ascending.
        data: where the public samples came from, how many, and the name of their content.
        options: how the alignment was made, with its seed.
        versions: of the packages that matter.
        made: date and time (UTC).
        duration_s: wall-clock seconds.
        sha256: of the tensors' file.
        quality: None for the anchor itself.
    """

    format: int
    key: str
    method: str
    model: ModelIdentity
    anchor: ModelIdentity
    rank: int
    num_blocks: int
    target_modules: tuple[str, ...]
    data: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str | None]
    made: str
    duration_s: float
    sha256: str
    quality: PairQuality | None = None

    @property
    def is_anchor(self) -> bool:
        """Whether the model is its own anchor."""
        return self.quality is None

    @property
    def coordinates(self) -> tuple[object, ...]:
        """Equal for files whose coordinates mean the same."""
        places = (self.rank, self.num_blocks, self.target_modules)
        return (self.anchor.weights, self.options.get("seed"), *places)


_MANIFEST = TypeAdapter(AlignmentManifest)


def alignment_key(**content: Any) -> str:
    """Name of everything that a file follows from; equal content, equal name."""
    text = json.dumps([FORMAT, METHOD, content], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tensors_path(folder: Path, model: str) -> Path:
    """Where the tensors of a model are."""
    return folder / f"{model.replace('/', '--')}.safetensors"


def manifest_path(folder: Path, model: str) -> Path:
    """Where the manifest of a model is."""
    return folder / f"{model.replace('/', '--')}.json"


def write_alignment(
    folder: Path, model: str, factors: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> AlignmentManifest:
    """Writes tensors, then the manifest, each in one step.

    Args:
        folder: made if it is not there.
        model: name of the model.
        factors: see the module.
        manifest: fields of :class:`AlignmentManifest` without ``sha256``.

    Raises:
        AdapterError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".align-") as scratch:
            tensors = Path(scratch, "tensors")
            save_file({key: value.contiguous() for key, value in factors.items()}, tensors)
            record = AlignmentManifest(**manifest, sha256=_sha256(tensors))
            text = Path(scratch, "manifest")
            text.write_text(_dumped(record), encoding="utf-8")
            _readable(tensors).replace(tensors_path(folder, model))
            _readable(text).replace(manifest_path(folder, model))
    except OSError as error:
        raise AdapterError(
            f"alignment files cannot be written to {folder}: {error.strerror}",
            hint="choose another folder with --out",
        ) from error
    return record


def _dumped(record: AlignmentManifest) -> str:
    return json.dumps(asdict(record), indent=1) + "\n"


def _readable(path: Path) -> Path:
    path.chmod(0o666 & ~_umask())
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, model: str) -> AlignmentManifest | None:
    """The manifest of a model; None if there is none.

    Raises:
        AdapterError: it is damaged, or of another version.
    """
    path = manifest_path(folder, model)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        if (found := json.loads(text).get("format")) != FORMAT:
            raise AdapterError(
                f"{path}: expected an alignment manifest of format {FORMAT}, got {found!r}",
                hint="make the files again with 'fedmosaic align'",
            )
        return _MANIFEST.validate_json(text)
    except (ValueError, AttributeError, ValidationError) as error:
        raise AdapterError(
            f"{path}: this is no alignment manifest: {str(error).splitlines()[0]}",
            hint="make the files again with 'fedmosaic align'",
        ) from error


def read_tensors(path: Path, sha256: str | None = None) -> Alignment:
    """Aligned A and B of one model.

    Args:
        path: of the tensors.
        sha256: what the manifest says; None: not checked.

    Raises:
        AdapterError: the file is missing, damaged, or not the manifest's.
    """
    try:
        if sha256 is not None and _sha256(path) != sha256:
            raise AdapterError(
                f"{path}: its content is not what its manifest was written for",
                hint="copy both files again, or make them again with 'fedmosaic align'",
            )
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"cannot read the alignment file {path}: {error}",
            hint="run 'fedmosaic align --cf FILE' first, or leave adapter.alignment out",
        ) from error


def recall(folder: Path, model: str, key: str) -> AlignmentManifest | None:
    """The manifest of files that need not be made again: in the folder, or from the user's cache.

    Args:
        folder: where they are wanted; files from the cache are copied to it.
        model: name of the model.
        key: of what is wanted.
    """
    for place, name in ((folder, model), (_cached(key), "aligned")):
        try:
            found = read_manifest(place, name)
            if found is None or found.key != key:
                continue
            read_tensors(tensors_path(place, name), found.sha256)
        except AdapterError:
            continue  # damaged: it is made again
        if place != folder:
            factors = read_tensors(tensors_path(place, name))
            fields = {field: getattr(found, field) for field in found.__dataclass_fields__}
            del fields["sha256"]
            return write_alignment(folder, model, factors, fields)
        return found
    return None


def remember(folder: Path, model: str, key: str) -> None:
    """Copies a model's files into the user's cache; a cache that cannot be written is let be."""
    place = _cached(key)
    try:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tensors_path(folder, model), tensors_path(place, "aligned"))
        shutil.copyfile(manifest_path(folder, model), manifest_path(place, "aligned"))
    except OSError:
        shutil.rmtree(place, ignore_errors=True)


def _cached(key: str) -> Path:
    return cache_dir() / "alignments" / key
