"""What a run was made with: versions, machine and seed, for ``environment.json``."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

_PACKAGES = (
    "fedml_plugin_fedmosaic",
    "fedml",
    "torch",
    "transformers",
    "peft",
    "numpy",
    "safetensors",
    "mpi4py",
    "pydantic",
)


def collect_environment(*, seed: int) -> dict[str, Any]:
    """Versions of what matters for the numbers, without host names or paths."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "packages": versions,
    }
