"""Makes a run folder that looks like a real one: 8 clients, 3 groups, 8 rounds, 3 strategies.

The numbers are drawn, not measured; they only have the shape that a report must cope with.
As a script: ``python tests/support/synthetic_run.py FOLDER [SEED]``.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from fedml_plugin_fedmosaic.core import events as ev

GROUPS = {
    "shapes": ("shapes-0", "shapes-1", "shapes-2"),
    "digits": ("digits-0", "digits-1", "digits-2"),
    "kinds": ("kinds-0", "kinds-1", "kinds-2"),
}
MODELS = (("llama", "0.7M"), ("llama", "1.6M"), ("qwen2", "0.8M"), ("qwen2", "1.9M"))
CONFIG = """\
common_args:
  training_type: simulation
  random_seed: {seed}
train_args:
  federated_optimizer: FedMosaic
  comm_round: {rounds}
adapter_args:
  adapter: {{type: auto, rank: 16, num_blocks: 4}}
"""


def make_clients(num_clients: int) -> list[dict[str, object]]:
    groups = list(GROUPS.values())
    clients = []
    for client_id in range(num_clients):
        names = groups[client_id % len(groups)]
        family, size = MODELS[client_id % len(MODELS)]
        start = client_id // len(groups)
        clients.append(
            {
                "client_id": client_id,
                "model": f"{family}-{size}",
                "family": family,
                "size": size,
                "signature": f"{family}/{size}",
                "tasks": [names[start % 3], names[(start + 1) % 3]],
                "num_examples": 240 + 20 * client_id,
            }
        )
    return clients


def _curve(base: float, top: float, rounds: int, round_idx: int) -> float:
    return base + (top - base) * (1 - math.exp(-3.0 * (round_idx + 1) / rounds))


class Maker:
    """Draws the events of one run."""

    def __init__(self, seed: int, num_clients: int, rounds: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - not cryptography
        self.rounds = rounds
        self.clients = make_clients(num_clients)
        self.tasks = [task for names in GROUPS.values() for task in names]
        self.base = {task: self.rng.uniform(0.28, 0.5) for task in self.tasks}

    def own(self, client_id: int) -> list[str]:
        return list(self.clients[client_id]["tasks"])  # type: ignore[call-overload]

    def group(self, client_id: int) -> str:
        return self.own(client_id)[0].partition("-")[0]

    def value(self, strategy: str, client_id: int, task: str, round_idx: int) -> float:
        base = self.base[task]
        same_group = task.startswith(self.group(client_id))
        gain = 0.02
        if task in self.own(client_id):
            gain = 0.33 if strategy == "local" else 0.38
        elif strategy != "local":
            gain = 0.2 if same_group else 0.07
        noisy = _curve(base, base + gain, self.rounds, round_idx) + self.rng.gauss(0, 0.012)
        return round(min(max(noisy, 0.0), 1.0) * 200) / 200

    def scored(
        self, strategy: str, client_id: int, round_idx: int, view: str, *, final: bool
    ) -> Iterator[ev.Event]:
        own = self.own(client_id)
        for task in self.tasks if final else own:
            value = self.base[task] if strategy == "base" else None
            yield ev.Evaluated(
                strategy=strategy,
                round_idx=round_idx,
                client_id=client_id,
                view=view,
                scope="self" if task in own else "others",
                task=task,
                metric="accuracy",
                value=self.value(strategy, client_id, task, round_idx) if value is None else value,
                num_samples=200 if final else 100,
                final=final,
            )

    def plan(self, strategy: str, round_idx: int) -> ev.PlanMade:
        if strategy == "local":
            return ev.PlanMade(strategy=strategy, round_idx=round_idx, relevance=None, weights=None)
        ids = range(len(self.clients))
        relevance, weights = [], []
        for i in ids:
            row = [
                1.0
                if i == j
                else (0.55 if self.group(i) == self.group(j) else 0.12)
                + 0.05 * round_idx / self.rounds
                + self.rng.gauss(0, 0.02)
                for j in ids
            ]
            powers = [0.0 if i == j else math.exp(row[j] / 0.2) for j in ids]
            relevance.append(tuple(row))
            weights.append(tuple(p / (sum(powers) or 1.0) for p in powers))
        return ev.PlanMade(
            strategy=strategy,
            round_idx=round_idx,
            relevance=tuple(relevance),
            weights=tuple(weights),
        )

    def round(self, strategy: str, round_idx: int) -> Iterator[ev.Event]:
        ids = tuple(range(len(self.clients)))
        yield ev.RoundStarted(strategy=strategy, round_idx=round_idx, cohort=ids)
        for client_id in ids:
            steps = 100 if strategy == "local" else 94
            yield ev.ClientTrained(
                strategy=strategy,
                round_idx=round_idx,
                client_id=client_id,
                pass_name="local",  # noqa: S106 - a training pass
                num_steps=steps,
                num_examples=4 * steps,
                num_tokens=12 * steps,
                mean_loss=1.4 * math.exp(-0.3 * round_idx)
                + 0.2
                + 0.02 * client_id
                + self.rng.gauss(0, 0.02),
                duration_s=1.5 + self.rng.random(),
            )
        yield self.plan(strategy, round_idx)
        used = 0 if strategy == "local" else 1
        yield ev.RoundFinished(
            strategy=strategy,
            round_idx=round_idx,
            duration_s=15 + self.rng.random(),
            uplink_bytes={i: used * (180_000 + 900 * i) for i in ids},
            downlink_bytes={i: used * (120_000 + 900 * i) for i in ids},
        )
        view = "local" if strategy == "local" else "gated"
        for client_id in ids:
            yield from self.scored(strategy, client_id, round_idx, view, final=False)

    def events(self, run_dir: str) -> Iterator[ev.Event]:
        ids = range(len(self.clients))
        for client_id in ids:
            yield from self.scored("base", client_id, -1, "base", final=True)
        for strategy in ("local", "fedmosaic"):
            yield ev.RunStarted(
                strategy=strategy,
                num_rounds=self.rounds,
                num_clients=len(self.clients),
                clients_per_round=len(self.clients),
                run_dir=run_dir,
            )
            for round_idx in range(self.rounds):
                yield from self.round(strategy, round_idx)
            views = ("local",) if strategy == "local" else ("gated", "local", "global")
            for client_id in ids:
                for view in views:
                    yield from self.scored(strategy, client_id, self.rounds - 1, view, final=True)
            yield ev.RunFinished(strategy=strategy, duration_s=140.0, train_s=124.0)


def make_run(run_dir: Path, *, seed: int = 0, num_clients: int = 8, rounds: int = 8) -> Path:
    """Writes a run folder and returns it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    maker = Maker(seed, num_clients, rounds)
    lines = [json.dumps(ev.to_record(event)) for event in maker.events(run_dir.name)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run_dir / "clients.json").write_text(json.dumps(maker.clients))
    (run_dir / "config.yaml").write_text(CONFIG.format(seed=seed, rounds=rounds))
    # The first task's samples arrive in the first half of the rounds, the second's in the second.
    half = rounds // 2
    arrival = [[0, half - 1], [half, rounds - 1]] if half else [[0, 0], [0, 0]]
    schedule = {str(client_id): arrival for client_id in range(num_clients)}
    (run_dir / "schedule.json").write_text(json.dumps(schedule))
    environment = {
        "started": "2025-01-01T00:00:00+00:00",
        "seed": seed,
        "python": "3.11.0",
        "platform": "Linux",
        "cpu_count": 2,
        "packages": {"torch": "2.5.0", "fedml": "0.9.6", "mpi4py": None},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    return run_dir


if __name__ == "__main__":
    make_run(Path(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
