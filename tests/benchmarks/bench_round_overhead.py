"""Where the time of a round goes, and what two ranks gain.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_round_overhead.py [--ranks 1 2]``

Runs rounds of the bundled quickstart without evaluation. First, in this process, every part of a
round is timed: model steps (forward, backward, optimizer) and sketches (forward passes of the
proxy) are what any federation must do; the rest is overhead. CPU times are of the main thread and
hardly change on a busy machine. Then the run is repeated by the command with each number of ranks,
one process each; compare the shortest rounds, on a machine with a core per rank that does nothing
else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.events import RoundFinished, from_record
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.keeper import Keeper
from fedml_plugin_fedmosaic.runtime.round import StrategyRun
from fedml_plugin_fedmosaic.strategies.fedmosaic import FedMosaic

SETTINGS = ("compare=[]", "evaluation.every=0", "evaluation.base=false")
PARTS: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    ("model steps", TorchEngine, ("_step",)),
    ("sketches", SketchEngine, ("gradient",)),
    ("relevance, plan, mixing", LocalCommunicator, ("relevance", "execute", "exchange_headers")),
    ("relevance, plan, mixing", FedMosaic, ("plan",)),
    ("saving", Keeper, ("client_done", "round_done")),
)
MODELS = ("model steps", "sketches")


class Clock:
    """Wall and CPU seconds by part; what a part calls counts for the inner part only."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._inside: list[str] = []
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    def _book(self) -> None:
        now = self._now()
        if self._inside:
            spent = self.spent.setdefault(self._inside[-1], [0.0, 0.0])
            for index in range(2):
                spent[index] += now[index] - self._since[index]
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._book()
        self._inside.append(name)
        try:
            yield
        finally:
            self._book()
            self._inside.pop()

    def watch(self, owner: Any, method: str, name: str, *, inside: bool = True) -> None:
        """Books a method's time; with ``inside`` only when called inside another part."""
        original: Callable[..., Any] = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if inside and not self._inside:
                return original(*args, **kwargs)
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def shares(settings: list[str]) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_run(load_experiment(None, settings), Path(folder) / "run")
        clock.watch(StrategyRun, "_round", "other", inside=False)
        for name, owner, methods in PARTS:
            for method in methods:
                clock.watch(owner, method, name)
        for processor in {type(bundle.processor) for bundle in prepared.bundles.values()}:
            clock.watch(processor, "encode_supervised", "encoding samples")
        # The last round is always evaluated, which is no part of a round.
        setattr(StrategyRun, "_evaluate", lambda *_: None)  # noqa: B010
        prepared.execute()
    total = [sum(spent[index] for spent in clock.spent.values()) for index in range(2)]
    print("part                       wall s   share    CPU s   share")
    for name, (wall, cpu) in sorted(clock.spent.items(), key=lambda item: -item[1][0]):
        print(f"{name:<25}{wall:>8.2f}{wall / total[0]:>8.1%}{cpu:>9.2f}{cpu / total[1]:>8.1%}")
    rest = [
        sum(spent[index] for name, spent in clock.spent.items() if name not in MODELS)
        for index in range(2)
    ]
    print(
        f"{'all but the models':<25}{rest[0]:>8.2f}{rest[0] / total[0]:>8.1%}"
        f"{rest[1]:>9.2f}{rest[1] / total[1]:>8.1%}",
        flush=True,
    )


def rounds_of(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [from_record(json.loads(line)) for line in lines]
    return [event.duration_s for event in events if isinstance(event, RoundFinished)]


def command(ranks: int, settings: list[str], run_dir: Path) -> list[str]:
    base = [sys.executable, "-m", "fedml_plugin_fedmosaic", "run", "--run-dir", str(run_dir)]
    for setting in settings:
        base += ["--set", setting]
    return base if ranks == 1 else [*base, "--backend", "MPI", "-np", str(ranks)]


def compare_ranks(counts: list[int], settings: list[str], repeats: int) -> None:
    best: dict[int, float] = {}
    for _ in range(repeats):
        for ranks in counts:
            with tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                subprocess.run(
                    command(ranks, settings, run_dir), check=True, stdout=subprocess.DEVNULL
                )
                best[ranks] = min([*rounds_of(run_dir), best.get(ranks, float("inf"))])
    for ranks, seconds in best.items():
        print(
            f"{ranks} rank(s): shortest round {seconds:7.2f} s, {best[counts[0]] / seconds:.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    settings = [*SETTINGS, f"comm_round={args.rounds}"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {args.rounds} rounds")
    shares(settings)
    if args.ranks:
        compare_ranks(args.ranks, settings, args.repeats)


if __name__ == "__main__":
    main()
