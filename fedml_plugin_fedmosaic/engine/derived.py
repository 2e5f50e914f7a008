"""Model folders made from other files: converted GGUF files and depth cuts, kept in the cache.

A folder is a pure function of what it is made from; its name says so. It is written under a
temporary name and renamed, and a second process waits for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as hf_logging

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.core.errors import ConfigError

MANIFEST = "made_from.json"


def derived_folder(
    stem: str, made_from: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> Path:
    """A model folder in the cache, built when it is not there yet.

    Args:
        stem: readable start of the folder's name.
        made_from: JSON values that decide the content.
        build: fills an empty folder; what it returns is kept in the manifest.

    Returns:
        The folder, complete.

    Raises:
        ConfigError: the cache cannot be written.
    """
    text = json.dumps(made_from, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
    root = cache_dir() / "models"
    folder = root / f"{stem}-{digest}"
    if (folder / MANIFEST).is_file():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / MANIFEST).is_file():
                _build(root, folder, made_from, build)
    except OSError as error:
        raise ConfigError(
            f"the model folder {folder} cannot be written: {error}",
            hint="FEDMOSAIC_CACHE names a folder with room for it",
        ) from error
    return folder


def _build(
    root: Path,
    folder: Path,
    made_from: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
) -> None:
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=root))
    try:
        manifest = {**made_from, **build(part)}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        part.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def made_from(folder: Path) -> dict[str, Any]:
    """What a derived folder was made from; empty for any other folder."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Transformers draws bars while loading weights; the screen belongs to the command line."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
