"""Passes with more than the task loss, probes and ensembles, against references made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import save_text_model, text_samples
from torch.nn import functional

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
)
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import (
    Distillation,
    ModelRef,
    Objective,
    Pass,
    Probe,
    Proximal,
)
from fedml_plugin_fedmosaic.data.base import TaskSpec
from fedml_plugin_fedmosaic.engine.base import FitStopped
from fedml_plugin_fedmosaic.engine.losses import cross_entropy
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

L, G = Branch.LOCAL, Branch.GLOBAL
PLAIN = Pass(name="p", view=View.LOCAL, train=frozenset({L}), num_steps=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = save_text_model(tmp_path_factory.mktemp("text"), "llama", hidden=16, layers=2)
    return load_model("tiny", ModelSpec(path=str(folder)), torch.device("cpu"))


@pytest.fixture
def engine(bundle):
    config = AdapterConfig(rank=2, alpha=4.0, num_blocks=2, target_modules=("q_proj", "v_proj"))
    made = TorchEngine(
        bundle,
        config,
        "dual_lora",
        OptimConfig(learning_rate=1e-2, batch_size=2),
        EvalConfig(batch_size=8, max_new_tokens=3),
        0,
    )
    yield made
    made.close()


def scrambled(engine: TorchEngine, seed: int) -> dict[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in engine.initial_adapter().items()
    }


def branch(state: Any, which: Branch) -> dict[Any, torch.Tensor]:
    return {key: value for key, value in state.items() if key.branch is which}


def twins(state: Any, source: Branch, target: Branch) -> dict[Any, torch.Tensor]:
    return {replace(k, branch=target): v.clone() for k, v in branch(state, source).items()}


BATCHES = [text_samples(12)[start : start + 4] for start in (0, 4)]


def equal(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_plain_objective_is_plain_training(engine: TorchEngine) -> None:
    start = scrambled(engine, 1)
    plain = engine.fit(PLAIN, start, BATCHES, seed=0)
    # A term of weight 0 makes the pass go the other way.
    rich = replace(PLAIN, proximal=(Proximal(weight=0.0, anchor="a"),))
    sets = {"a": branch(start, G)}
    result = engine.fit(rich, start, BATCHES, seed=0, sets=sets)
    assert not rich.is_plain
    for key, value in plain.adapter.items():
        torch.testing.assert_close(result.adapter[key], value, rtol=1e-5, atol=1e-6)
    assert result.losses == pytest.approx(plain.losses, rel=1e-5)
    assert result.flops == plain.flops > 0
    assert result.task_losses == pytest.approx(plain.task_losses, rel=1e-5)


def test_flops_count_two_and_four_per_parameter_and_token(engine: TorchEngine) -> None:
    inputs, _, _ = engine._bundle.processor.encode_supervised(BATCHES[0][:2])
    other, _, _ = engine._bundle.processor.encode_supervised(BATCHES[0][2:])
    tokens = inputs["input_ids"].numel() + other["input_ids"].numel()
    result = engine.fit(replace(PLAIN, num_steps=1), scrambled(engine, 1), BATCHES, seed=0)
    assert result.flops == 6 * tokens * engine.info.num_parameters


def first_gradient(engine: TorchEngine, start: Any, pass_: Pass, **given: Any) -> Any:
    """AdamW's first moment after one step is a tenth of the gradient."""
    kept = TorchEngine.fit
    stopped: dict[str, Any] = {}
    try:
        kept(
            engine,
            replace(pass_, num_steps=2),
            start,
            BATCHES,
            seed=0,
            should_stop=lambda: True,
            **given,
        )
    except FitStopped as stop:
        stopped["moments"] = stop.progress.moments
    return {key: entry.first / 0.1 for key, entry in stopped["moments"].items()}


def logits(engine: TorchEngine, view: View) -> tuple[torch.Tensor, torch.Tensor, Any]:
    inputs, positions, _ = engine._bundle.processor.encode_supervised(BATCHES[0])
    engine.adapter.set_view(view)
    given = {key: value for key, value in inputs.items() if key != "labels"}
    output = engine.adapter.model(**given, use_cache=False, logits_to_keep=positions).logits
    return output.float(), inputs["labels"].index_select(1, positions + 1), (inputs, positions)


