"""In which folder the data of a configuration are, and whose they are, without reading samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.data.drake import open_scenario
from fedml_plugin_fedmosaic.data.lite import located
from fedml_plugin_fedmosaic.data.quickstart.build import SCENARIO, ensure_built
from fedml_plugin_fedmosaic.data.scenario import ScenarioClient


def folder_and_clients(config: DataConfig) -> tuple[Path, tuple[ScenarioClient, ...]]:
    """The data root and the scenario's clients of any data set in the published layout.

    Raises:
        DataError: the root or the scenario is missing or wrong.
    """
    if config.source == "drake-lite":
        config = located(config)
    elif config.source == "quickstart":
        root = ensure_built(None if config.root is None else Path(config.root).expanduser())
        config = replace(config, root=str(root), scenario=config.scenario or SCENARIO)
    return open_scenario(config)
