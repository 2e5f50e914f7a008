"""A FedML main program goes on with an interrupted run that its YAML names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lives import assert_same_run
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, RunInterrupted
from fedml_plugin_fedmosaic.integrations.fedml.runner import Runner
from fedml_plugin_fedmosaic.runtime.federation import prepare_run

pytestmark = [pytest.mark.fedml, pytest.mark.timeout(600)]

MAIN = """
import fedml

if __name__ == "__main__":
    fedml.run_simulation()
"""


class StopAt:
    """Says yes from the n-th question on."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self.position


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path)


@pytest.fixture
def interrupted(world: Path) -> Path:
    """A run folder that was left inside the second round."""
    run_dir = world.parent / "left"
    prepared = prepare_run(load_experiment(world), run_dir)
    prepared.should_stop = StopAt(14)
    with pytest.raises(RunInterrupted):
        prepared.execute()
    assert len(list((run_dir / "checkpoints/fedmosaic").glob("round-*.json"))) == 1
    return run_dir


def with_resume(config: Path, run_dir: str) -> Path:
    text = config.read_text()
    assert "run: {root: runs}" in text
    path = config.with_name("resume.yaml")
    path.write_text(text.replace("run: {root: runs}", f"run: {{root: runs, resume: {run_dir}}}"))
    return path


def test_a_main_program_goes_on(world: Path, interrupted: Path) -> None:
    folder = world.parent
    reference = folder / "reference"
    prepare_run(load_experiment(world), reference).execute()
    (folder / "main.py").write_text(MAIN)
    done = subprocess.run(
        [sys.executable, "main.py", "--cf", with_resume(world, "left").name],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(interrupted, reference)
    assert (interrupted / "resumes.jsonl").read_text().count("\n") == 1
    assert not (folder / "runs").exists()
    # Its config.yaml starts a new run when it is used again.
    assert load_experiment(interrupted / "config.yaml").run.resume is None


def test_another_configuration_is_refused(world: Path, interrupted: Path) -> None:
    changed = with_resume(world, str(interrupted))
    changed.write_text(changed.read_text().replace("rank: 2", "rank: 1"))
    with pytest.raises(ConfigError, match=r"adapter\.rank: the run has 2, asked for 1"):
        Runner(SimpleNamespace(yaml_config_file=str(changed)))


def test_a_folder_that_is_no_run_and_two_folders_are_refused(world: Path) -> None:
    changed = with_resume(world, str(world.parent / "data"))
    with pytest.raises(ConfigError, match="not a run folder"):
        Runner(SimpleNamespace(yaml_config_file=str(changed)))
    with pytest.raises(ConfigError, match=r"cannot be combined with run\.resume"):
        prepare_run(load_experiment(changed), world.parent / "other")
