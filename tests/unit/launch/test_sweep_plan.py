"""Sweep files, the check of every combination, and the identity of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.loader import dump_experiment, load_experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.launch.sweep_manifest import (
    Manifest,
    check_identity,
    entry_of,
    is_locked,
    locked,
    read_manifest,
    require_manifest,
    write_manifest,
)
from fedml_plugin_fedmosaic.launch.sweep_plan import SweepSpec, make_plan, read_sweep_file

BASE = """\
train_args: {federated_optimizer: FedMosaic, comm_round: 2}
strategy_args:
  strategy: {temperature: 0.3}
eval_args:
  evaluation: {compare: []}
"""


@pytest.fixture
def cf(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def spec(cf: Path, *grids: dict[str, object], **options: object) -> SweepSpec:
    return SweepSpec(cf=cf, grids=grids, **options)


def test_every_run_has_its_own_checked_configuration(cf: Path) -> None:
    plan = make_plan(
        spec(cf, {"strategy.temperature": [0.1, 0.5], "seed": [1, 2]}, overrides=("rank=4",))
    )
    assert len(plan.points) == 4
    experiment = plan.experiments["temperature=0.5,seed=2"]
    assert experiment.strategy["temperature"] == 0.5
    assert experiment.common.random_seed == 2
    assert experiment.adapter.rank == 4
    assert plan.base.strategy["temperature"] == 0.3


def test_another_strategy_drops_the_options_of_the_files_own(cf: Path) -> None:
    plan = make_plan(spec(cf, {"algo": ["fedmosaic", "local"]}))
    assert plan.experiments["algo=fedmosaic"].strategy == {"temperature": 0.3}
    assert plan.experiments["algo=local"].strategy == {}


def test_every_mistake_of_every_combination_is_reported_once(cf: Path) -> None:
    grid = {"rank": [4, -1], "strategy.temperture": [0.5], "seed": [1, 2]}
    with pytest.raises(ConfigError) as caught:
        make_plan(spec(cf, grid))
    lines = caught.value.message.splitlines()
    assert len(lines) == 2
    assert "did you mean 'temperature'" in lines[0]
    assert lines[0].endswith("(run rank=4,temperture=0.5,seed=1 and 3 more)")
    assert "must be >= 1 (got -1)" in lines[1]
    assert lines[1].endswith("(run rank=-1,temperture=0.5,seed=1 and 1 more)")
    assert caught.value.hint == "nothing was submitted"


def test_an_option_of_another_strategy_is_a_mistake(cf: Path) -> None:
    with pytest.raises(ConfigError, match=r"run algo=local,temperature=0\.5"):
        make_plan(spec(cf, {"algo": ["fedmosaic", "local"], "strategy.temperature": [0.5]}))


def test_numbers_of_a_sweep_are_checked(cf: Path) -> None:
    grid = {"strategy.temperature": [0.1, 0.5]}
    for options, message in (
        ({"max_parallel": 0}, "max-parallel"),
        ({"samples": 0, "sampler": "random"}, "samples"),
        ({"samples": 3}, "belongs to the samplers"),
        ({"sampler": "tpe"}, "needs --samples"),
        ({"sampler": "tpe", "samples": 3, "objective": "selfish"}, "did you mean 'self'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_plan(spec(cf, grid, **options))
    with pytest.raises(ConfigError, match="one grid"):
        make_plan(spec(cf, grid, {"rank": [4]}, sampler="tpe", samples=3))
    with pytest.raises(ConfigError, match="varies only the seed"):
        make_plan(spec(cf, {"seed": [1, 2]}, sampler="tpe", samples=3))


def test_tpe_checks_every_value_and_both_ends_of_a_range(cf: Path) -> None:
    good = {"strategy.temperature": [0.1, 0.5], "learning_rate": "1e-5:1e-3:log", "rank": "2:8"}
    assert make_plan(spec(cf, good, sampler="tpe", samples=3)).points == ()
    with pytest.raises(ConfigError, match="must be >= 1"):
        make_plan(spec(cf, {"rank": "0:8"}, sampler="tpe", samples=3))


def test_a_sweep_file(cf: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "cf: base.yaml\nset: {comm_round: 1, compare: [local]}\nsampler: random\nsamples: 2\n"
        "sampler_seed: 4\nobjective: others\nmax_parallel: 3\n"
        "grid:\n  - {strategy.temperature: [0.1, 0.5], seed: [1]}\n  - {algo: [local]}\n",
        encoding="utf-8",
    )
    read = read_sweep_file(path)
    assert (read.sampler, read.samples, read.sampler_seed) == ("random", 2, 4)
    assert (read.objective, read.max_parallel) == ("others", 3)
    plan = make_plan(read)
    assert plan.base.train.comm_round == 1
    assert plan.base.evaluation.compare == ("local",)
    assert len(plan.points) == 2


def test_every_mistake_of_a_sweep_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("sampler: gird\nsamples: many\ngrids: {}\nset: 3\nmax_parallel: true\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep_file(path)
    text = caught.value.message
    for part in ("did you mean 'grid'", "whole number (got 'many')", "set: must be", "got True"):
        assert part in text, part
    assert text.count("did you mean 'grid'") == 2
    assert f"{path}:1" in text


def test_the_same_sweep_is_known_again_and_another_one_named(cf: Path, tmp_path: Path) -> None:
    plan = make_plan(spec(cf, {"strategy.temperature": [0.1, 0.5], "seed": [1, 2]}))
    manifest = Manifest(identity=plan.identity(), runs=[entry_of(p) for p in plan.points])
    write_manifest(tmp_path / "s", manifest)
    known = read_manifest(tmp_path / "s")
    assert known is not None
    assert known.runs == manifest.runs
    assert known.counts() == {"MISSING": 4}
    check_identity(tmp_path / "s", known.identity, plan.identity())

    other = make_plan(
        spec(cf, {"strategy.temperature": [0.1], "rank": [4]}, overrides=("comm_round=3",))
    )
    with pytest.raises(ConfigError) as caught:
        check_identity(tmp_path / "s", known.identity, other.identity())
    assert caught.value.message.splitlines() == [
        f"{tmp_path / 's/sweep.json'}: {text}"
        for text in (
            "grid.temperature: there [0.1, 0.5], asked for [0.1]",
            "grid.seed: there [1, 2], asked for nothing",
            "grid.rank: there nothing, asked for [4]",
            "base.train.comm_round: there 2, asked for 3",
        )
    ]


def test_parallelism_folders_and_resources_do_not_make_another_sweep(cf: Path) -> None:
    first = make_plan(spec(cf, {"seed": [1]}))
    second = make_plan(
        spec(cf, {"seed": [1]}, max_parallel=2, overrides=("run.root=x", "launcher.mem_gib=8"))
    )
    assert first.identity() == second.identity()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    with pytest.raises(DataError, match=r"no sweep\.json"):
        require_manifest(tmp_path)
    for text in ("{", '{"version": 99}', '{"version": 1}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(DataError, match=r"sweep\.json"):
            read_manifest(tmp_path)


def test_a_second_command_is_kept_out(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(ConfigError, match="another 'fedmosaic sweep'"), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_a_resolved_configuration_survives_the_way_to_its_job(cf: Path, tmp_path: Path) -> None:
    plan = make_plan(spec(cf, {"compare": [["local"], []], "strategy.temperature": [1e-5]}))
    for name, experiment in plan.experiments.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_experiment(experiment), encoding="utf-8")
        assert load_experiment(path) == experiment
