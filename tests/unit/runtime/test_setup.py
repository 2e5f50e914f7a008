"""Who trains what: costs, needs, and mistakes that every rank hears of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_world import write_world

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import (
    AdapterError,
    ClientFailure,
    CommError,
    ConfigError,
    LaunchError,
)
from fedml_plugin_fedmosaic.core.registry import DATASETS
from fedml_plugin_fedmosaic.core.types import ClientManifest
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.setup import (
    choose_proxy,
    client_loads,
    needed_models,
    outline_models,
    plan_ranks,
    share_manifests,
    together,
    used_models,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def parts(config: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.chdir(config.parent)
    experiment = load_experiment(config, backend="MPI")
    data = DATASETS["drake"](experiment.data)
    outlines = outline_models(used_models(experiment, data))
    return SimpleNamespace(experiment=experiment, data=data, outlines=outlines)


class Rank(LocalCommunicator):
    """One rank of several; ``others`` are the texts that the other ranks share."""

    def __init__(self, owned: Sequence[int], *others: str, rank: int = 0, leader: bool = True):
        super().__init__()
        self.rank, self.size, self.is_leader = rank, 1 + len(others), leader
        self._owned, self._others = tuple(owned), list(others)

    def owned(self, client_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(client for client in sorted(client_ids) if client in self._owned)

    def share(self, text: str) -> tuple[str, ...]:
        texts = list(self._others)
        texts.insert(self.rank, text)
        return tuple(texts)


def wide(experiment: Any, ranks: int) -> Any:
    large = replace(experiment.models["large"], ranks=ranks)
    return replace(experiment, models={**experiment.models, "large": large})


def test_cost_is_parameters_times_steps(parts: SimpleNamespace) -> None:
    loads = client_loads(parts.experiment, parts.data, parts.outlines)
    large, small = (parts.outlines[name].num_parameters for name in ("large", "small"))
    steps = loads[0].cost / small
    assert steps > 0
    assert [load.cost for load in loads] == [small * steps, large * steps, small * steps]
    assert [load.ranks for load in loads] == [1, 1, 1]


def test_a_client_on_several_ranks_gets_them(parts: SimpleNamespace) -> None:
    topology = plan_ranks(wide(parts.experiment, 2), parts.data, parts.outlines, 4)
    assert [group.ranks for group in topology.groups] == [(0, 1), (2,), (3,)]
    assert topology.owners == {0: 1, 1: 0, 2: 2}


def test_a_client_on_several_ranks_needs_mpi(parts: SimpleNamespace) -> None:
    sp = replace(parts.experiment, comm=replace(parts.experiment.comm, backend="sp"))
    with pytest.raises(
        ConfigError, match=r"client 1 needs 2 ranks \(model_args.models.large.ranks"
    ) as e:
        plan_ranks(wide(sp, 2), parts.data, parts.outlines, 1)
    assert "--backend MPI -np 3" in str(e.value.hint)


def test_a_world_that_is_too_small_names_the_smallest(parts: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot train these clients") as info:
        plan_ranks(wide(parts.experiment, 3), parts.data, parts.outlines, 3)
    assert "-np 4" in str(info.value.hint)


def test_noise_of_several_ranks_would_differ(parts: SimpleNamespace) -> None:
    private = replace(parts.experiment, dp=replace(parts.experiment.dp, enable_dp=True))
    with pytest.raises(ConfigError, match="each of them would draw noise of its own"):
        plan_ranks(wide(private, 2), parts.data, parts.outlines, 4)


def test_clocks_of_several_ranks_would_differ(parts: SimpleNamespace) -> None:
    faults = replace(parts.experiment.faults, round_deadline_s=60.0)
    hasty = replace(parts.experiment, faults=faults)
    with pytest.raises(ConfigError, match=r"faults.round_deadline_s: client 1 is trained by 2"):
        plan_ranks(wide(hasty, 2), parts.data, parts.outlines, 4)
    assert len(plan_ranks(hasty, parts.data, parts.outlines, 3).groups) == 3


def test_ranks_load_what_their_clients_need(parts: SimpleNamespace) -> None:
    proxy = choose_proxy(parts.experiment, parts.outlines)
    assert proxy == "small"

    def loaded(rank: Rank, *strategies: str) -> list[str]:
        return needed_models(parts.data, rank, strategies, proxy)

    # Client 1 has the large model; its leader computes sketches with the small one.
    assert loaded(Rank([1]), "fedmosaic") == ["large", "small"]
    assert loaded(Rank([1], leader=False), "fedmosaic") == ["large"]
    assert loaded(Rank([1]), "fedavg", "local") == ["large"]
    assert loaded(Rank([0, 2]), "fedmosaic") == ["small"]
    assert loaded(Rank([]), "fedmosaic") == []


def test_work_that_goes_well_everywhere_gives_its_result() -> None:
    assert together(Rank([0], "null"), lambda: 5) == 5


def test_the_first_rank_that_fails_speaks_for_all() -> None:
    theirs = json.dumps(["AdapterError", "rank 9 is too large", "take 4", ["while checking"]])
    with pytest.raises(AdapterError, match="rank 9 is too large") as info:
        together(Rank([0], theirs), lambda: 5)
    assert info.value.everywhere
    assert info.value.hint == "take 4"
    assert info.value.__notes__ == ["while checking", "found by rank 1"]


def test_an_error_of_ones_own_keeps_its_traceback() -> None:
    mine = ConfigError("mine")

    def fail() -> None:
        raise mine

    with pytest.raises(ConfigError) as info:
        together(Rank([0], "null"), fail)
    assert info.value is mine
    assert mine.everywhere


def test_an_error_that_cannot_be_made_again_keeps_its_message() -> None:
    theirs = json.dumps([ClientFailure.__name__, "client 3, round 1, fit: no", None, []])
    with pytest.raises(CommError, match="client 3, round 1, fit: no"):
        together(Rank([0], theirs), lambda: 5)


def test_manifests_of_all_ranks_ascending_and_once() -> None:
    def manifest(client_id: int) -> ClientManifest:
        return ClientManifest(
            client_id=client_id,
            model="m",
            family="llama",
            signature="s",
            num_layers=2,
            num_blocks=2,
            num_examples=8,
            tasks=("a", "b"),
            layouts={"pq": "digest"},
        )

    theirs = share_manifests(Rank([1]), [manifest(1)])
    assert theirs == (manifest(1),)
    told = json.dumps([{**_plain(manifest(1))}])
    assert share_manifests(Rank([2, 0], told), [manifest(0), manifest(2)]) == tuple(
        map(manifest, range(3))
    )
    # The other ranks of a group say nothing.
    assert share_manifests(Rank([1], told, leader=False), [manifest(1)]) == (manifest(1),)


def _plain(manifest: ClientManifest) -> dict[str, Any]:
    names = type(manifest).__dataclass_fields__
    return {name: getattr(manifest, name) for name in names}


def test_a_plan_for_more_ranks_can_be_described_but_not_executed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    prepared = prepare_run(load_experiment(config, backend="MPI"), ranks=4)
    lines = dict(prepared.describe())
    assert lines["ranks"] == "4"
    assert lines["group 0"] == "rank 0: client 1, 75% of the work"
    assert lines["idle"] == "rank 3: more ranks than the clients can use"
    with pytest.raises(LaunchError, match="prepared for 4 ranks without starting them"):
        prepared.execute()
    assert not (config.parent / "runs").exists()
