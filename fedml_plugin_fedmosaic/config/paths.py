"""Where this package may write outside a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """Folder of everything that can be rebuilt: image features and the unpacked quickstart.

    The environment variable ``FEDMOSAIC_CACHE`` names it; otherwise it is the platform's user
    cache folder. It need not exist yet.
    """
    override = os.environ.get("FEDMOSAIC_CACHE")
    return Path(override).expanduser() if override else user_cache_path("fedmosaic")


def hub_cache() -> Path:
    """Folder of models from the Hugging Face hub, in the hub's own layout.

    ``HF_HUB_CACHE``, else ``HF_HOME/hub``, as for every tool of the hub; else, when
    ``FEDMOSAIC_CACHE`` is set, ``huggingface/hub`` inside it; else the hub's default.
    """
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    if own := os.environ.get("FEDMOSAIC_CACHE"):
        return Path(own).expanduser() / "huggingface" / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"
