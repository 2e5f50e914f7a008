"""SIGTERM and SIGUSR1: the step is finished, everything is saved, exit code 75, and on it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lives import (
    assert_same_run,
    has_begun,
    overrides,
    start,
    wait_for,
    wait_for_changes,
    wait_until_gone,
)

from fedml_plugin_fedmosaic.runtime.signals import stop_on_signals

LIMIT_S = 240


def test_requests_are_noted_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with stop_on_signals() as request:
            assert not request()
            os.kill(os.getpid(), number)
            assert request()
            assert request.name == number.name
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    inside: list[object] = []

    def work() -> None:
        with stop_on_signals() as request:
            inside.extend([signal.getsignal(signal.SIGUSR1), request()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before, False]


def _stopped(process: subprocess.Popen[bytes], run_dir: Path, changes: int, log: Path) -> None:
    assert wait_for(lambda: has_begun(run_dir, None), process), log.read_text()
    assert wait_for_changes(run_dir, changes, process), log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=LIMIT_S) == 75, log.read_text()
    said = log.read_text()
    assert f"fedmosaic run --resume {run_dir}" in said
    assert "Traceback" not in said


def _resumed(run_dir: Path, ranks: int | None, log: Path) -> None:
    process = start(["--resume", str(run_dir)], ranks, log)
    assert process.wait(timeout=LIMIT_S) == 0, log.read_text()


@pytest.mark.mpi(2)
def test_sigterm_stops_a_run_that_then_goes_on_over_mpi(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = ["--cf", str(config), "--run-dir", str(run_dir), *overrides()]
    _stopped(start(arguments, None, log), run_dir, 12, log)
    _resumed(run_dir, 2, log)
    assert_same_run(run_dir, reference)


@pytest.mark.mpi(2)
def test_a_signal_to_the_starter_stops_all_ranks_and_one_process_goes_on(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    command = [sys.executable, "-m", "fedml_plugin_fedmosaic", "run", "-np", "2"]
    command += ["--backend", "MPI", "--cf", str(config), "--run-dir", str(run_dir), *overrides()]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TTY_COMPATIBLE": "0"},
        )
    _stopped(process, run_dir, 12, log)
    wait_until_gone(run_dir)
    _resumed(run_dir, None, log)
    assert_same_run(run_dir, reference)