def test_proximal_gradient(engine: TorchEngine) -> None:
    start = scrambled(engine, 2)
    plain = first_gradient(engine, start, PLAIN)
    term = Proximal(weight=0.25, anchor="start", branch=L, anchor_branch=G)
    pulled = first_gradient(
        engine, start, replace(PLAIN, proximal=(term,)), sets={"start": branch(start, G)}
    )
    for key, value in branch(start, L).items():
        gap = value - start[replace(key, branch=G)]
        torch.testing.assert_close(pulled[key], plain[key] + 0.5 * gap, rtol=1e-4, atol=1e-5)


def test_distillation_gradient_and_the_loss_that_is_reported(engine: TorchEngine) -> None:
    start = scrambled(engine, 3)
    term = Distillation(weight=2.0, temperature=2.0, teachers=(ModelRef(view=View.GATED),))
    pass_ = replace(PLAIN, task_weight=0.5, distil=(term,))
    found = first_gradient(engine, start, pass_)
    reported = engine.fit(replace(pass_, num_steps=1), start, BATCHES, seed=0).losses[0]
    engine.adapter.load(start)
    engine.adapter.set_trainable({L})
    with torch.no_grad():
        teacher, targets, _ = logits(engine, View.GATED)
    student, _, (inputs, positions) = logits(engine, View.LOCAL)
    kl = functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none"
    ).sum(-1)
    mask = targets != -100
    per_sample = (kl * mask).sum(1) / mask.sum(1)
    engine.adapter.set_view(View.LOCAL)
    task = cross_entropy(engine.adapter.model, inputs, positions)
    loss = (0.5 * task + 2.0 * per_sample).mean()
    loss.backward()
    assert reported == pytest.approx(loss.item(), rel=1e-5)
    for key, parameter in engine.adapter.parameters().items():
        if key.branch is L:
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-5)
    engine.adapter.model.zero_grad(set_to_none=True)


def test_received_logits_teach_like_the_model_that_made_them(engine: TorchEngine) -> None:
    start = scrambled(engine, 4)
    samples = [sample for batch in BATCHES for sample in batch]
    seen = engine.probe(
        Probe(name="t", models={"t": ModelRef(view=View.GLOBAL)}, what="logits"),
        start,
        {},
        samples,
    )
    live = Distillation(weight=1.0, temperature=3.0, teachers=(ModelRef(view=View.GLOBAL),))
    sent = replace(live, teachers=(), targets="t")
    first = engine.fit(replace(PLAIN, task_weight=0.0, distil=(live,)), start, BATCHES, seed=0)
    second = engine.fit(
        replace(PLAIN, task_weight=0.0, distil=(sent,)),
        start,
        BATCHES,
        seed=0,
        tensors=seen.tensors,
    )
    for key, value in first.adapter.items():
        torch.testing.assert_close(second.adapter[key], value, rtol=1e-4, atol=1e-5)


def test_objectives_of_two_branches_do_not_touch_each_other(engine: TorchEngine) -> None:
    start = scrambled(engine, 5)
    other = Objective(view=View.GLOBAL, train=frozenset({G}))
    both = engine.fit(replace(PLAIN, also=(other,)), start, BATCHES, seed=0)
    alone_l = engine.fit(PLAIN, start, BATCHES, seed=0)
    alone_g = engine.fit(
        replace(PLAIN, view=View.GLOBAL, train=frozenset({G})), start, BATCHES, seed=0
    )
    for key, value in both.adapter.items():
        expected = (alone_l if key.branch is L else alone_g).adapter[key]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="same branch"):
        engine.fit(
            replace(PLAIN, also=(replace(other, train=frozenset({L})),)), start, BATCHES, seed=0
        )


