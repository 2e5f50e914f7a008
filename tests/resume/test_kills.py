"""Killed at random moments and resumed, a run ends as if nothing had happened: bit for bit.

``--kills N`` says how often each run is killed; the moments are drawn from a seed.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from lives import (
    assert_same_run,
    has_begun,
    kill,
    overrides,
    rank_pids,
    start,
    status_pid,
    wait_for,
    wait_for_changes,
    wait_until_gone,
)


def _live(
    arguments: list[str], ranks: int | None, run_dir: Path, log: Path, rng: random.Random
) -> bool:
    """One life that ends by SIGKILL at a drawn moment; True if it reached its end before."""
    before = status_pid(run_dir)
    process = start(arguments, ranks, log)
    reached = wait_for(lambda: has_begun(run_dir, before), process)
    reached = reached and wait_for_changes(run_dir, rng.randrange(30), process)
    time.sleep(rng.choice((0.0, 0.0, rng.random() * 0.3)))
    if not reached or process.poll() is not None:
        assert process.wait() == 0, log.read_text()
        return True
    if ranks is None:
        kill(process, [process.pid])
    else:
        pids = rank_pids(run_dir)
        victim = rng.choice((0, ranks - 1, None))
        chosen = [*pids.values(), process.pid] if victim is None else [pids.get(victim, 0)]
        # No such process (any more): the launcher is on its way out.
        kill(process, [pid for pid in chosen if pid])
        wait_until_gone(run_dir)
    return process.returncode == 0


@pytest.mark.parametrize(
    "backend", ["sp", pytest.param("mpi", marks=pytest.mark.mpi(2))], ids=["sp", "mpi"]
)
@pytest.mark.timeout(3000)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    backend: str,
    config: Path,
    reference: Path,
    tmp_path: Path,
    kills: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(f"{backend} {kills}")  # noqa: S311 - moments, not secrets
    done = runs = 0
    while done < kills:
        runs += 1
        run_dir, log = tmp_path / f"run-{runs}", tmp_path / f"log-{runs}.txt"
        finished = False
        while not finished and done < kills:
            begun = (run_dir / "config.yaml").exists()
            arguments = (
                ["--resume", str(run_dir)]
                if begun
                else ["--cf", str(config), "--run-dir", str(run_dir), *overrides()]
            )
            ranks = None if backend == "sp" else rng.choice((2, 2, 3))
            finished = _live(arguments, ranks, run_dir, log, rng)
            done += not finished
        if not finished:
            ranks = None if backend == "sp" else 2
            last = start(["--resume", str(run_dir)], ranks, log)
            assert last.wait() == 0, log.read_text()
        assert_same_run(run_dir, reference)
    with capsys.disabled():
        print(f" [{done} kills in {runs} run(s)]", end="")
