"""Which weights a folder holds, told in milliseconds and without loading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.places import model_folder

_NAMES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_WHOLE = 1 << 24
"""Files up to this many bytes are read whole."""
_PIECES, _PIECE = 64, 1 << 14


def model_fingerprint(name: str, spec: ModelSpec) -> str:
    """Names the content of a model: configuration, tokenizer and weights.

    Of a large file, its size and 64 pieces of 16 KiB over its whole length are read; another
    checkpoint of the same shape differs in all of them. File names and other files do not count.

    Args:
        name: the model's name in the configuration.
        spec: of the model.

    Raises:
        ConfigError: there is no such model, or a file cannot be read.
    """
    folder = Path(model_folder(name, spec))
    files = [folder / name for name in _NAMES if (folder / name).is_file()]
    files += sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith("align")
    )
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in files:
            digest.update(_content(path))
    except OSError as error:
        raise ConfigError(
            f"model {name!r}: {path.name} cannot be read: {error.strerror}"
        ) from error
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for piece in range(_PIECES):
                file.seek(piece * (size - _PIECE) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.digest()
