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
