"""New clients on unseen tasks: aggregation of adapters, the updates, and a whole run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_world import write_world

from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.core.errors import CheckpointError, ConfigError, DataError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part
from fedml_plugin_fedmosaic.core.work import LocalResult
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.report.adaptation import adaptation_table, read_adaptations
from fedml_plugin_fedmosaic.report.html import write_report
from fedml_plugin_fedmosaic.runtime.adaptation import adapt_run
from fedml_plugin_fedmosaic.runtime.federation import prepare_run
from fedml_plugin_fedmosaic.runtime.newcomer import (
    Donor,
    adapt,
    aggregated_adapter,
    check_updates,
    training_batches,
)


def key(part: Part, layer: int = 0, branch: Branch = Branch.LOCAL) -> AdapterKey:
    return AdapterKey(block=0, layer=layer, module="q_proj", branch=branch, part=part)


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(value))


def test_a_new_client_gets_means_of_its_own_shape_class_and_p_q_of_all() -> None:
    fresh = {
        key(Part.A): full(9, 2, 3),
        key(Part.P, layer=1): full(9, 2, 2),
        key(Part.A, branch=Branch.GLOBAL): full(9, 2, 3),
        key(Part.GATE, branch=Branch.SHARED): full(9),
        key(Part.B, layer=3): full(9, 4, 2),
    }
    donors = [
        Donor(
            signature="small",
            adapter={key(Part.A): full(1, 2, 3), key(Part.P, layer=1): full(1, 2, 2)},
        ),
        Donor(signature="small", adapter={key(Part.A): full(3, 2, 3)}),
        # Another architecture: its P is of the same block in another layer, its A says nothing.
        Donor(
            signature="large",
            adapter={
                key(Part.A): full(50, 2, 3),
                key(Part.P, layer=7): full(2, 2, 2),
                key(Part.A, branch=Branch.GLOBAL): full(50, 2, 3),
            },
        ),
    ]
    found = aggregated_adapter(fresh, "small", donors)
    assert {name: float(tensor.mean()) for name, tensor in found.items()} == {
        key(Part.A): 2.0,
        key(Part.P, layer=1): 1.5,
        key(Part.A, branch=Branch.GLOBAL): 9.0,
        key(Part.GATE, branch=Branch.SHARED): 9.0,
        key(Part.B, layer=3): 9.0,
    }
    with pytest.raises(CheckpointError, match="no client's adapter fits"):
        aggregated_adapter({key(Part.A): full(0, 2, 3)}, "other", donors)


def samples(count: int) -> list[Sample]:
    return [Sample(sample_id=str(n), task="t", turns=("?", "!")) for n in range(count)]


def test_batches_go_through_all_samples_before_any_comes_again() -> None:
    batches = training_batches(samples(5), 4, 3, seed=1, task="t")
    assert [len(batch) for batch in batches] == [3, 3, 3, 3]
    drawn = [sample.sample_id for batch in batches for sample in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == ["0", "1", "2", "3", "4"]
    assert batches == training_batches(samples(5), 4, 3, seed=1, task="t")
    assert batches != training_batches(samples(5), 4, 3, seed=2, task="t")
    with pytest.raises(DataError, match="no training samples"):
        training_batches([], 1, 1, seed=1, task="t")


def test_numbers_of_updates_are_sorted_and_checked() -> None:
    assert check_updates([20, 0, 5, 5]) == (0, 5, 20)
    for wrong in ([], [-1, 3]):
        with pytest.raises(ConfigError, match="numbers of steps"):
            check_updates(wrong)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny federation, and a scenario with a task that none of its clients has."""
    folder = tmp_path_factory.mktemp("adaptation")
    config = write_world(folder)
    pets = folder / "data/dataset"
    (pets / "New").symlink_to(pets / "Pets1")
    unseen = [
        {
            "client_id": 0,
            "model_id": "small",
            "datasets": [{"dataset": "New", "subset_id": 0, "type": "multi-choice"}],
        }
    ]
    (folder / "data/scenarios/unseen.json").write_text(json.dumps(unseen))
    (folder / "data/scenarios/foreign.json").write_text(
        json.dumps([{**unseen[0], "model_id": "huge"}])
    )
    changes = ("evaluation.base=false", "evaluation.others=false", "learning_rate=0.02")
    experiment = load_experiment(config, changes)
    prepare_run(experiment, folder / "run").execute()
    return folder / "run"


