"""``fedmosaic run`` and ranks: what is planned, started or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch import mpiexec
from fedml_plugin_fedmosaic.launch.mpiexec import mpiexec_command, run_ranks


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_world(tmp_path)


def invoke(*args: str) -> Any:
    return CliRunner().invoke(cli, args, prog_name="fedmosaic", catch_exceptions=False)


def test_a_dry_run_shows_who_would_train_whom_and_starts_no_rank(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpiexec, "mpiexec_command", lambda ranks: pytest.fail("started ranks"))
    result = invoke("run", "--cf", "tiny.yaml", "--backend", "MPI", "-np", "2", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "backend MPI" in lines
    assert "ranks 2" in lines
    assert "group 0 rank 0: client 1, 75% of the work" in lines
    assert "group 1 rank 1: clients 0, 2, 25% of the work" in lines
    assert not Path("runs").exists()


def test_a_dry_run_names_the_smallest_world(world: Path) -> None:
    text = world.read_text().replace("models/large}", "models/large, ranks: 3}")
    world.write_text(text)
    arguments = ("run", "--cf", "tiny.yaml", "--dry-run")
    result = invoke(*arguments, "--backend", "MPI", "-np", "3")
    assert result.exit_code == 2
    assert "client 1 needs 3 ranks" in result.stderr
    assert "--backend MPI -np 4" in result.stderr
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "backend sp is one process" in result.stderr


def test_the_ranks_get_the_same_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(
        mpiexec, "run_ranks", lambda ranks, arguments: started.append((ranks, arguments)) or 7
    )
    options = ("--cf", "a.yaml", "--algo", "fedavg", "--set", "train_args.comm_round=2")
    result = invoke("run", *options, "-np", "3", "--run-dir", "out", "--debug")
    assert result.exit_code == 7
    ((ranks, arguments),) = started
    assert ranks == 3
    assert arguments == [
        *("run", "--backend", "MPI", "--algo", "fedavg", "--cf", "a.yaml", "--run-dir", "out"),
        *("--set", "train_args.comm_round=2", "--debug"),
    ]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_ranks_need_backend_mpi(more: tuple[str, ...]) -> None:
    result = invoke("run", "--backend", "sp", "-np", "2", *more)
    assert result.exit_code == 2
    assert "-np starts MPI ranks, but the backend is sp" in result.stderr


def test_no_ranks_inside_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpiexec, "mpi_world", lambda: (1, 4))
    with pytest.raises(LaunchError, match="-np 2 inside an MPI job of 4 ranks"):
        run_ranks(2, [])


def test_a_machine_without_mpi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mpiexec.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(mpiexec.shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match="2 ranks need mpiexec"):
        mpiexec_command(2)


def test_one_process_on_several_ranks_is_refused(world: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedml_plugin_fedmosaic", "run", "--cf", "tiny.yaml"],
        env={**os.environ, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 6
    assert "[rank 1]" in done.stderr
    assert "backend sp is one process, but this is rank 1 of 2" in done.stderr
    assert not Path("runs").exists()
