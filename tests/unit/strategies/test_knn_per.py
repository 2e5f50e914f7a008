"""kNN-Per: stores of hidden states, on numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_federation import ToyFederation, toy_adapter, toy_manifest

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import ClientContext, ClientState, UpdateHeader, View
from fedml_plugin_fedmosaic.core.work import Probe, ProbeResult, Samples
from fedml_plugin_fedmosaic.engine.mixers import make_mixer
from fedml_plugin_fedmosaic.equations.knn import (
    choose_mixture,
    mixed_log_probabilities,
    neighbour_shares,
)
from fedml_plugin_fedmosaic.strategies.knn_per import (
    KnnFedAvg,
    KnnFedAvgOptions,
    KnnFedMosaic,
    KnnFedMosaicOptions,
)

KEYS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])


def test_shares_fall_with_the_squared_distance() -> None:
    places, shares = neighbour_shares(torch.tensor([[1.0, 0.0]]), KEYS, 3, scale=0.5)
    assert set(places[0, :2].tolist()) == {0, 1}
    assert places[0, 2] == 2
    # Squared distances 1, 1, 17 over width 2 times scale 0.5.
    parts = [math.exp(-1), math.exp(-1), math.exp(-17)]
    torch.testing.assert_close(shares[0], torch.tensor([p / sum(parts) for p in parts]))
    near, whole = neighbour_shares(torch.tensor([[0.0, 3.0]]), KEYS, 1, scale=1.0)
    assert (near.tolist(), whole.tolist()) == ([[2]], [[1.0]])
    # Half precision in the store, no more neighbours than keys, and no query.
    assert neighbour_shares(torch.zeros(1, 2), KEYS.half(), 9, 1.0)[0].shape == (1, 3)
    assert neighbour_shares(torch.zeros(0, 2), KEYS, 2, 1.0)[1].shape == (0, 2)
    with pytest.raises(PlanError, match="among keys"):
        neighbour_shares(torch.zeros(1, 3), KEYS, 1, 1.0)


def test_the_mixture_is_a_weighted_sum_of_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    values = torch.tensor([3, 1, 3])
    mixed = mixed_log_probabilities(
        logits, torch.tensor([[1.0, 0.0]]), KEYS, values, lam=0.25, k=3, scale=0.5
    ).exp()
    store = torch.zeros(4)
    parts = [math.exp(-1), math.exp(-1), math.exp(-17)]
    store[1] = parts[1] / sum(parts)
    store[3] = (parts[0] + parts[2]) / sum(parts)
    expected = 0.25 * store + 0.75 * torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(mixed[0], expected)
    torch.testing.assert_close(mixed.sum(), torch.tensor(1.0))


def test_the_mixture_is_chosen_by_held_out_tokens() -> None:
    model = torch.tensor([0.2, 0.2])
    stores = {2: torch.tensor([1.0, 0.0]), 5: torch.tensor([0.5, 0.5])}
    k, lam, mean = choose_mixture(model, stores, [0.0, 0.5, 0.9])
    assert (k, lam) == (5, 0.9)
    assert mean == pytest.approx(math.log(0.9 * 0.5 + 0.1 * 0.2))
    # A store that knows nothing is not used.
    assert choose_mixture(model, {3: torch.zeros(2)}, [0.6, 0.0])[:2] == (3, 0.0)


class TinyModel:
    """A model of two positions whose hidden states are its inputs."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *, inputs: torch.Tensor, **more: Any) -> SimpleNamespace:
        self.calls.append(more)
        kept = more.get("logits_to_keep", inputs.shape[1])
        logits = torch.zeros(len(inputs), kept, 4)
        return SimpleNamespace(
            logits=logits, hidden_states=(None, inputs), past_key_values="the cache"
        )


def test_a_mixed_model_answers_like_a_model() -> None:
    tensors = {"keys": KEYS.half(), "values": torch.tensor([3, 1, 2])}
    mixer = make_mixer("knn", tensors, {"lam": 0.5, "k": 1.0, "scale": 1.0})
    assert mixer is not None
    model: Any = TinyModel()
    mixed = mixer(model, None)
    hidden = torch.tensor([[[0.0, 9.0], [2.0, 0.1]], [[2.0, 0.0], [0.0, 5.0]]])
    output = mixed(inputs=hidden, logits_to_keep=1, use_cache=True)
    assert output.past_key_values == "the cache"
    assert output.logits.shape == (2, 1, 4)
    assert output.logits[:, 0].argmax(1).tolist() == [1, 2]
    assert output.logits[0, 0].exp().tolist() == pytest.approx([0.125, 0.625, 0.125, 0.125])
    assert mixed(inputs=hidden).logits.argmax(2).tolist() == [[2, 1], [1, 2]]
    assert all(call["output_hidden_states"] for call in model.calls)


