"""Plain data with tensors as one safetensors file that can tell whether it is whole.

Nested string-keyed mappings and lists of tensors and JSON values: the tensors are the file's
tensors, everything else is JSON in its metadata, with a checksum over all of it. Equal tensors are
stored once. Files are written under a temporary name, flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import CheckpointError

FORMAT_VERSION = 2
SUFFIX = ".safetensors"
_TENSOR = "__tensor__"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What to tell a user whose disk is full, whose folder is read-only, and so on."""
    hint = "the last complete checkpoint is intact; resume the run once the folder can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "make room (the last complete checkpoint is intact), then resume the run"
    return CheckpointError(f"cannot write {path}: {error.strerror or error}", hint=hint)


def sync_folder(folder: Path) -> None:
    """Makes renamed files of a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, pieces: Iterable[Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_atomic(path: Path, payload: bytes) -> None:
    """Writes a file so that it is either complete or as before, also after a power cut.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    _write(path, (payload,))


def remove_leftovers(folder: Path) -> None:
    """Deletes half-written files of a killed process."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _Splitter:
    """Replaces tensors by references to the distinct ones."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.digests: dict[str, str] = {}
        self._names: dict[tuple[str, str, tuple[int, ...]], str] = {}

    def split(self, tree: Any, path: str = "") -> Any:
        if isinstance(tree, Tensor):
            return {_TENSOR: self._name(tree, path)}
        if isinstance(tree, Mapping):
            for key in tree:
                if not isinstance(key, str):
                    raise CheckpointError(
                        f"state at {path or 'its root'!r} has the key {key!r}; keys must be strings"
                    )
            return {key: self.split(value, f"{path}.{key}") for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.split(value, f"{path}.{index}") for index, value in enumerate(tree)]
        if tree is None or isinstance(tree, bool | int | float | str):
            return tree
        raise CheckpointError(
            f"state at {path or 'its root'!r} is a {type(tree).__name__}; "
            "only tensors, JSON values, lists and string-keyed mappings can be saved"
        )

    def _name(self, tensor: Tensor, path: str) -> str:
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"state at {path!r}: {tensor.dtype} cannot be saved")
        plain = tensor.detach().to("cpu").contiguous()
        digest = _tensor_digest(plain)
        key = (digest, str(plain.dtype), tuple(plain.shape))
        name = self._names.setdefault(key, path)
        if name == path:
            self.tensors[path] = plain
            self.digests[path] = digest
        return name


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.blake2b(_raw(tensor), digest_size=16).hexdigest()


def _checksum(text: str, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    described = [
        [name, str(tensors[name].dtype), list(tensors[name].shape), digests[name]]
        for name in sorted(tensors)
    ]
    payload = json.dumps([text, described]).encode()
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def save_tree(path: Path, tree: Any) -> str:
    """Writes plain data with tensors.

    Args:
        path: file to write or replace; ends in ``.safetensors``.
        tree: nested string-keyed mappings and lists of tensors and JSON values.

    Returns:
        BLAKE2b checksum of the content.

    Raises:
        CheckpointError: the tree holds something that is not plain data, or the file cannot be
            written (an older file of that name is intact then).
    """
    splitter = _Splitter()
    try:
        text = json.dumps(splitter.split(tree), allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise CheckpointError(f"{path.name}: the state holds a number that is not finite") from (
            error
        )
    checksum = _checksum(text, splitter.tensors, splitter.digests)
    header: dict[str, Any] = {
        "__metadata__": {"format": str(FORMAT_VERSION), "tree": text, "checksum": checksum}
    }
    # Wide types first, so that every tensor is aligned to its type.
    names = sorted(splitter.tensors, key=lambda name: -splitter.tensors[name].element_size())
    position = 0
    for name in names:
        tensor = splitter.tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    lead = len(encoded).to_bytes(8, "little") + encoded
    _write(path, (lead, *(_raw(splitter.tensors[name]) for name in names)))
    return checksum


def load_tree(path: Path, checksum: str | None = None) -> Any:
    """Reads what :func:`save_tree` wrote; no two tensors of the result share memory.

    Args:
        path: the file.
        checksum: what another file says of its content; not compared when omitted.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer format, or another one than
            ``checksum`` says.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
        version, text, noted = (metadata[key] for key in ("format", "tree", "checksum"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged or missing: {error}",
            hint="resume from an older round of the same run folder",
        ) from error
    check_format(path, version)
    found = _checksum(text, tensors, {name: _tensor_digest(t) for name, t in tensors.items()})
    for expected in (noted, checksum):
        if expected is not None and found != expected:
            raise CheckpointError(
                f"{path} is damaged: checksum {found}, expected {expected}",
                hint="resume from an older round of the same run folder",
            )
    return _Joiner(tensors).join(json.loads(text))


class _Joiner:
    """Puts tensors back; a second reference to a tensor becomes a copy."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._used: set[str] = set()

    def join(self, tree: Any) -> Any:
        if isinstance(tree, dict):
            if set(tree) == {_TENSOR}:
                name = tree[_TENSOR]
                tensor = self._tensors[name]
                if name in self._used:
                    return tensor.clone()
                self._used.add(name)
                return tensor
            return {key: self.join(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.join(value) for value in tree]
        return tree


def check_format(path: Path, found: object) -> None:
    """Refuses files of another format.

    Raises:
        CheckpointError: the file was not written by this version's format.
    """
    if str(found) == str(FORMAT_VERSION):
        return
    newer = str(found).isdigit() and int(str(found)) > FORMAT_VERSION
    raise CheckpointError(
        f"{path} has checkpoint format {found}, this version reads format {FORMAT_VERSION}",
        hint="install the newer version of this package that wrote it"
        if newer
        else "resume with the version that wrote it; environment.json names it",
    )
