"""All strategies in whole runs of two architectures: stopped, on two ranks, and what they cost."""

from __future__ import annotations

import math
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from lives import TIMEOUT_S, assert_same_run, metrics, overrides, start, tensors
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.cost import Cost
from fedml_plugin_fedmosaic.core.errors import RunInterrupted
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.runtime.federation import prepare_run, strategies_of
from fedml_plugin_fedmosaic.runtime.resume import resumed_experiment

MAIN = "perada"
SETTINGS = (
    f"algo={MAIN}",
    "comm_round=2",
    "client_num_per_round=2",
    "optim.num_steps=4",
    "optim.moments=keep",
    "data.public_samples=2",
    "data.reserve=0.25",
    "evaluation.every=0",
    "evaluation.base=false",
    "evaluation.others=false",
    "evaluation.max_new_tokens=1",
)
SHORT = ("local", "ditto", "ifca", "fedmkt", "tap", MAIN)
"""Each way of working once: a pass, two objectives, slots, stages, probes, routes, final stages."""


def settings_of(names: tuple[str, ...]) -> list[str]:
    others = ", ".join(name for name in names if name != MAIN)
    return [*SETTINGS, f"evaluation.compare=[{others}]"]


class StopAt:
    """Says yes from the n-th question on."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self.position


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SHORT, id="short"),
        pytest.param(tuple(STRATEGIES), id="all", marks=pytest.mark.slow),
    ],
)
def names(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("all-strategies"))


@pytest.fixture(scope="module")
def counted(
    config: Path, names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """The run in this process, and how often it asked whether to stop."""
    run_dir = tmp_path_factory.mktemp("all-in-one") / "run"
    prepared = prepare_run(load_experiment(config, settings_of(names)), run_dir)
    assert set(strategies_of(prepared.experiment)) == set(names)
    prepared.should_stop = counter = StopAt(10**9)
    prepared.execute()
    return run_dir, counter.asked


def test_every_strategy_trains_and_scores_every_client(
    counted: tuple[Path, int], names: tuple[str, ...]
) -> None:
    run_dir, _ = counted
    trained: dict[str, set[int]] = {name: set() for name in names}
    scored: dict[str, Counter[int]] = {name: Counter() for name in names}
    for record in metrics(run_dir):
        name = record["strategy"]
        if record["event"] == "ClientTrained":
            assert math.isfinite(record["mean_loss"])
            assert record["flops"] > 0
            trained[name].add(record["client_id"])
        if record["event"] == "Evaluated":
            assert 0.0 <= record["value"] <= 1.0
            scored[name][record["client_id"]] += 1
    assert all(len(clients) >= 2 for clients in trained.values())
    assert all(sorted(counts) == [0, 1, 2] for counts in scored.values())


def test_personal_branches_are_never_sent(
    counted: tuple[Path, int], names: tuple[str, ...]
) -> None:
    run_dir, _ = counted
    found = tensors(run_dir)
    for name in {"ditto", "fedsim", "feddpa", "feddat", "perada"} & {*names}:
        local = {
            key.partition(":")[2]: value
            for key, value in found.items()
            if f"checkpoints/{name}/client-" in key and ".adapter." in key and "/local/B" in key
        }
        assert local
        sent = [
            value
            for key, value in found.items()
            if f"checkpoints/{name}/" in key and (".update.conv/" in key or "downlink-" in key)
        ]
        assert not any(
            value.shape == other.shape and value.equal(other) and value.any()
            for value in local.values()
            for other in sent
        )


def test_stopped_again_and_again_in_any_stage_they_end_alike(
    config: Path, names: tuple[str, ...], counted: tuple[Path, int], tmp_path: Path
) -> None:
    reference, questions = counted
    rng, run_dir, lives = random.Random(4), tmp_path / "run", 0  # noqa: S311
    prepared = prepare_run(load_experiment(config, settings_of(names)), run_dir)
    while True:
        prepared.should_stop = StopAt(rng.randrange(questions // 4, questions // 2))
        try:
            prepared.execute()
        except RunInterrupted:
            lives += 1
            prepared = prepare_run(resumed_experiment(run_dir), run_dir, resume=True)
        else:
            break
    assert lives >= 2
    assert_same_run(run_dir, reference)


@pytest.mark.mpi
def test_two_ranks_get_the_same_bits(
    config: Path, names: tuple[str, ...], counted: tuple[Path, int], tmp_path: Path
) -> None:
    reference, _ = counted
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = ["--cf", str(config), "--run-dir", str(run_dir), *overrides(settings_of(names))]
    process = start(arguments, 2, log)
    try:
        assert process.wait(timeout=TIMEOUT_S) == 0, log.read_text()
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert_same_run(run_dir, reference)


PUBLISHED = {
    "fedmosaic": 94,
    "local": 100,
    "fedavg": 100,
    "feddpa": 100,
    "fedsim": 75,
    "takfl": 75,
    "fedmkt": 60,
    "ditto": 50,
    "perada": 50,
    "feddat": 43,
}
"""Local updates per round at equal compute, as published (arXiv 2506.11024)."""


@pytest.mark.parametrize(("name", "steps"), PUBLISHED.items())
def test_the_published_numbers_of_steps_follow_from_the_declared_costs(
    name: str, steps: int
) -> None:
    strategy = STRATEGIES[name](STRATEGIES[name].Options())
    assert round(100 * strategy.cost.share) == steps


def test_both_backward_passes_of_fedsim_can_be_counted() -> None:
    kind = STRATEGIES["fedsim"]
    assert kind(kind.Options(accounting="counted")).cost.share == 0.5


def test_a_share_is_what_is_left_after_the_work_on_public_samples() -> None:
    assert Cost().share == 1.0
    assert Cost(public=5.0).share == round((3 - 0.2 * 5) / 3, 2)
    assert Cost(forwards=2, backwards=2, sketch=0.5).share == round(3 / 6.5, 2)


def test_what_is_spent_locally_is_what_was_declared(
    counted: tuple[Path, int], names: tuple[str, ...]
) -> None:
    """Floating-point operations of Ditto's and FedDAT's passes, relative to plain training."""
    run_dir, _ = counted
    spent: dict[str, float] = {}
    for record in metrics(run_dir):
        if record["event"] == "ClientTrained" and record["client_id"] == 1:
            key = record["strategy"]
            spent.setdefault(key, record["flops"] / record["num_examples"])
    plain = spent["local"]
    for name in {"ditto", "feddat"} & {*names}:
        kind = STRATEGIES[name]
        expected = kind(kind.Options()).cost.step / Cost().step
        assert spent[name] / plain == pytest.approx(expected, rel=0.1)
