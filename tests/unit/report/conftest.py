from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

_SUPPORT = Path(__file__).parents[2] / "support" / "synthetic_run.py"


def _load_support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_run", _SUPPORT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return _load_support().make_run


@pytest.fixture(scope="session")
def finished_run(make_run, tmp_path_factory) -> Path:
    """A run folder that tests only read."""
    return make_run(tmp_path_factory.mktemp("runs") / "finished")
