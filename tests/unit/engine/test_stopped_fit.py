"""A pass that is stopped and continued, and moments that survive a round: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
)
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterState, Branch, View
from fedml_plugin_fedmosaic.core.work import FitProgress, Pass
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.base import FitStopped
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

TRAINED = frozenset({Branch.LOCAL, Branch.SHARED})
PASS = Pass(name="gated", view=View.GATED, train=TRAINED, num_steps=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text"), "llama")


@pytest.fixture
def make(folder: Path) -> Callable[[str], TorchEngine]:
    def build(moments: str) -> TorchEngine:
        optim = OptimConfig(
            learning_rate=1e-2,
            pq_learning_rate=2e-2,
            schedule="cosine",
            weight_decay=0.1,
            max_grad_norm=0.5,
            moments="keep" if moments == "keep" else "reset",
        )
        bundle = load_model("tiny", ModelSpec(path=str(folder)), torch.device("cpu"))
        adapter = AdapterConfig(rank=4, alpha=8.0, num_blocks=2, dropout=0.2)
        evaluation = EvalConfig(batch_size=8, max_new_tokens=4)
        return TorchEngine(bundle, adapter, "pq_lora", optim, evaluation, 0)

    return build


def batches(shift: int = 0) -> list[list[Sample]]:
    samples = text_samples(12)
    return [[samples[(shift + 4 * step + j) % 12] for j in range(4)] for step in range(6)]


def stop_after(steps: int) -> Callable[[], bool]:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == steps

    return should_stop


def interrupted(engine: TorchEngine, steps: int, progress: FitProgress | None) -> FitProgress:
    with pytest.raises(FitStopped) as caught:
        engine.fit(
            PASS,
            engine.initial_adapter(),
            batches(),
            seed=3,
            progress=progress,
            should_stop=stop_after(steps),
        )
    return caught.value.progress


def same(left: AdapterState, right: AdapterState) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_a_stopped_pass_goes_on_bit_for_bit(
    make: Callable[[str], TorchEngine], moments: str
) -> None:
    engine = make(moments)
    whole = engine.fit(PASS, engine.initial_adapter(), batches(), seed=3)
    engine.close()
    first = interrupted(make(moments), 2, None)
    assert len(first.losses) == 2
    second = interrupted(make(moments), 3, first)
    assert len(second.losses) == 5
    # The engine may have trained another client in between.
    other = make(moments)
    other.fit(PASS, other.initial_adapter(), batches(5), seed=9)
    result = other.fit(PASS, other.initial_adapter(), batches(), seed=3, progress=second)
    assert same(result.adapter, whole.adapter)
    assert (result.losses, result.num_tokens, result.num_examples) == (
        whole.losses,
        whole.num_tokens,
        whole.num_examples,
    )
    assert result.moments.keys() == whole.moments.keys()
    for key, kept in result.moments.items():
        assert kept.step == 6
        assert torch.equal(kept.first, whole.moments[key].first)
        assert torch.equal(kept.second, whole.moments[key].second)


def test_nobody_asks_after_the_last_step(make: Callable[[str], TorchEngine]) -> None:
    engine = make("reset")
    result = engine.fit(
        PASS, engine.initial_adapter(), batches(), seed=3, should_stop=stop_after(6)
    )
    assert len(result.losses) == 6


def test_kept_moments_continue_the_optimizer_across_rounds(
    make: Callable[[str], TorchEngine],
) -> None:
    engine = make("keep")
    first = engine.fit(PASS, engine.initial_adapter(), batches(), seed=3)
    trained = {key for key in first.adapter if key.branch in TRAINED} & set(first.moments)
    assert trained == set(first.moments)
    assert {key.branch for key in trained} == TRAINED
    kept = engine.fit(PASS, first.adapter, batches(1), seed=4, moments=first.moments)
    fresh = engine.fit(PASS, first.adapter, batches(1), seed=4)
    assert {entry.step for entry in kept.moments.values()} == {12}
    assert {entry.step for entry in fresh.moments.values()} == {6}
    assert not same(kept.adapter, fresh.adapter)
    engine.close()
    reset = make("reset")
    ignored = reset.fit(PASS, first.adapter, batches(1), seed=4, moments=first.moments)
    assert same(ignored.adapter, fresh.adapter)
    assert ignored.moments == {}


def test_moments_never_bring_old_weights_back(make: Callable[[str], TorchEngine]) -> None:
    engine = make("keep")
    first = engine.fit(PASS, engine.initial_adapter(), batches(), seed=3)
    replaced = {key: torch.full_like(tensor, 0.01) for key, tensor in first.adapter.items()}
    no_step = replace(PASS, num_steps=0)
    result = engine.fit(no_step, replaced, batches(), seed=3, moments=first.moments)
    assert same(result.adapter, replaced)
    assert {entry.step for entry in result.moments.values()} == {6}


def test_moments_of_another_shape_are_refused(make: Callable[[str], TorchEngine]) -> None:
    engine = make("keep")
    first = engine.fit(PASS, engine.initial_adapter(), batches(), seed=3)
    key = next(iter(first.moments))
    wrong = {key: replace(first.moments[key], first=torch.zeros(3, 5))}
    with pytest.raises(AdapterError, match=r"moments of .*shapes \(3, 5\)"):
        engine.fit(PASS, first.adapter, batches(), seed=3, moments=wrong)
