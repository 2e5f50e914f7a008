"""Which experiments a file means: its own, or all runs of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.config.yamlfile import read_document
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepSpec, make_plan, read_sweep_file


def experiments_of(files: Sequence[Path | None], overrides: Sequence[str]) -> list[Experiment]:
    """The experiments of configurations and sweep files.

    Args:
        files: YAML files; the bundled quickstart for None.
        overrides: ``--set`` texts for all of them.

    Raises:
        ConfigError: a file, or an option, is wrong.
    """
    found: list[Experiment] = []
    for path in files:
        if path is None or "grid" not in read_document(path).data:
            found.append(load_experiment(path, overrides))
            continue
        spec: SweepSpec = read_sweep_file(path)
        plan = make_plan(spec)
        found += plan.experiments.values() or [plan.base]
    return found