def test_routed_sets_learn_from_their_own_task_only(engine: TorchEngine) -> None:
    start = scrambled(engine, 6)
    first, second = text_samples(8, "words-0"), text_samples(8, "words-1")
    mixed = [[*first[i : i + 2], *second[i : i + 2]] for i in (0, 4)]
    sets = {"a": branch(scrambled(engine, 7), L), "b": branch(scrambled(engine, 8), L)}
    pass_ = replace(PLAIN, route={"words-0": "a", "words-1": "b"})
    result = engine.fit(pass_, start, mixed, seed=0, sets=sets)
    assert equal(result.adapter, start)
    assert sorted(result.task_losses) == ["words-0", "words-1"]
    # Half of the batch: the gradient is halved, and AdamW does not see a factor (but for epsilon).
    alone = engine.fit(PLAIN, {**start, **sets["a"]}, [batch[:2] for batch in mixed], seed=0)
    for key, value in result.sets["a"].items():
        torch.testing.assert_close(value, alone.adapter[key], rtol=1e-3, atol=1e-4)
    assert not equal(result.sets["b"], sets["b"])


def test_a_stopped_pass_with_sets_goes_on_bit_for_bit(engine: TorchEngine) -> None:
    start = scrambled(engine, 9)
    sets = {"a": branch(scrambled(engine, 7), L), "t": branch(scrambled(engine, 8), G)}
    pass_ = replace(
        PLAIN,
        view=View.SUM,
        train=frozenset({L, G}),
        route={"words-0": "a"},
        distil=(Distillation(weight=1.0, teachers=(ModelRef(overlay=("t",), view=View.GLOBAL),)),),
    )
    whole = engine.fit(pass_, start, BATCHES, seed=3, sets=sets)
    with pytest.raises(FitStopped) as stop:
        engine.fit(pass_, start, BATCHES, seed=3, sets=sets, should_stop=lambda: True)
    later = engine.fit(pass_, start, BATCHES, seed=3, sets=sets, progress=stop.value.progress)
    assert equal(later.adapter, whole.adapter)
    assert equal(later.sets["a"], whole.sets["a"])
    assert (later.losses, later.task_losses, later.flops) == (
        whole.losses,
        whole.task_losses,
        whole.flops,
    )


def test_teachers_under_a_set_leave_the_student_alone(engine: TorchEngine) -> None:
    start = scrambled(engine, 1)
    term = Distillation(weight=0.0, teachers=(ModelRef(overlay=("t",), view=View.GATED),))
    sets = {"t": scrambled(engine, 2)}
    rich = engine.fit(replace(PLAIN, distil=(term,)), start, BATCHES, seed=0, sets=sets)
    plain = engine.fit(PLAIN, start, BATCHES, seed=0)
    for key, value in plain.adapter.items():
        torch.testing.assert_close(rich.adapter[key], value, rtol=1e-4, atol=1e-6)
    with pytest.raises(AdapterError, match="no adapter set 'u'"):
        engine.fit(
            replace(PLAIN, distil=(replace(term, teachers=(ModelRef(overlay=("u",)),)),)),
            start,
            BATCHES,
            seed=0,
            sets=sets,
        )


def test_an_ensemble_trains_and_answers_with_the_sum_of_logits(engine: TorchEngine) -> None:
    start = scrambled(engine, 4)
    pass_ = replace(PLAIN, view=View.ENSEMBLE, train=frozenset({L, G}), num_steps=1)
    found = first_gradient(engine, start, pass_)
    engine.adapter.load(start)
    engine.adapter.set_trainable({L, G})
    one, targets, _ = logits(engine, View.LOCAL)
    other, _, _ = logits(engine, View.GLOBAL)
    token = functional.cross_entropy(
        (one + other).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view_as(targets)
    (token.sum(1) / (targets != -100).sum(1)).mean().backward()
    for key, parameter in engine.adapter.parameters().items():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-5)
    engine.adapter.model.zero_grad(set_to_none=True)
    task = TaskSpec(dataset="words", subset_id=0, kind="multi-choice")
    same = {**branch(start, L), **twins(start, L, G)}
    for mode in ("generate", "likelihood"):
        engine._evaluation = replace(engine._evaluation, mode=mode)
        samples = text_samples(12)
        # Twice the same logits rank and generate as once.
        alone = engine.evaluate(same, View.LOCAL, samples, task)
        assert engine.evaluate(same, View.ENSEMBLE, samples, task) == alone


