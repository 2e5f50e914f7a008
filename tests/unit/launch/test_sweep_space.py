"""Grids as they are written, what they expand to, and the names of their runs."""

from __future__ import annotations

from typing import Any

import pytest

from fedml_plugin_fedmosaic.config.overrides import resolve_key
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.sweep_axes import (
    Range,
    make_space,
    parse_grid_option,
    parse_range,
)
from fedml_plugin_fedmosaic.launch.sweep_space import expand, run_name

MIXES = {
    "llama": {"data.scenario": "a", "sketch.proxy": "small"},
    "qwen": {"data.scenario": "b"},
}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed=1,2,3", "seed", [1, 2, 3]),
        ("strategy.temperature=0.1, 1e-2", "strategy.temperature", [0.1, 0.01]),
        ("compare=[local],[local, fedavg]", "compare", [["local"], ["local", "fedavg"]]),
        ("algo=fedmosaic", "algo", ["fedmosaic"]),
        ("noise='none',gaussian", "noise", ["none", "gaussian"]),
        ("models.a.path=bundled:llama-small", "models.a.path", ["bundled:llama-small"]),
        ("learning_rate=1e-5:1e-3:log", "learning_rate", "1e-5:1e-3:log"),
        ("num_steps=5:50", "num_steps", "5:50"),
    ],
)
def test_an_option_is_a_key_with_values_or_a_range(text: str, key: str, value: Any) -> None:
    assert parse_grid_option(text) == (key, value)


@pytest.mark.parametrize("text", ["seed", "seed=", "=1,2", "seed=[1,2"])
def test_what_is_not_an_option_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_grid_option(text)


def test_ranges() -> None:
    assert parse_range("1e-5:1e-3:log") == Range(1e-5, 1e-3, log=True)
    assert parse_range("5:50") == Range(5, 50, whole=True)
    assert parse_range("bundled:llama") is None
    with pytest.raises(ConfigError, match="LOW < HIGH"):
        parse_range("3:1")
    with pytest.raises(ConfigError, match="above 0"):
        parse_range("0:1:log")


def test_seed_and_algo_are_short_names_everywhere() -> None:
    assert resolve_key("seed") == ("common_args", "random_seed")
    assert resolve_key("algo") == ("train_args", "federated_optimizer")


def test_a_grid_is_the_product_of_its_axes_in_their_order() -> None:
    points = expand(make_space([{"strategy.temperature": [0.5, 1.0], "seed": [1, 2]}]))
    assert [point.name for point in points] == [
        "temperature=0.5,seed=1",
        "temperature=0.5,seed=2",
        "temperature=1,seed=1",
        "temperature=1,seed=2",
    ]
    assert points[1].overrides == [
        "strategy_args.strategy.temperature=0.5",
        "common_args.random_seed=2",
    ]
    assert [point.configuration for point in points[:2]] == [(("temperature", 0.5),)] * 2


def test_several_grids_and_named_sets_of_changes() -> None:
    space = make_space([{"mix": MIXES, "algo": ["fedmosaic"]}, {"algo": ["local"], "seed": [7]}])
    points = expand(space)
    assert [point.name for point in points] == [
        "mix=llama,algo=fedmosaic",
        "mix=qwen,algo=fedmosaic",
        "algo=local,seed=7",
    ]
    assert dict(points[0].changes) == {
        "train_args.federated_optimizer": "fedmosaic",
        "data_args.data.scenario": "a",
        "sketch_args.sketch.proxy": "small",
    }
    # The strategy comes first: it owns the strategy_args that follow.
    assert points[0].algo == "fedmosaic"
    assert not any("federated_optimizer" in text for text in points[0].overrides)


def test_keys_with_the_same_last_part_get_longer_names() -> None:
    space = make_space([{"optim.batch_size": [1], "eval_args.evaluation.batch_size": [2]}])
    assert [axis.name for axis in space[0]] == ["optim.batch_size", "evaluation.batch_size"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "varies nothing"),
        ({"sead": [1]}, "'seed'|unknown key 'sead'"),
        ({"batch_size": [1]}, "several sections"),
        ({"seed": [1, 1]}, "given twice"),
        ({"seed": []}, "list of values"),
        ({"seed": "1:5"}, "list of seeds"),
        ({"rank": 4}, "list of values"),
        ({"rank": "four"}, "range LOW:HIGH"),
        ({"seed": [1], "random_seed": [2]}, "set by both"),
        ({"mix": {}}, "at least one"),
        ({"mix": {"a": 3}}, "label"),
        ({"mix": MIXES, "data.scenario": ["c"]}, "set by both"),
    ],
)
def test_mistakes_of_a_grid(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_space([grid])


def test_the_same_run_in_two_grids_is_refused() -> None:
    space = make_space([{"algo": ["local", "fedavg"]}, {"algo": ["local"]}])
    with pytest.raises(ConfigError, match="algo=local is asked for twice"):
        expand(space)


def test_random_draws_configurations_and_runs_each_with_every_seed() -> None:
    space = make_space([{"rank": [2, 4, 8, 16], "seed": [1, 2]}])
    points = expand(space, "random", 3, seed=5)
    assert len(points) == 6
    assert len({point.configuration for point in points}) == 3
    assert [point.levels["seed"] for point in points] == [1, 2] * 3
    assert expand(space, "random", 3, seed=5) == points
    assert expand(space, "random", 3, seed=6) != points
    with pytest.raises(ConfigError, match="there are 4 configurations"):
        expand(space, "random", 5)
    with pytest.raises(ConfigError, match="--samples N"):
        expand(space, "random")


def test_random_draws_from_ranges() -> None:
    space = make_space([{"learning_rate": "1e-5:1e-3:log", "rank": "2:64", "algo": ["local"]}])
    points = expand(space, "random", 40)
    rates = [point.changes["optim_args.optim.learning_rate"] for point in points]
    ranks = [point.changes["adapter_args.adapter.rank"] for point in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    # Evenly on a logarithmic scale: about half of them lie below the geometric mean.
    assert 10 <= sum(rate < 1e-4 for rate in rates) <= 30
    assert all(isinstance(rank, int) and 2 <= rank <= 64 for rank in ranks)
    assert len({point.name for point in points}) == 40
    with pytest.raises(ConfigError, match="is a range"):
        expand(space)
    with pytest.raises(ConfigError, match="only 3 configurations"):
        expand(make_space([{"rank": "2:4"}]), "random", 4)


def test_names_fit_into_a_folder() -> None:
    assert run_name({"noise": None, "base": True}) == "noise=null,base=true"
    odd, other = run_name({"path": "a/b"}), run_name({"path": "a:b"})
    assert "/" not in odd
    assert odd != other
    long = run_name({"scenario": "x" * 300})
    assert len(long) <= 120
