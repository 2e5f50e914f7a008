"""A tiny experiment and its uninterrupted run, once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from lives import SETTINGS
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.runtime.federation import prepare_run


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often a run is killed (``--kills``)."""
    return int(request.config.getoption("--kills"))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("resume-world"))


@pytest.fixture(scope="session")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same experiment without interruption, in this process."""
    run_dir = tmp_path_factory.mktemp("resume-reference") / "run"
    prepare_run(load_experiment(config, SETTINGS), run_dir).execute()
    return run_dir
