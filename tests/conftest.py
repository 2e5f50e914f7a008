"""Rules of the whole test run: no foreign connections, and no silent gaps."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import pytest

import fedml_plugin_fedmosaic

# The same examples everywhere; "pytest --hypothesis-profile=search" looks for new ones.
_SLOW_MACHINE = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, **_SLOW_MACHINE)
hypothesis.settings.register_profile("search", max_examples=1000, **_SLOW_MACHINE)
hypothesis.settings.load_profile("fixed")

LOCAL_HOSTS = "127.0.0.1,::1,localhost"
ASKED_FOR = {
    "gpu": "needs an accelerator",
    "slow": "takes more than about 20 s",
    "network": "opens connections beyond this machine",
    "deepspeed": "needs the deepspeed extra",
    "slurm": "needs a Slurm cluster",
}
"""Marker -> why its tests are not part of the default run."""

_left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        type=int,
        default=3,
        help="how often tests/resume kills each of its runs at a random moment",
    )


def pytest_report_header() -> str:
    package = Path(fedml_plugin_fedmosaic.__file__).parent
    return f"fedml_plugin_fedmosaic {fedml_plugin_fedmosaic.__version__} from {package}"


def _missing(item: pytest.Item) -> str | None:
    """Why an item that was selected cannot run on this machine."""
    if item.get_closest_marker("mpi") and shutil.which("mpiexec") is None:
        return "no mpiexec on PATH"
    if item.get_closest_marker("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed (pip install '.[deepspeed]')"
    if item.get_closest_marker("slurm") and shutil.which("sbatch") is None:
        return "no sbatch on PATH"
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "torch sees no accelerator"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.enable_socket)
        else:
            item.add_marker(pytest.mark.allow_hosts(LOCAL_HOSTS.split(",")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(item)
    if reason is not None:
        pytest.skip(reason)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        for marker in ASKED_FOR:
            if item.get_closest_marker(marker):
                _left_out[marker] += 1
                break


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _left_out:
        return
    terminalreporter.section("groups that were not run")
    for marker, count in sorted(_left_out.items()):
        terminalreporter.write_line(
            f"{marker}: {count} tests ({ASKED_FOR[marker]}); run them with: pytest -m {marker}"
        )
