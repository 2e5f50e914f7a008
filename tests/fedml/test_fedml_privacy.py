"""FedML's own privacy hooks on flat tensors of different shapes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fedml_plugin_fedmosaic.config.privacy import PrivacyConfig
from fedml_plugin_fedmosaic.config.sections import CommonArgs, Experiment
from fedml_plugin_fedmosaic.core.errors import ClientFailure, ConfigError
from fedml_plugin_fedmosaic.core.types import ClientUpdate, UpdateHeader
from fedml_plugin_fedmosaic.integrations.fedml.privacy import make_hooks
from fedml_plugin_fedmosaic.runtime.validation import UpdateShape, check_update

pytestmark = pytest.mark.fedml


@pytest.fixture(scope="module", autouse=True)
def _fedml_is_imported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fedml  # noqa: F401


def hooks_for(**options):
    dp = PrivacyConfig(enable_dp=True, **options)
    return make_hooks(Experiment(common=CommonArgs(random_seed=5), dp=dp))


def update(client_id: int = 0, round_idx: int = 0, size: int = 4000) -> ClientUpdate:
    header = UpdateHeader(client_id=client_id, round_idx=round_idx, num_examples=10)
    tensors = {"pq/0/q_proj/P": torch.ones(size), "conv/1/q_proj/A": torch.ones(3, 2 + client_id)}
    return ClientUpdate(header=header, tensors=tensors)


def norm(tensors) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())


def test_off_means_none():
    assert make_hooks(Experiment()) is None


@pytest.mark.parametrize(
    ("mechanism", "std"),
    [
        # Gaussian: sqrt(2 ln(1.25/delta)) sensitivity / epsilon; Laplace of scale b: b sqrt 2.
        ("gaussian", (2 * np.log(1.25 / 1e-5)) ** 0.5 / 0.5),
        ("laplace", 2**0.5 / (0.5 - np.log(1 - 1e-5))),
    ],
)
def test_local_noise_has_fedmls_size(mechanism, std):
    hooks = hooks_for(dp_solution_type="ldp", mechanism_type=mechanism)
    before = update()
    after = hooks.after_local_training(before)
    noise = after.tensors["pq/0/q_proj/P"] - 1
    assert noise.std() == pytest.approx(std, rel=0.1)
    assert {k: t.shape for k, t in after.tensors.items()} == {
        k: t.shape for k, t in before.tensors.items()
    }
    assert {t.dtype for t in after.tensors.values()} == {torch.float32}
    assert torch.equal(before.tensors["pq/0/q_proj/P"], torch.ones(4000))
    assert after.header == before.header


def test_local_noise_leaves_the_server_side_alone():
    hooks = hooks_for(dp_solution_type="ldp")
    updates = {0: update(0), 1: update(1)}
    for client_id, passed in hooks.before_aggregation(updates).items():
        assert norm(passed.tensors) == norm(updates[client_id].tensors)
    downlink = {0: {"pq/0/q_proj/P": torch.ones(3)}}
    assert torch.equal(hooks.after_aggregation(downlink)[0]["pq/0/q_proj/P"], torch.ones(3))


def test_central_clipping_and_noise_on_different_shapes():
    hooks = hooks_for(dp_solution_type="cdp", clipping_norm=2.0)
    updates = {0: update(0), 1: update(1)}
    assert hooks.after_local_training(updates[0]) == updates[0]
    clipped = hooks.before_aggregation(updates)
    assert sorted(clipped) == [0, 1]
    for client_id, passed in clipped.items():
        assert norm(passed.tensors) == pytest.approx(2.0, rel=1e-3)
        assert norm(updates[client_id].tensors) > 60
        assert passed.header.client_id == client_id
    received = hooks.after_aggregation({1: dict(updates[1].tensors), 0: {}})
    assert received[0] == {}
    noise = received[1]["pq/0/q_proj/P"] - 1
    assert noise.std() == pytest.approx(9.69, rel=0.1)


def test_noise_depends_on_client_and_round_not_on_what_ran_before():
    first = hooks_for(mechanism_type="laplace")
    a = first.after_local_training(update(0, 1, 5)).tensors["pq/0/q_proj/P"]
    other_round = first.after_local_training(update(0, 2, 5)).tensors["pq/0/q_proj/P"]
    other_client = first.after_local_training(update(1, 1, 5)).tensors["pq/0/q_proj/P"]
    torch.manual_seed(99)
    again = hooks_for(mechanism_type="laplace").after_local_training(update(0, 1, 5))
    assert torch.equal(again.tensors["pq/0/q_proj/P"], a)
    assert not torch.equal(other_round, a)
    assert not torch.equal(other_client, a)


def test_global_generators_and_fedmls_own_privacy_object_are_untouched(capsys):
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy

    singleton = FedMLDifferentialPrivacy.get_instance()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    hooks_for().after_local_training(update())
    hooks_for(mechanism_type="laplace").after_local_training(update())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert FedMLDifferentialPrivacy.get_instance() is singleton
    assert not singleton.is_dp_enabled()
    assert capsys.readouterr().out == ""


def test_hooks_are_fedmls_and_in_order(monkeypatch):
    from fedml.core import ClientTrainer, ServerAggregator

    called = []
    for owner, name in (
        (ClientTrainer, "on_before_local_training"),
        (ClientTrainer, "on_after_local_training"),
        (ServerAggregator, "on_before_aggregation"),
        (ServerAggregator, "on_after_aggregation"),
    ):
        stock = getattr(owner, name)

        def spy(*args, _stock=stock, _name=name):
            called.append(_name)
            return _stock(*args)

        monkeypatch.setattr(owner, name, spy)
    hooks = hooks_for()
    downlink = hooks.before_local_training(0, {"conv/0/q_proj/A": torch.ones(2)})
    assert torch.equal(downlink["conv/0/q_proj/A"], torch.ones(2))
    updates = {0: hooks.after_local_training(update())}
    hooks.before_aggregation(updates)
    hooks.after_aggregation({0: downlink})
    assert called == [
        "on_before_local_training",
        "on_after_local_training",
        "on_before_aggregation",
        "on_after_aggregation",
    ]


def test_options_that_fedml_refuses():
    with pytest.raises(ConfigError, match="Epsilon cannot be greater than 1"):
        hooks_for(mechanism_type="gaussian", epsilon=2.0)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_an_update_that_fedmls_noise_breaks_is_refused(mechanism):
    made = update(3)
    noised = hooks_for(mechanism_type=mechanism).after_local_training(made)
    check_update(noised, UpdateShape.of(made))
    # A float32 has no room for noise of this size.
    broken = hooks_for(mechanism_type=mechanism, sensitivity=1e300).after_local_training(made)
    expected = r"client 3, round 1, update: refused: conv/1/q_proj/A holds 15 NaN or infinite"
    with pytest.raises(ClientFailure, match=expected):
        check_update(broken, UpdateShape.of(made))
