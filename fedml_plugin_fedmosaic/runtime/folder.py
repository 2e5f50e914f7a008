"""Which folder a run takes."""

from __future__ import annotations

from pathlib import Path

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.base import LAUNCH_FILES


def claim_run_dir(experiment: Experiment, run_dir: Path | None) -> Path:
    """The folder of a new run; nothing is made.

    Args:
        experiment: names the folder if ``run_dir`` does not.
        run_dir: must not exist, or hold nothing but what a launcher puts there before the run
            starts. The next free one under ``run.root`` when omitted.

    Raises:
        ConfigError: the folder has something in it.
    """
    if run_dir is None and experiment.run.name is not None:
        run_dir = Path(experiment.run.root) / experiment.run.name
    if run_dir is not None:
        if run_dir.exists() and not _is_free(run_dir):
            raise ConfigError(
                f"the run folder {run_dir} exists and is not an empty folder",
                hint="choose another --run-dir; results are never overwritten",
            )
        return run_dir
    root = Path(experiment.run.root)
    stem = f"{experiment.algo}-{experiment.data.source}"
    number = 1
    while (root / f"{stem}-{number:03d}").exists():
        number += 1
    return root / f"{stem}-{number:03d}"


def _is_free(folder: Path) -> bool:
    return folder.is_dir() and all(path.name in LAUNCH_FILES for path in folder.iterdir())
