"""The sweep files of the package: every run of every file is a correct configuration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.launch.resources import default_resources
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan, make_plan, read_sweep_file

FOLDER = Path(__file__).parents[3] / "configs" / "sweeps"
NUM_RUNS = {"cross_family": 108, "quickstart_temperature": 6, "text_cross_family": 8}


def plan_of(name: str) -> SweepPlan:
    return make_plan(read_sweep_file(FOLDER / f"{name}.yaml"))


def test_no_file_is_left_out() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(NUM_RUNS)


@pytest.fixture(scope="module")
def cross_family() -> SweepPlan:
    return plan_of("cross_family")


def test_the_quickstart_sweep_varies_the_temperature() -> None:
    plan = plan_of("quickstart_temperature")
    assert len(plan.experiments) == NUM_RUNS["quickstart_temperature"]
    found = {experiment.strategy["temperature"] for experiment in plan.experiments.values()}
    assert found == {0.1, 0.3, 1.0}
    assert all(not experiment.evaluation.compare for experiment in plan.experiments.values())


def test_the_text_sweep_holds_the_documentations_table() -> None:
    plan = plan_of("text_cross_family")
    assert len(plan.experiments) == NUM_RUNS["text_cross_family"]
    found = Counter(
        (experiment.algo, experiment.strategy.get("share_pq", True))
        for experiment in plan.experiments.values()
    )
    kinds = [("local", True), ("fedavg", True), ("fedmosaic", True), ("fedmosaic", False)]
    assert found == dict.fromkeys(kinds, 2)
    assert {experiment.data.source for experiment in plan.experiments.values()} == {"text"}


def test_the_cross_family_sweep_holds_every_mix_strategy_and_seed(cross_family: SweepPlan) -> None:
    experiments = cross_family.experiments.values()
    assert len(experiments) == NUM_RUNS["cross_family"]
    scenarios = Counter(str(experiment.data.scenario) for experiment in experiments)
    assert len(scenarios) == 12
    assert set(scenarios.values()) == {9}
    assert sum(name.startswith("DRAKE_homo_") for name in scenarios) == 6
    assert {experiment.algo for experiment in experiments} <= set(STRATEGIES)
    assert {experiment.common.random_seed for experiment in experiments} == {1, 2, 3}


def test_models_follow_from_the_scenarios_name(cross_family: SweepPlan) -> None:
    for name, experiment in cross_family.experiments.items():
        scenario = str(experiment.data.scenario)
        first, _, second = scenario.partition("_llava_")[2].partition("_qwen_")
        wanted = set()
        family, _, sizes = first.partition("_")
        sizes = sizes.replace("0_5B", "0.5B").replace("1_5B", "1.5B")
        wanted |= {(family, size) for size in sizes.split("_")}
        rest = second.replace("1_5B", "1.5B")
        wanted |= {("qwen", size) for size in rest.split("_") if size}
        found = {
            ("llama" if "llama" in key else "qwen", str(spec.size))
            for key, spec in experiment.models.items()
        }
        proxy = experiment.sketch.proxy or ""
        extra = ("qwen", "0.5B") if any(f == "qwen" for f, _ in wanted) else ("llama", "1B")
        assert found == wanted | {extra}, name
        assert proxy in experiment.models, name
        assert f"{extra[0]}" in proxy, name
        assert extra[1] in proxy, name
        assert all(key == spec.path for key, spec in experiment.models.items()), name
        assert default_resources(experiment).gpus_per_node == 4, name


def test_options_of_fedmosaic_do_not_reach_the_others(cross_family: SweepPlan) -> None:
    for experiment in cross_family.experiments.values():
        if experiment.algo != "fedmosaic":
            assert experiment.strategy == {}
