"""Base models of the Hugging Face hub: in the cache or not, and fetched on request.

A run never downloads. ``fedmosaic models fetch`` does, on a machine with internet; a run looks into
the cache and names what is missing before it loads anything. The cache has the hub's own layout
(``models--OWNER--NAME/{refs,snapshots}``), so other tools see the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.paths import hub_cache
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.hub import CHECKSUM, reached, require_checksum

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What a run may need of a model's repository."""
IGNORED = ("*/*", "consolidated*", "*.onnx.json")
"""Sub-folders and second copies of the weights in other formats."""
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_BUNDLED_TOWER = "cached_tower"
_FETCH = "run 'fedmosaic models fetch {}' on a machine with internet (a cluster's login node)"


def is_hub_id(path: str) -> bool:
    """Whether a model's path means a repository of the hub: ``owner/name``, and no such folder."""
    plain = not path.startswith((".", "~", "/")) and ":" not in path and path.count("/") == 1
    return plain and not Path(path).is_dir()


def snapshot(hub_id: str, cache: Path | None = None) -> Path | None:
    """The cached files of a model's main revision; None if there are none.

    Args:
        hub_id: ``owner/name``.
        cache: the hub's cache; the usual one when None.
    """
    folder = (cache or hub_cache()) / ("models--" + hub_id.replace("/", "--"))
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        # A copied cache may lack the name of its only revision.
        found = [path for path in folder.glob("snapshots/*") if path.is_dir()]
        return found[0] if len(found) == 1 else None
    path = folder / "snapshots" / revision
    return path if path.is_dir() else None


def missing_files(folder: Path) -> list[str]:
    """Names of what a model's folder lacks; empty if it can be loaded.

    Raises:
        ConfigError: its ``config.json`` or weight index is not JSON.
    """
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if (folder / _INDEX).is_file():
        shards = sorted(set(_json(folder / _INDEX).get("weight_map", {}).values()))
        missing += [name for name in shards if not (folder / name).is_file()]
    elif not (folder / _WEIGHTS).is_file():
        missing.append(_WEIGHTS)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        missing.append("tokenizer.json")
    vision = None
    if (folder / "config.json").is_file():
        vision = _json(folder / "config.json").get("vision_config")
    is_pixels = vision is not None and vision.get("model_type") != _BUNDLED_TOWER
    if is_pixels and not any((folder / name).is_file() for name in _PROCESSORS):
        missing.append(_PROCESSORS[0])
    return missing


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", hint="fetch the model again") from error
    return content


def missing_models(models: Mapping[str, ModelSpec]) -> list[str]:
    """One line for each hub model that is not (wholly) in the cache; folders are not looked at."""
    lines = []
    for hub_id in dict.fromkeys(spec.path for spec in models.values() if is_hub_id(spec.path)):
        folder = snapshot(hub_id)
        if folder is None:
            lines.append(f"model {hub_id}: not in the cache {hub_cache()}")
        elif files := missing_files(folder):
            shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if files[3:] else "")
            lines.append(f"model {hub_id}: {shown} missing in {folder}")
    return lines


def require_models(models: Mapping[str, ModelSpec]) -> None:
    """Checks that every hub model is in the cache, before any of them is loaded.

    Raises:
        ConfigError: some are not; all are named.
    """
    missing = missing_models(models)
    if missing:
        ids = " ".join(line.split(":", 1)[0].removeprefix("model ") for line in missing)
        raise ConfigError(
            "\n".join(missing),
            hint="nothing is loaded from the internet in a run: " + _FETCH.format(ids),
        )


def cached_folder(name: str, hub_id: str) -> Path:
    """The cached files of one model.

    Raises:
        ConfigError: it is not in the cache.
    """
    folder = snapshot(hub_id)
    if folder is None:
        raise ConfigError(
            f"model {name!r}: {hub_id} is not in the cache {hub_cache()}",
            hint=f"nothing is downloaded in a run: {_FETCH.format(hub_id)}",
        )
    return folder


def fetch_model(hub_id: str) -> Path:
    """Downloads a model's main revision into the cache; what is there already is kept.

    Args:
        hub_id: ``owner/name``.

    Returns:
        The folder of the snapshot.

    Raises:
        DataError: the hub cannot be reached, has no such model or does not give it to you, the
            repository lacks files that a run needs, or weights differ from their checksums.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        reached(
            f"model {hub_id}",
            lambda: snapshot_download(
                hub_id,
                cache_dir=hub_cache(),
                allow_patterns=list(PATTERNS),
                ignore_patterns=list(IGNORED),
            ),
        )
    )
    missing = missing_files(folder)
    if missing:
        raise DataError(
            f"model {hub_id}: its repository lacks {', '.join(missing)}",
            hint="only models with safetensors weights and a tokenizer can be trained",
        )
    _check_weights(hub_id, folder)
    return folder


def _check_weights(hub_id: str, folder: Path) -> None:
    """Compares weights with their checksums, which are their names in the cache.

    The cache keeps a file under the hub's checksum of it and a link in the snapshot.

    Raises:
        DataError: a file differs; it is removed, so that the next command fetches it again.
    """
    for path in sorted(folder.glob("*.safetensors")):
        blob = path.resolve()
        if blob == path or not CHECKSUM.fullmatch(blob.name):
            continue  # a copied cache without links
        try:
            require_checksum(blob, blob.name, f"{path.name} of model {hub_id}")
        except DataError:
            path.unlink()
            raise
