"""Two processes and one run folder: the second one is refused and touches nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lives import SETTINGS, assert_same_run

from fedml_plugin_fedmosaic.cli.run import run_command
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, RunInUse
from fedml_plugin_fedmosaic.runtime import lock
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.lock import check_unlocked, holding

HOLDER = """
import sys
from pathlib import Path
from fedml_plugin_fedmosaic.runtime.lock import holding

with holding(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.0)


def content(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("impatient")
def test_a_run_in_use_cannot_be_resumed_until_its_process_is_gone(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(reference, tmp_path / "run"))
    with held_by_another(run_dir) as process:
        before = content(run_dir)
        assert run_command(resume=run_dir) == 7
        said = capsys.readouterr().err
        assert f"{run_dir} is in use by process {process.pid} on {socket.gethostname()}" in said
        assert content(run_dir) == before
        process.kill()
        process.wait(timeout=60)
        check_unlocked(run_dir)
    assert run_command(resume=run_dir) == 0
    assert_same_run(run_dir, reference)


@pytest.mark.usefixtures("impatient")
def test_two_new_runs_do_not_share_a_folder(config: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = load_experiment(config, [*SETTINGS, "evaluation.compare=[]"])
    prepared = prepare_run(settings, run_dir)
    with held_by_another(run_dir):
        with pytest.raises(RunInUse, match="is in use by process"):
            prepared.execute()
        assert [path.name for path in run_dir.iterdir()] == ["run.lock"]
    # The other one has run and ended since this one found the folder free.
    shutil.copytree(reference, run_dir, dirs_exist_ok=True)
    before = content(run_dir)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        prepared.execute()
    after = content(run_dir)
    assert {k: v for k, v in after.items() if k.name != "run.lock"} == {
        k: v for k, v in before.items() if k.name != "run.lock"
    }


def test_a_lock_is_held_for_the_whole_block_and_signed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with holding(run_dir):
        entry = json.loads((run_dir / "run.lock").read_text())
        assert (entry["host"], entry["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(RunInUse), holding(run_dir, wait_s=0):
            pass
        with pytest.raises(RunInUse, match=f"process {os.getpid()} on"):
            check_unlocked(run_dir, wait_s=0.2)
    with holding(run_dir, wait_s=0):
        pass


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with holding(tmp_path / "run"), holding(tmp_path / "run"):
        assert "cannot be locked" in caplog.text
