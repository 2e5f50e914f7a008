"""Where a base model is: its folder, a bundled one, the hub's cache, or one made from those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.gguf import converted_folder, is_gguf
from fedml_plugin_fedmosaic.engine.hub import cached_folder
from fedml_plugin_fedmosaic.engine.memory import ran_out_of_memory

BUNDLED = "bundled:"
CACHED = "cached:"
"""Models that a command of this package made: ``cached:<set>/<name>``."""


def model_folder(name: str, spec: ModelSpec) -> str:
    """The folder that a model is loaded from.

    A GGUF file is unpacked, and a depth cut (``spec.layers``) is made, on first use.

    Args:
        name: the model's name in the configuration.
        spec: of the model.

    Raises:
        ConfigError: there is no such model, or it cannot be converted or cut.
    """
    source = resolve(name, spec.path)
    if spec.layers is None:
        return source
    from fedml_plugin_fedmosaic.engine.depth import cut_folder

    return str(cut_folder(name, Path(source), spec.layers))


def resolve(name: str, path: str) -> str:
    """The folder that a path means: its own, a bundled or made one, the hub's, or a GGUF's.

    Raises:
        ConfigError: there is no such model, or it is not in the cache.
    """
    if is_gguf(path):
        return str(converted_folder(name, path))
    if path.startswith(BUNDLED):
        root = resources.files("fedml_plugin_fedmosaic") / "assets" / "models"
        folder = Path(str(root)) / path.removeprefix(BUNDLED)
        if not (folder / "config.json").is_file():
            known = sorted(item.parent.name for item in Path(str(root)).glob("*/config.json"))
            raise ConfigError(
                f"model {name!r}: there is no bundled model {path.removeprefix(BUNDLED)!r}",
                hint=f"bundled models: {', '.join(known) or 'none'}",
            )
        return str(folder)
    if path.startswith(CACHED):
        folder = cache_dir() / "models" / path.removeprefix(CACHED)
        if not (folder / "config.json").is_file():
            made_by = path.removeprefix(CACHED).partition("/")[0]
            raise ConfigError(
                f"model {name!r}: expected it in {folder}, got nothing",
                hint=f"make it by 'fedmosaic models build-{made_by}', or set FEDMOSAIC_CACHE to "
                "the cache that holds it",
            )
        return str(folder)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model {name!r}: expected a file config.json in folder {path!r}, got none",
                hint="give the folder that a model was saved to with save_pretrained",
            )
        return str(folder)
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"model {name!r}: expected a model folder at {path!r}, got "
            + ("a file" if folder.exists() else "nothing"),
            hint="give an existing folder, a *.gguf file, pip:PACKAGE, bundled:<name>, or a hub id "
            "such as owner/model",
        )
    return str(cached_folder(name, path))


@contextmanager
def errors_named(name: str, path: str) -> Iterator[None]:
    """Turns the library's errors while a model is read into :class:`ConfigError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if ran_out_of_memory(error):  # the files are in order
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {name!r} cannot be loaded from {path!r}: {reason}",
            hint="nothing is downloaded in a run: give a folder with config.json, *.safetensors "
            "and the tokenizer's files, or fetch a hub id once with 'fedmosaic models fetch ID'",
        ) from error
