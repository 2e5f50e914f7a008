"""Share of checkpoints in the wall time of the quickstart's rounds.

Run: python tests/benchmarks/bench_checkpoints.py [rounds]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.events import Event, RoundFinished
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.keeper import Keeper


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    spent: dict[str, float] = {"client_done": 0.0, "round_done": 0.0}
    trained = 0.0

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(Keeper, name)

        def call(self: Keeper, *args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(self, *args)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name in spent:
        setattr(Keeper, name, timed(name))

    def sink(event: Event) -> None:
        nonlocal trained
        if isinstance(event, RoundFinished):
            trained += event.duration_s

    overrides = [f"comm_round={rounds}", "evaluation.compare=[]", "evaluation.base=false"]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        prepare_run(
            load_experiment(None, [*overrides, "evaluation.every=0", "evaluation.others=false"]),
            run_dir,
            [sink],
        ).execute()
        files = [path for path in (run_dir / "checkpoints").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 2**20
    # Clients are saved inside the round that is measured, the round's own files after it.
    total = trained + spent["round_done"]
    share = sum(spent.values()) / total
    print(f"{rounds} rounds: {total:.1f} s; checkpoints {sum(spent.values()):.2f} s = {share:.1%}")
    print(f"clients {spent['client_done']:.2f} s, rounds {spent['round_done']:.2f} s")
    print(f"{len(files)} files, {size:.1f} MiB kept")


if __name__ == "__main__":
    main()