def test_a_probe_tells_losses_per_model_and_task(engine: TorchEngine) -> None:
    start, sets = scrambled(engine, 1), {"s": branch(scrambled(engine, 2), L)}
    samples = [*text_samples(5, "words-0"), *text_samples(3, "words-1")]
    models = {"own": ModelRef(), "set": ModelRef(overlay=("s",)), "g": ModelRef(view=View.GLOBAL)}
    probe = Probe(name="p", models=models, what="hidden")
    seen = engine.probe(probe, start, sets, samples)
    assert seen.counts == {"words-0": 5, "words-1": 3}
    engine.adapter.load({**start, **sets["s"]})
    engine.adapter.set_view(View.LOCAL)
    inputs, positions, _ = engine._bundle.processor.encode_supervised(samples[:5])
    with torch.no_grad():
        expected = float(cross_entropy(engine.adapter.model, inputs, positions).mean())
    assert seen.losses["set"]["words-0"] == pytest.approx(expected, rel=1e-5)
    assert seen.losses["own"] != seen.losses["set"]
    sample = samples[0]
    hidden = seen.tensors[f"own/{sample.key}"]
    assert hidden.shape == (len(seen.labels[sample.key]), 16)


def test_dual_lora_matches_the_reference_layers() -> None:
    from pathlib import Path

    import numpy as np
    from peft import LoraConfig
    from torch import nn

    from fedml_plugin_fedmosaic.adapters.dual_lora import DualLoraHandle
    from fedml_plugin_fedmosaic.adapters.handle import wrap

    arrays = np.load(Path(__file__).parents[2] / "golden/dual_layers.npz", allow_pickle=False)
    for kind, pair in (("dual", (2, 1)), ("triple", (2, 3))):
        read = {
            name.removeprefix(f"{kind}/"): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith(f"{kind}/") and arrays[name].dtype == np.float64
        }
        model = nn.Sequential(nn.Linear(10, 9)).double()
        rank = 3
        added = {
            b: (
                read[f"lora{b}/y"]
                - torch.nn.functional.linear(
                    read["x"], read["param/base_layer.weight"], read["param/base_layer.bias"]
                )
            )
            for b in (1, 2)
        }
        product = (read["x"] @ read["param/lora2_A.default.weight"].T) @ read[
            "param/lora2_B.default.weight"
        ].T
        scaling = float((added[2] / product).median())
        config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"])
        peft = wrap(model, config, "local")
        peft.add_adapter("global", config)
        layer = model[0].double()
        handle = DualLoraHandle(peft, {(0, 0, "0"): layer})
        with torch.no_grad():
            layer.base_layer.weight.copy_(read["param/base_layer.weight"])
            layer.base_layer.bias.copy_(read["param/base_layer.bias"])
            for side, number in zip((L, G), pair, strict=True):
                for part in ("A", "B"):
                    factor = getattr(layer, f"lora_{part}")[side.value].weight
                    factor.copy_(read[f"param/lora{number}_{part}.default.weight"])
        expected = {View.GATED: read["gate/y"], View.LOCAL: read["lora2/y"]}
        if kind == "dual":
            expected[View.GLOBAL] = read["lora1/y"]
        for view, wanted in expected.items():
            handle.set_view(view)
            torch.testing.assert_close(layer(read["x"]), wanted, rtol=0, atol=1e-9)
        handle.set_view(View.BASE)
        base = torch.nn.functional.linear(
            read["x"], read["param/base_layer.weight"], read["param/base_layer.bias"]
        )
        torch.testing.assert_close(layer(read["x"]), base, rtol=0, atol=1e-12)
        handle.set_view(View.SUM)
        gated = expected[View.GATED]
        torch.testing.assert_close(layer(read["x"]) - base, 2 * (gated - base), rtol=0, atol=1e-9)
