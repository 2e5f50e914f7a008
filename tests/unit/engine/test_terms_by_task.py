"""Distillation terms and probes that are meant for single tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_models import save_text_model, text_samples
from torch.nn import Dropout

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
)
from fedml_plugin_fedmosaic.core.types import Branch, Part, View
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    ModelRef,
    Objective,
    Pass,
    Probe,
    Proximal,
)
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.runtime.worktree import work_from_tree, work_tree

FIRST, SECOND = text_samples(4, "words-0"), text_samples(4, "words-1")
TEACHER = ModelRef(overlay=("t",), view=View.GLOBAL)
TERM = Distillation(weight=2.0, temperature=2.0, teachers=(TEACHER,), tasks=("words-0",))
PASS = Pass(name="p", view=View.LOCAL, train=frozenset({Branch.LOCAL}), num_steps=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_text_model(tmp_path_factory.mktemp("text"), "llama", hidden=16, layers=2)
    bundle = load_model("tiny", ModelSpec(path=str(folder)), torch.device("cpu"))
    made = TorchEngine(
        bundle,
        AdapterConfig(rank=2, alpha=4.0, num_blocks=2, target_modules=("q_proj", "v_proj")),
        "dual_lora",
        OptimConfig(learning_rate=1e-2, batch_size=4),
        EvalConfig(batch_size=8),
        0,
    )
    yield made
    made.close()


@pytest.fixture
def start(engine: TorchEngine) -> dict[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in engine.initial_adapter().items()
    }


def loss(engine: TorchEngine, start: Any, batch: Any, *terms: Distillation) -> float:
    """Of one step; the teacher is the global branch turned round."""
    sets = {"t": {k: -v for k, v in start.items() if k.branch is Branch.GLOBAL}}
    (value,) = engine.fit(replace(PASS, distil=terms), start, [batch], seed=0, sets=sets).losses
    return value


def test_a_term_is_for_samples_of_its_tasks(engine: TorchEngine, start: Any) -> None:
    everywhere = replace(TERM, tasks=())
    task = {batch: loss(engine, start, batch) for batch in (FIRST, SECOND)}
    full = {batch: loss(engine, start, batch, everywhere) for batch in (FIRST, SECOND)}
    assert full[FIRST] > task[FIRST] + 1e-3
    assert full[SECOND] > task[SECOND] + 1e-3
    assert loss(engine, start, FIRST, TERM) == pytest.approx(full[FIRST], rel=1e-6)
    assert loss(engine, start, SECOND, TERM) == pytest.approx(task[SECOND], rel=1e-6)
    # Mixed, in any order: every sample has its own terms, and the step is the mean over all.
    mixed = [*SECOND[:2], *FIRST, *SECOND[2:]]
    expected = (full[FIRST] + task[SECOND]) / 2
    assert loss(engine, start, mixed, TERM) == pytest.approx(expected, rel=1e-5)
    two = (TERM, replace(everywhere, weight=4.0, tasks=("words-1",)))
    expected = (full[FIRST] + 2 * full[SECOND] - task[SECOND]) / 2
    assert loss(engine, start, mixed, *two) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_answers_without_dropout(engine: TorchEngine, start: Any) -> None:
    # B = 0 makes the student deaf to dropout; the teacher is not.
    deaf = {
        key: torch.zeros_like(value) if key.branch is Branch.LOCAL and key.part is Part.B else value
        for key, value in start.items()
    }
    layers = [m for m in engine.adapter.model.modules() if isinstance(m, LoraLayer)]
    before = [dict(layer.lora_dropout.items()) for layer in layers]
    own = replace(PASS, task_weight=0.0, distil=(TERM,))
    sets = {"t": {k: 2.0 * v for k, v in start.items() if k.branch is Branch.GLOBAL}}
    try:
        for layer in layers:
            layer.lora_dropout.update({name: Dropout(0.5) for name in layer.lora_dropout})
        losses = {
            engine.fit(own, deaf, [FIRST], seed=seed, sets=sets).losses[0] for seed in range(3)
        }
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.lora_dropout.update(kept)
    assert len(losses) == 1
    assert losses.pop() > 1e-3


def test_a_probe_shows_a_model_its_tasks_only(engine: TorchEngine, start: Any) -> None:
    models = {"own": ModelRef(), "all": ModelRef()}
    probe = Probe(name="look", models=models, tasks={"own": ("words-1",)})
    seen = engine.probe(probe, start, {}, [*FIRST, *SECOND])
    assert set(seen.losses["own"]) == {"words-1"}
    assert set(seen.losses["all"]) == {"words-0", "words-1"}
    assert seen.losses["own"]["words-1"] == pytest.approx(seen.losses["all"]["words-1"], rel=1e-5)
    assert seen.counts == {"words-0": 4, "words-1": 4}
    alone = engine.probe(replace(probe, models={"all": ModelRef()}), start, {}, [*FIRST, *SECOND])
    assert alone.flops < seen.flops < 2 * alone.flops


def test_work_names_the_sets_that_the_engine_must_have() -> None:
    other = Objective(
        view=View.GLOBAL,
        train=frozenset({Branch.GLOBAL}),
        overlay=("o",),
        proximal=(Proximal(weight=1.0, anchor="a"),),
    )
    work = replace(
        PASS, overlay=("x",), into="x", route={"words-0": "r"}, distil=(TERM,), also=(other,)
    )
    # What is laid over the adapter before the pass begins is in the adapter already.
    assert work.set_names == {"o", "a", "r", "t"}
    probe = Probe(name="look", models={"m": TEACHER, "n": ModelRef(overlay=("x", "y"))})
    assert probe.set_names == {"t", "x", "y"}


def test_tasks_survive_a_checkpoint() -> None:
    work = replace(PASS, distil=(TERM,))
    assert work_from_tree(work_tree(work)) == work
    probe = Probe(name="look", models={"own": TEACHER}, tasks={"own": ("words-1", "words-0")})
    assert work_from_tree(work_tree(probe)) == probe
