"""What clients are weighted by: the data they have, not the steps that all of them take."""

from __future__ import annotations

import pytest
from model_rounds import Member, ModelRounds, load_bundles

from fedml_plugin_fedmosaic.engine.models import ModelBundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelBundle]:
    return load_bundles(tmp_path_factory.mktemp("weights"))


# In Per-FedAvg the last pass of a round sees only a part of it.
@pytest.mark.parametrize("name", ["fedavg", "fesem", "per_fedavg"])
def test_clients_with_more_samples_weigh_more(name: str, bundles: dict[str, ModelBundle]) -> None:
    options = {"weighting": "num_examples", **({"clusters": 1} if name == "fesem" else {})}
    members = (Member(samples={0: 2}), Member(samples={0: 6}))
    with ModelRounds(name, options, bundles, members, num_rounds=1) as one:
        one.play()
        few, many = (header.num_examples for header in one.headers)
        # 4 steps of 2 samples each; the memory draws what was used least.
        assert (few, many) == (2, 6)
        (row, same) = one.plan.rows["conv"]
    assert dict(zip(row.sources, row.weights, strict=True)) == {0: 0.25, 1: 0.75}
    assert same.weights == row.weights
