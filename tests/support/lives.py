"""Runs of a tiny federation in processes of their own, ended early and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fedml_plugin_fedmosaic.launch.mpiexec import mpiexec_command
from fedml_plugin_fedmosaic.runtime.treefile import load_tree

TIMEOUT_S = 240
SETTINGS = (
    "comm_round=4",
    "client_num_per_round=2",
    "optim.num_steps=6",
    "optim.moments=keep",
    "adapter.dropout=0.1",
    "evaluation.every=2",
    "evaluation.compare=[local]",
)
"""Partial participation, moments, dropout, two strategies, evaluations between rounds."""


def overrides(settings: Sequence[str] = SETTINGS) -> list[str]:
    return [text for setting in settings for text in ("--set", setting)]


def start(arguments: Sequence[str], ranks: int | None, log: Path) -> subprocess.Popen[bytes]:
    """``python -m fedml_plugin_fedmosaic run ...`` alone or on ranks; its output goes to a file."""
    before = [] if ranks is None else mpiexec_command(ranks)
    backend = "sp" if ranks is None else "MPI"
    command = [*before, sys.executable, "-m", "fedml_plugin_fedmosaic", "run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TTY_COMPATIBLE": "0"}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*command, "--backend", backend],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def rank_pids(run_dir: Path) -> dict[int, int]:
    """Rank -> process id of the ranks whose command line names a run folder."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(run_dir) not in words or b"fedml_plugin_fedmosaic" not in words:
            continue
        for variable in variables:
            name, _, value = variable.partition(b"=")
            if name == b"OMPI_COMM_WORLD_RANK":
                found[int(value)] = int(entry.name)
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Waits until a condition holds; False if the process ended first."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return condition()
        time.sleep(0.002)
    raise TimeoutError("the run neither got there nor ended")


def changes(run_dir: Path) -> int:
    """A number that grows whenever a run writes something."""
    sizes = 0
    for path in run_dir.glob("metrics*.jsonl"):
        try:
            sizes += path.read_bytes().count(b"\n")
        except OSError:
            continue
    made = 0
    for folder in (run_dir / "checkpoints").glob("*"):
        try:
            made += sum(entry.stat().st_ino for entry in os.scandir(folder))
        except OSError:
            continue
    return hash((sizes, made))


def wait_for_changes(run_dir: Path, count: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until a run that has begun has written so many times; False if it ended first."""
    seen = 0
    last = changes(run_dir)

    def moved() -> bool:
        nonlocal seen, last
        now = changes(run_dir)
        seen += now != last
        last = now
        return seen >= count

    return wait_for(moved, process)


def has_begun(run_dir: Path, pid_before: int | None) -> bool:
    """Whether a new life has said that it is running."""
    return status_pid(run_dir) not in (None, pid_before)


def status_pid(run_dir: Path) -> int | None:
    try:
        return int(json.loads((run_dir / "status.json").read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return None


def kill(process: subprocess.Popen[bytes], pids: Sequence[int]) -> None:
    """SIGKILL, at once; processes that are gone already do not matter."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=TIMEOUT_S)


def wait_until_gone(run_dir: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while rank_pids(run_dir):
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks of {run_dir} are still there")
        time.sleep(0.05)


def metrics(run_dir: Path, *, times: bool = False) -> list[dict[str, Any]]:
    """The events without what depends on the clock (unless asked for) or on where the run is."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    free = {"run_dir"} if times else {"duration_s", "train_s", "run_dir"}
    return [{k: v for k, v in record.items() if k not in free} for record in records]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every checkpoint file, by file and name; the files are checked, too."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted((run_dir / "checkpoints").rglob("*.safetensors")):
        load_tree(path)
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - no mapping
                key = f"{path.relative_to(run_dir)}:{name}"
                found[key] = stream.get_tensor(name).clone()
    return found


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Checkpoints bit for bit, metrics in the same order, nothing left behind."""
    ours, expected = tensors(run_dir), tensors(reference)
    assert ours.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(ours[key], expected[key])]
    assert different == []
    assert metrics(run_dir) == metrics(reference)
    assert [path.name for path in run_dir.rglob("*.tmp")] == []
    assert [path.name for path in run_dir.glob("metrics.rank*")] == []
