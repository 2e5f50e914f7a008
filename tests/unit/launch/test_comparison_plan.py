"""Comparisons and benchmark files before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import STRATEGIES
from fedml_plugin_fedmosaic.launch.base import JOB_FILE
from fedml_plugin_fedmosaic.launch.benchmarks import benchmark_files, load_benchmark
from fedml_plugin_fedmosaic.launch.comparison import (
    ComparisonSpec,
    cell_folders,
    chosen_strategies,
    make_comparison,
    parse_own,
)
from fedml_plugin_fedmosaic.launch.sweep import open_sweep
from fedml_plugin_fedmosaic.launch.sweep_manifest import write_manifest


def test_strategies_are_known_named_once_and_the_reference_comes_first() -> None:
    assert chosen_strategies("fedavg, LOCAL,fedavg") == ("local", "fedavg")
    assert set(chosen_strategies("all")) == set(STRATEGIES)
    assert chosen_strategies("all")[0] == "local"
    with pytest.raises(ConfigError, match="unknown strategy 'nope'"):
        chosen_strategies("local,nope")
    with pytest.raises(ConfigError, match="names no strategy"):
        chosen_strategies(" , ")


def spec(*strategies: str, seeds: int = 2) -> ComparisonSpec:
    return ComparisonSpec(
        overrides=("common.random_seed=7",), strategies=strategies, seeds=seeds, max_parallel=2
    )


def test_every_strategy_runs_with_every_seed_and_alone() -> None:
    plan = make_comparison(spec("local", "fedmosaic"))
    assert [point.levels for point in plan.points] == [
        {"strategy": name, "seed": seed} for name in ("local", "fedmosaic") for seed in (7, 8)
    ]
    cells = plan.experiments
    assert {cell.evaluation.compare for cell in cells.values()} == {()}
    assert [cell.evaluation.base for cell in cells.values()] == [True, True, False, False]
    assert [cell.algo for cell in cells.values()] == ["local"] * 2 + ["fedmosaic"] * 2
    assert [cell.common.random_seed for cell in cells.values()] == [7, 8, 7, 8]
    folders = cell_folders(Path("cmp"), plan)
    assert folders["local"][8] == Path("cmp/runs/strategy=local,seed=8")


def test_a_folder_takes_further_strategies_and_seeds_of_the_same_base(tmp_path: Path) -> None:
    manifest = open_sweep(tmp_path, make_comparison(spec("local", seeds=1)))
    manifest.runs[0].status = "COMPLETED"
    write_manifest(tmp_path, manifest)
    grown = open_sweep(tmp_path, make_comparison(spec("fedavg", "local", seeds=2)))
    assert [(entry.name, entry.status) for entry in grown.runs] == [
        ("strategy=local,seed=7", "COMPLETED"),
        ("strategy=fedavg,seed=7", "MISSING"),
        ("strategy=fedavg,seed=8", "MISSING"),
        ("strategy=local,seed=8", "MISSING"),
    ]
    other = ComparisonSpec(overrides=("comm_round=3",), strategies=("local",), seeds=1)
    with pytest.raises(ConfigError, match="comm_round"):
        open_sweep(tmp_path, make_comparison(other))


def with_own(*pairs: tuple[str, str]) -> ComparisonSpec:
    return ComparisonSpec(strategies=("local", "fedmosaic"), seeds=1, settings=parse_own(pairs))


def test_a_strategy_may_have_its_own_rates_and_options() -> None:
    plan = make_comparison(
        with_own(("FedMosaic", "learning_rate=4e-3"), ("fedmosaic", "strategy.temperature=0.1"))
    )
    rates = {cell.algo: cell.optim.learning_rate for cell in plan.experiments.values()}
    assert rates == {"local": 1e-3, "fedmosaic": 4e-3}
    options = {cell.algo: dict(cell.strategy) for cell in plan.experiments.values()}
    assert options["fedmosaic"]["temperature"] == 0.1
    assert "temperature" not in options["local"]
    assert [point.name for point in plan.points] == [
        "strategy=local,seed=0",
        "strategy=fedmosaic,seed=0",
    ]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("fedmosaic", "num_steps=99"), "optim_args.optim.num_steps must be the same"),
        (("fedmosaic", "optim.batch_size=1"), "batch_size must be the same"),
        (("fedmosaic", "data.split=static"), "data_args.data.split must be the same"),
        (("fedmosaic", "adapter.rank=64"), "adapter.rank must be the same"),
        (("fedmosaik", "learning_rate=1"), "did you mean 'fedmosaic'"),
        (("fedmosaic", "learning_rat=1"), "--for fedmosaic learning_rat=1: .* did you mean"),
        (("fedmosaic", "learning_rate"), "expected KEY=VALUE"),
    ],
)
def test_what_would_make_strategies_incomparable_is_refused(
    pair: tuple[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_own([pair])


def test_settings_of_a_strategy_without_cells_are_refused() -> None:
    with pytest.raises(ConfigError, match="--for fedavg: the strategy is not compared"):
        make_comparison(with_own(("fedavg", "learning_rate=4e-3")))


def test_a_cell_with_other_settings_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path: Path,
) -> None:
    before = make_comparison(with_own(("fedmosaic", "learning_rate=4e-3")))
    write_manifest(tmp_path, open_sweep(tmp_path, before))
    after = make_comparison(with_own(("fedmosaic", "learning_rate=2e-3")))
    # As long as it has not started, it may be changed.
    manifest = open_sweep(tmp_path, after)
    assert len(manifest.runs) == 2
    assert manifest.runs[1].changes["optim_args.optim.learning_rate"] == 2e-3
    run_dir = tmp_path / "runs/strategy=fedmosaic,seed=0"
    run_dir.mkdir(parents=True)
    (run_dir / JOB_FILE).write_text("{}")
    assert len(open_sweep(tmp_path, before).runs) == 2
    with pytest.raises(ConfigError) as error:
        open_sweep(tmp_path, after)
    for part in ("strategy=fedmosaic,seed=0", "learning_rate", "there 0.004", "asked for 0.002"):
        assert part in error.value.message


def test_the_bundled_benchmarks_can_be_read() -> None:
    found = benchmark_files()
    assert "quickstart" in found
    for name in found:
        benchmark = load_benchmark(name)
        assert benchmark.configs
        for config in benchmark.configs.values():
            load_experiment(config.cf, config.overrides)
        assert benchmark.strategies[0] == "local"


def test_a_benchmark_file_is_checked_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "titel: x\nseeds: 0\nstrategies: local\nconfigs:\n  a b: none.yaml\n  c: none.yaml\n"
        "settings:\n  fedmosaic: {num_steps: 3}\n  ditto: 4\n"
    )
    with pytest.raises(ConfigError) as error:
        load_benchmark(str(path))
    for part in ("mine.yaml:1", "'title'", "seeds", "strategies", "a b", "no file none.yaml"):
        assert part in error.value.message
    for part in ("mine.yaml:8", "num_steps must be the same", "mine.yaml:9", "got 4"):
        assert part in error.value.message
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        load_benchmark("quickstarts")


def test_a_benchmark_of_ones_own_names_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("train_args: {comm_round: 2}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "strategies: [fedavg]\nconfigs:\n  one: one.yaml\n"
        "  two: {cf: one.yaml, set: {data.split: static}}\n"
        "settings: {fedavg: {learning_rate: 0.5}}\n"
    )
    benchmark = load_benchmark(str(path))
    assert (benchmark.title, benchmark.seeds) == ("mine", 3)
    assert benchmark.settings == {"fedavg": {"optim_args.optim.learning_rate": 0.5}}
    file = (tmp_path / "one.yaml").resolve()
    assert {label: config.cf for label, config in benchmark.configs.items()} == {
        "one": file,
        "two": file,
    }
    assert benchmark.configs["one"].overrides == ()
    changed = load_experiment(benchmark.configs["two"].cf, benchmark.configs["two"].overrides)
    assert changed.data.split == "static"