def _final(architecture: str, kind: str) -> ClientContext:
    return ClientContext(
        manifest=toy_manifest(0, architecture, kind),
        round_idx=3,
        num_rounds=3,
        num_steps=5,
        seed=0,
        stage="store",
    )


def _seen(values: dict[str, tuple[list[list[float]], tuple[int, ...]]]) -> ProbeResult:
    return ProbeResult(
        losses={"model": {"a": 1.0}},
        counts={"a": len(values)},
        tensors={f"model/{name}": torch.tensor(rows) for name, (rows, _) in values.items()},
        labels={name: tokens for name, (_, tokens) in values.items()},
    )


def _stored(**options: Any) -> tuple[Any, ClientState]:
    """A client with two keys for token 0 and 1, and held-out samples near the first."""
    half = KnnFedAvg(KnnFedAvgOptions(neighbours=(1,), mixing=(0.0, 0.5), **options)).client
    context, adapter = _final("S", "lora"), toy_adapter("S", "lora")
    state = replace(half.init_state(adapter, context), participations=1)
    state, works = half.prepare({}, state, context)
    results = {
        works[0].name: _seen({"a/1": ([[0.0, 0.0]], (0,)), "a/2": ([[9.0, 9.0]], (1,))}),
        works[1].name: _seen({"a/3": ([[0.5, 0.0], [9.0, 8.0]], (0, 1))}),
        works[2].name: _seen({"a/3": ([[0.0, 0.0], [0.0, 0.0]], (0, 1))}),
    }
    state, more = half.advance(results, state, context)
    assert more == ()
    return half, state


def test_a_store_is_made_of_own_samples_and_judged_by_held_out_ones() -> None:
    half, state = _stored()
    assert state.tensors["knn/keys"].tolist() == [[0.0, 0.0], [9.0, 9.0]]
    assert state.tensors["knn/keys"].dtype == torch.float16
    assert state.tensors["knn/values"].tolist() == [0, 1]
    chosen = state.extra["knn"]
    assert (chosen["k"], chosen["lam"], chosen["tokens"]) == (1, 0.5, 2)
    assert chosen["held_out_log_probability"] == pytest.approx(math.log(0.75))
    served = half.serve("local", "any-0", state)
    assert (served.mixer, served.options) == ("knn", {"lam": 0.5, "k": 1.0, "scale": 1.0})
    assert served.model.view is View.LOCAL
    assert half.serve("global", "any-0", state).mixer == ""
    header = UpdateHeader(client_id=0, round_idx=3, num_examples=0)
    update, after = half.finish(None, state, _final("S", "lora"), header)
    assert update.tensors == {}
    assert after == state


def test_a_store_has_a_largest_size() -> None:
    _, state = _stored(store_tokens=1)
    assert state.tensors["knn/values"].tolist() == [0]


def test_a_store_that_does_not_help_is_not_used() -> None:
    half, state = _stored()
    useless = replace(state, extra={"knn": {**state.extra["knn"], "lam": 0.0}})
    assert half.serve("local", "any-0", useless).mixer == ""


def test_the_looks_ask_for_states_before_answers() -> None:
    strategy = KnnFedMosaic(KnnFedMosaicOptions(store_samples=30, held_out_samples=8))
    assert (strategy.needs_held_out, strategy.final_stages) == (True, ("store",))
    half, context = strategy.client, _final("M", "pq_lora")
    state = replace(half.init_state(toy_adapter("M", "pq_lora"), context), participations=2)
    _, works = half.prepare({}, state, context)
    assert all(isinstance(work, Probe) for work in works)
    assert [(work.samples, work.what, work.limit) for work in works] == [
        (Samples.REPLAY, "hidden", 30),
        (Samples.HELD_OUT, "hidden", 8),
        (Samples.HELD_OUT, "logits", 8),
    ]
    assert {work.models["model"].view for work in works} == {View.GATED}


@pytest.mark.parametrize(("under", "took_part", "same"), [
    ("trained", 1, True),
    ("trained", 0, False),
    ("received", 1, False),
])  # fmt: skip
def test_the_model_under_the_store(under: Any, took_part: int, same: bool) -> None:
    half = KnnFedAvg(KnnFedAvgOptions(under=under)).client
    context, adapter = _final("S", "lora"), toy_adapter("S", "lora")
    state = replace(half.init_state(adapter, context), participations=took_part)
    downlink = {key.share_key: torch.zeros_like(tensor) for key, tensor in adapter.items()}
    after, _ = half.prepare(downlink, state, context)
    key = min(adapter)
    assert torch.equal(after.adapter[key], adapter[key]) == same
    assert bool(after.adapter[key].any()) == same


def test_everybody_has_a_store_in_the_end() -> None:
    toy = ToyFederation(KnnFedAvg(KnnFedAvgOptions()), ("S", "M", "S"), per_round=1).play(1)
    toy.finalise()
    assert all("knn/keys" in state.tensors for state in toy.clients.values())
    assert not any(toy.stage_uploads.values())