def test_stopping_at_each_number_is_the_same_as_one_uninterrupted_pass(finished: Path) -> None:
    from fedml_plugin_fedmosaic.core.types import View
    from fedml_plugin_fedmosaic.core.work import Pass
    from fedml_plugin_fedmosaic.engine.models import load_model
    from fedml_plugin_fedmosaic.runtime.adaptation import unseen_data
    from fedml_plugin_fedmosaic.runtime.client import EnginePool

    experiment = load_experiment(finished / "config.yaml")
    data = unseen_data(experiment, "unseen")
    bundle = load_model("small", experiment.models["small"], torch.device("cpu"))
    pool = EnginePool(experiment, {"small": bundle}, "pq_lora")
    engine = pool.engine("small")
    start = engine.initial_adapter()
    batches = training_batches(data.clients[0].train[0], 4, 2, seed=1, task="New-0")
    seen: list[dict[AdapterKey, torch.Tensor]] = []

    def score(adapter: dict[AdapterKey, torch.Tensor]) -> float:
        seen.append({name: tensor.clone() for name, tensor in adapter.items()})
        return float(len(seen))

    assert adapt(engine, start, batches, (0, 1, 3, 4), score, seed=5) == {0: 1, 1: 2, 3: 3, 4: 4}
    pass_ = Pass(name="adaptation", view=View.LOCAL, train=frozenset({Branch.LOCAL}), num_steps=4)
    whole: LocalResult = engine.fit(pass_, start, batches, seed=5)
    three: LocalResult = engine.fit(pass_, start, batches[:3], seed=5)
    pool.close()
    assert all(torch.equal(seen[0][name], start[name]) for name in start)
    assert all(torch.equal(seen[2][name], three.adapter[name]) for name in start)
    assert all(torch.equal(seen[3][name], whole.adapter[name]) for name in start)
    changed = {name for name in start if not torch.equal(seen[3][name], start[name])}
    assert changed
    assert {name.branch for name in changed} == {Branch.LOCAL}


def test_a_run_gets_a_file_a_table_and_a_section(finished: Path) -> None:
    said: list[str] = []
    results = adapt_run(finished, "unseen", updates=(0, 2), say=said.append)
    assert [result.task for result in results] == ["New-0"]
    assert set(results[0].scores) == {"aggregated", "fresh"}
    assert set(results[0].scores["fresh"]) == {0, 2}
    assert set(results[0].likelihood) == {"aggregated", "fresh"}
    assert all(0 <= value <= 1 for value in results[0].likelihood.values())
    assert said[0].startswith("New-0: aggregated ")
    # The same again takes the place of what is there, and gives the same.
    assert adapt_run(finished, "unseen", updates=(0, 2)) == results
    tasks = read_adaptations(finished)
    assert len(tasks) == 1
    assert tasks[0].scores == results[0].scores
    table = adaptation_table(tasks)
    assert [row[3] for row in table.rows] == ["aggregated", "fresh"] * 2
    assert table.columns[4:] == ["0 updates\nlikelihood", "0\nupdates", "2\nupdates"]
    page = write_report(finished).read_text()
    assert "<h2>Unseen tasks</h2>" in page


def test_a_model_that_the_run_does_not_have_is_refused(finished: Path) -> None:
    with pytest.raises(ConfigError, match="'huge', which the run does not define"):
        adapt_run(finished, "foreign")
    with pytest.raises(ConfigError, match="not a run folder"):
        adapt_run(finished / "nowhere", "unseen")
    found = adapt_run(finished, "foreign", model="large", updates=(1,))
    assert found[0].model == "large"
