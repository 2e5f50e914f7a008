"""What the paper's released code gets wrong, each as a test that the wrong behaviour fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_rounds import Member, ModelRounds, load_bundles
from toy_federation import toy_manifest

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import Branch, Part, View
from fedml_plugin_fedmosaic.core.work import LocalResult, ModelRef, Probe, ProbeResult, Samples
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.runtime.client import laid_over
from fedml_plugin_fedmosaic.strategies.tap import Tap
from fedml_plugin_fedmosaic.strategies.tap_options import TapOptions
from fedml_plugin_fedmosaic.strategies.tap_sets import channel_name, key_name, upload_name

KEYS = ("text:words-0", "text:words-1")
SETS = (*KEYS, "shared")
WORDS = [TaskSpec(dataset="words", subset_id=subset).name for subset in (0, 1)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    return load_bundles(tmp_path_factory.mktemp("models"))


@pytest.fixture
def rounds(bundles: Mapping[str, Any]) -> Any:
    optim = {"num_steps": 12, "max_grad_norm": None}
    with ModelRounds("tap", {}, bundles, [Member(), Member()], optim=optim) as made:
        yield made


def federated_pass(rounds: ModelRounds) -> Any:
    """The federated pass of client 0."""
    client = rounds.clients[0]
    (work,) = client.prepare(rounds.downlinks.get(0, {}), rounds.round_idx)
    return work


def fit(rounds: ModelRounds, work: Any, batch: list[Sample]) -> LocalResult:
    """One optimizer step of a pass on one batch."""
    client = rounds.clients[0]
    start = laid_over(client.state, work.overlay)
    one = replace(work, num_steps=1)
    return client.engine.fit(one, start, [batch], seed=0, sets=client.state.sets)


def samples(rounds: ModelRounds, task: int, *indices: int) -> list[Sample]:
    return [rounds.data.clients[0].train[task][index] for index in indices]


def test_a_every_tensor_of_the_aggregate_arrives_or_the_client_refuses(rounds: Any) -> None:
    rounds.play()
    downlink = dict(rounds.downlinks[0])
    client = rounds.clients[0]
    client.prepare(downlink, 1)
    placed = {
        upload_name(key, tensor): value
        for key in SETS
        for tensor, value in client.state.sets[f"f.{key}"].items()
    }
    assert placed.keys() == downlink.keys()
    assert all(torch.equal(placed[name], downlink[name]) for name in placed)
    # Names without their first part, as the released server sends them.
    stripped = {name.partition("/")[2]: value for name, value in downlink.items()}
    with pytest.raises(PlanError, match="client 0 does not fit its adapter sets: unknown 0/"):
        client.prepare(stripped, 1)
    name = next(iter(downlink))
    with pytest.raises(PlanError, match=f"missing {name}"):
        client.prepare({key: value for key, value in downlink.items() if key != name}, 1)


def test_b_answers_depend_on_the_input_and_every_set_learns(rounds: Any) -> None:
    client = rounds.clients[0]
    before = client.state.sets
    rounds.play().play()
    state = client.state
    for key in SETS:
        for tensor, value in state.sets[f"f.{key}"].items():
            assert not torch.equal(value, before[f"f.{key}"][tensor]), (key, tensor)
    model = client.serve("personal", WORDS[0]).model
    probe = Probe(name="look", models={"m": model}, samples=Samples.ROUND, what="logits")
    seen = client.engine.probe(probe, state.adapter, state.sets, samples(rounds, 0, 0, 1))
    first, second = seen.tensors.values()
    assert not torch.allclose(first, second, atol=1e-4)


def test_c_a_replacement_takes_everything_that_belongs_to_the_key(rounds: Any) -> None:
    rounds.play()
    client = rounds.clients[0]
    works = client.prepare(rounds.downlinks[0], 1)
    (probe,) = client.advance({work.name: rounds.work(client, work) for work in works}, 1)
    before = client.state.sets
    losses = {f"{edition}.{key}": {key[5:]: 1.0} for edition in "fp" for key in KEYS}
    losses[f"f.{KEYS[0]}"] = {WORDS[0]: 0.5}
    client.advance({probe.name: ProbeResult(losses=losses, counts=dict.fromkeys(WORDS, 2))}, 1)
    after = client.state.sets
    local = {key for key in client.engine.initial_adapter() if key.branch is Branch.LOCAL}
    assert set(after[f"p.{KEYS[0]}"]) == local
    for tensor in local:
        assert torch.equal(after[f"p.{KEYS[0]}"][tensor], before[f"f.{KEYS[0]}"][tensor])
    assert after[f"p.{KEYS[1]}"] is before[f"p.{KEYS[1]}"]
    # One of two keys is the half that takes the shared adapter along.
    assert all(
        torch.equal(value, before["f.shared"][tensor])
        for tensor, value in after["p.shared"].items()
    )


def test_d_samples_of_a_mixed_batch_take_their_own_keys_path(rounds: Any) -> None:
    work = federated_pass(rounds)
    mixed = fit(rounds, work, samples(rounds, 0, 0, 1) + samples(rounds, 1, 0, 1))
    other = fit(rounds, work, samples(rounds, 0, 0, 1) + samples(rounds, 1, 2, 3))
    turned = fit(rounds, work, samples(rounds, 1, 0, 1) + samples(rounds, 0, 0, 1))
    first, second = (f"f.{key}" for key in KEYS)
    for tensor, value in mixed.sets[first].items():
        # Its neighbours in the batch do not matter, nor who comes first.
        assert torch.equal(value, other.sets[first][tensor])
        assert torch.equal(value, turned.sets[first][tensor])
    changed = [key for key, value in mixed.sets[second].items() if key.part is Part.B]
    assert any(not torch.equal(mixed.sets[second][key], other.sets[second][key]) for key in changed)


def test_e_the_first_cohort_depends_on_the_seed() -> None:
    strategy = Tap(TapOptions())
    manifests = [toy_manifest(client, "S", "lora") for client in range(12)]
    first = {strategy.select(strategy.init(manifests, seed), 0, 3) for seed in range(8)}
    assert len(first) > 4


def test_f_losses_are_not_scaled_by_the_share_of_the_batch(rounds: Any) -> None:
    work = federated_pass(rounds)
    client = rounds.clients[0]
    own = samples(rounds, 0, 0, 1)
    alone = fit(rounds, work, own).task_losses
    crowd = fit(rounds, work, own + samples(rounds, 1, 0, 1, 2, 3, 4, 5)).task_losses
    model = ModelRef(overlay=("f.shared", f"f.{KEYS[0]}"), view=View.SUM)
    probe = Probe(name="look", models={"f": model})
    seen = client.engine.probe(probe, client.state.adapter, client.state.sets, own)
    assert crowd[WORDS[0]] == pytest.approx(alone[WORDS[0]], rel=1e-6)
    assert alone[WORDS[0]] == pytest.approx(seen.losses["f"][WORDS[0]], rel=1e-6)


def test_g_only_adapters_are_trained_and_sent_and_each_is_added_once(rounds: Any) -> None:
    client = rounds.clients[0]
    peft: Any = client.engine.adapter.model
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in peft.named_parameters()
        if "lora_" not in name
    }
    rounds.play()
    for name, parameter in peft.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
    rank = rounds.experiment.adapter.rank
    assert all(rank in tensor.shape for tensor in rounds.uploads[0].values())
    assert len(rounds.uploads[0]) == len(SETS) * len(client.state.sets["f.shared"])
    _added_once(rounds)


def _added_once(rounds: Any) -> None:
    """``W x + s B_sh A_sh x + s B_q A_q x``, written out for one linear."""
    client = rounds.clients[0]
    engine = client.engine
    state = laid_over(client.state, client.serve("regular", WORDS[0]).model.overlay)
    engine.adapter.load(state)
    engine.adapter.set_view(View.SUM)
    engine.adapter.model.eval()
    (name, layer) = next(
        (name, module)
        for name, module in engine.adapter.model.named_modules()
        if name.endswith("layers.1.self_attn.q_proj")
    )
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    want = layer.base_layer(x)
    for branch in (Branch.LOCAL, Branch.GLOBAL):
        A, B = (
            next(v for k, v in state.items() if str(k).endswith(f"/1/q_proj/{branch}/{part}"))
            for part in "AB"
        )
        want = want + 2.0 * (x @ A.T @ B.T)
    assert name
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)


def test_h_names_of_tasks_carry_no_meaning(bundles: Mapping[str, Any]) -> None:
    tricky = ["vqa/2", "vqa", "image-gen:1", "image-gen", "text:1", "shared", "", "a.b", "%3A"]
    names = [key_name(kind, task) for kind in ("text", "image+text") for task in tricky]
    channels = [channel_name("conv", name) for name in [*names, "shared"]]
    assert len(set(channels)) == len(channels)
    assert not any("/" in channel for channel in channels)
    members = [Member(dataset="image generation/vqa: classify"), Member(model="large")]
    with ModelRounds("tap", {}, bundles, members) as rounds:
        rounds.play().play().finalize()
        assert len(rounds.clients[0].state.extra["tap"]["log"]) == 3
