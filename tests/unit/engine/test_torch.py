from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
    SketchConfig,
)
from fedml_plugin_fedmosaic.core.errors import AdapterError, ConfigError, RegistryError
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import Pass
from fedml_plugin_fedmosaic.data.base import TaskSpec
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.engine.stepping import rate_factor
from fedml_plugin_fedmosaic.engine.torch import NonFiniteLossError, TorchEngine

CPU = torch.device("cpu")
TASK = TaskSpec(dataset="words", subset_id=0, kind="multi-choice")
PASSES = {
    "lora": Pass(name="sft", view=View.LOCAL, train=frozenset({Branch.LOCAL}), num_steps=6),
    "pq_lora": Pass(
        name="local",
        view=View.GATED,
        train=frozenset({Branch.LOCAL, Branch.SHARED}),
        num_steps=6,
    ),
}
ADAPTER = AdapterConfig(rank=4, alpha=8.0, num_blocks=2)
FAST = OptimConfig(learning_rate=1e-2, pq_learning_rate=2e-2, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("text"), "llama")


@pytest.fixture
def bundle(folder):
    return load_model("tiny", ModelSpec(path=str(folder)), CPU)


@pytest.fixture(params=["lora", "pq_lora"])
def name(request):
    return request.param


def make(bundle, name, *, optim=FAST, seed=0, adapter=ADAPTER, **evaluation):
    evaluation = {"batch_size": 8, "max_new_tokens": 4, **evaluation}
    return TorchEngine(bundle, adapter, name, optim, EvalConfig(**evaluation), seed)


def batches_of(size=4, count=6):
    samples = text_samples(12)
    return [[samples[(k * size + j) % 12] for j in range(size)] for k in range(count)]


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], msg=str(key), **tolerance)


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_fit_learns_and_counts(bundle, name):
    engine = make(bundle, name)
    start = engine.initial_adapter()
    seen = []
    pass_ = replace(PASSES[name], num_steps=40)
    result = engine.fit(
        pass_, start, batches_of() * 7, seed=0, on_step=lambda *args: seen.append(args)
    )
    assert len(result.losses) == 40
    assert result.losses[-1] < 0.6 * result.losses[0]
    assert result.num_examples == 160
    assert result.num_tokens == 320  # one word and the end-of-turn token each
    assert result.duration_s > 0
    assert seen == [(step, 40) for step in range(1, 41)]
    assert all(tensor.dtype == torch.float32 for tensor in result.adapter.values())
    assert_same(engine.initial_adapter(), start)


def test_only_the_trained_branches_change(bundle):
    engine = make(bundle, "pq_lora")
    start = engine.initial_adapter()
    local_only = replace(PASSES["pq_lora"], view=View.LOCAL, train=frozenset({Branch.LOCAL}))
    moved = changed(start, engine.fit(local_only, start, batches_of(), seed=0).adapter)
    assert moved
    assert {key.branch for key in moved} == {Branch.LOCAL}
    global_only = replace(local_only, view=View.GLOBAL, train=frozenset({Branch.GLOBAL}))
    moved = changed(start, engine.fit(global_only, start, batches_of(), seed=0).adapter)
    assert moved
    assert {key.branch for key in moved} == {Branch.GLOBAL}


def test_the_same_seed_gives_the_same_result_whatever_ran_before(bundle, name):
    config = AdapterConfig(rank=4, num_blocks=2, dropout=0.3)
    engine = make(bundle, name, adapter=config)
    start = engine.initial_adapter()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = engine.fit(PASSES[name], start, batches_of(), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    engine.evaluate(first.adapter, View.LOCAL, text_samples(3), TASK)
    again = engine.fit(PASSES[name], start, batches_of(), seed=1)
    other = engine.fit(PASSES[name], start, batches_of(), seed=2)
    assert_same(first.adapter, again.adapter, rtol=0, atol=0)
    assert first.losses == again.losses
    assert first.losses != other.losses


def test_micro_batches_do_not_change_the_step(bundle, name):
    engine = make(bundle, name)
    start = engine.initial_adapter()
    whole = engine.fit(PASSES[name], start, batches_of(), seed=0)
    engine.close()
    cut = make(bundle, name, optim=replace(FAST, batch_size=3))
    parts = cut.fit(PASSES[name], start, batches_of(), seed=0)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    assert parts.num_tokens == whole.num_tokens


def test_the_loss_is_the_mean_over_samples_of_their_mean_token_loss(bundle):
    samples = list(text_samples(2))
    samples[1] = replace(samples[1], turns=(samples[1].prompt, "red and blue and green fish"))
    expected = []
    for sample in samples:
        batch = bundle.processor.encode_train([sample])
        with torch.no_grad():
            expected.append(float(bundle.model(**batch).loss))
    engine = make(bundle, "lora")  # B starts at zero, so the first loss is the base model's
    pass_ = replace(PASSES["lora"], num_steps=1)
    result = engine.fit(pass_, engine.initial_adapter(), [samples], seed=0)
    assert result.losses[0] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_learning_rates_belong_to_groups_and_follow_the_pass(bundle):
    engine = make(bundle, "pq_lora", optim=replace(FAST, learning_rate=1e-4, pq_learning_rate=1e-2))
    start = engine.initial_adapter()
    pass_ = replace(PASSES["pq_lora"], num_steps=1)
    one = engine.fit(pass_, start, batches_of(), seed=0).adapter
    half = engine.fit(replace(pass_, lr_scale=0.5), start, batches_of(), seed=0).adapter
    for key in changed(start, one):
        # The first AdamW step has the size of the learning rate.
        step = float((one[key] - start[key]).abs().max())
        assert step == pytest.approx(1e-4 if key.part in ("A", "B") else 1e-2, rel=0.05)
        assert float((half[key] - start[key]).abs().max()) == pytest.approx(step / 2, rel=0.05)


def test_a_cosine_schedule_warms_up_and_decays():
    factors = [rate_factor("cosine", step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.05
    assert rate_factor("cosine", 0, 1) == 1.0
    assert rate_factor("constant", 3, 20) == 1.0


def test_gradients_are_clipped_on_request(bundle):
    # With AdamW a tiny norm shrinks steps only through epsilon, so it must be very tiny.
    engine = make(bundle, "lora", optim=replace(FAST, max_grad_norm=1e-9))
    start = engine.initial_adapter()
    pass_ = replace(PASSES["lora"], num_steps=1)
    clipped = engine.fit(pass_, start, batches_of(), seed=0).adapter
    assert max(float((clipped[key] - start[key]).abs().max()) for key in start) < 5e-3


def test_a_non_finite_loss_names_the_step(bundle):
    engine = make(bundle, "lora", optim=replace(FAST, learning_rate=1e30))
    with pytest.raises(NonFiniteLossError, match=r"at step \d of 6; lower optim"):
        engine.fit(PASSES["lora"], engine.initial_adapter(), batches_of(), seed=0)


def test_a_pass_that_trains_nothing_is_refused(bundle):
    engine = make(bundle, "lora")
    pass_ = replace(PASSES["lora"], train=frozenset())
    with pytest.raises(AdapterError, match=r"'sft' .*trains nothing"):
        engine.fit(pass_, engine.initial_adapter(), batches_of(), seed=0)


def test_an_unknown_loss_is_refused(bundle):
    engine = make(bundle, "lora")
    pass_ = replace(PASSES["lora"], loss="cross_entropie")
    with pytest.raises(RegistryError, match="did you mean 'cross_entropy'"):
        engine.fit(pass_, engine.initial_adapter(), batches_of(), seed=0)


def test_a_round_without_samples_changes_nothing(bundle, name):
    engine = make(bundle, name)
    start = engine.initial_adapter()
    result = engine.fit(PASSES[name], start, [], seed=0)
    assert_same(result.adapter, start, rtol=0, atol=0)
    assert (result.losses, result.num_examples, result.num_tokens) == ((), 0, 0)


def test_layouts_tell_who_can_be_mixed_with_whom(tmp_path, bundle):
    wide = load_model(
        "wide", ModelSpec(path=str(save_text_model(tmp_path / "w", "qwen2", hidden=48))), CPU
    )
    twin = load_model("twin", ModelSpec(path=str(save_text_model(tmp_path / "t", seed=9))), CPU)
    layouts = {}
    for key, model in (("base", bundle), ("wide", wide), ("twin", twin)):
        engine = make(model, "pq_lora")
        layouts[key] = engine.layouts()
        engine.close()
    assert layouts["base"] == layouts["twin"]
    assert set(layouts["base"]) == {"pq", "conv"}
    assert layouts["base"]["pq"] == layouts["wide"]["pq"]
    assert layouts["base"]["conv"] != layouts["wide"]["conv"]
    other_rank = make(bundle, "pq_lora", adapter=replace(ADAPTER, rank=2)).layouts()
    assert other_rank["pq"] != layouts["base"]["pq"]
    plain = make(twin, "lora").layouts()
    assert set(plain) == {"conv"}


def test_close_gives_the_untouched_base_model_back(bundle, name):
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    inputs = bundle.processor.encode_prompt(text_samples(2))
    with torch.no_grad():
        expected = bundle.model(**inputs).logits
    for _ in range(2):
        engine = make(bundle, name)
        assert bundle.adapter is engine.adapter
        engine.fit(PASSES[name], engine.initial_adapter(), batches_of(), seed=0)
        engine.close()
        engine.close()
        after = bundle.model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert bundle.adapter is None
        assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
        with torch.no_grad():
            assert torch.equal(bundle.model(**inputs).logits, expected)
    with pytest.raises(AdapterError, match="is closed"):
        engine.evaluate(None, View.BASE, text_samples(2), TASK)


def test_adapters_of_both_kinds_take_turns_on_a_bundle(bundle):
    first = make(bundle, "lora")
    with pytest.raises(AdapterError, match="already carries an adapter"):
        make(bundle, "pq_lora")
    first.close()
    second = make(bundle, "pq_lora")
    result = second.fit(PASSES["pq_lora"], second.initial_adapter(), batches_of(), seed=0)
    assert len(result.losses) == 6


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_training_raises_the_score_of_the_trained_task(bundle, name, mode):
    engine = make(bundle, name, mode=mode)
    samples = text_samples(8)
    always_cat = [replace(s, turns=(s.prompt, "cat"), sample_id=s.sample_id + "c") for s in samples]
    view = PASSES[name].view
    base = engine.evaluate(None, view, always_cat, TASK)
    pass_ = replace(PASSES[name], num_steps=30)
    result = engine.fit(pass_, engine.initial_adapter(), [always_cat] * 30, seed=0)
    trained = engine.evaluate(result.adapter, view, always_cat, TASK)
    assert trained.value == 1.0
    assert (trained.metric, trained.num_samples, trained.task) == ("accuracy", 8, "words-0")
    # The base model is the base model still, and unaffected by what is loaded.
    assert engine.evaluate(None, view, always_cat, TASK) == base
    assert engine.evaluate(engine.initial_adapter(), View.LOCAL, always_cat, TASK) == base


def test_views_give_different_models(bundle):
    engine = make(bundle, "pq_lora")
    samples = text_samples(8)
    cat = [replace(s, turns=(s.prompt, "cat")) for s in samples]
    local = replace(
        PASSES["pq_lora"], view=View.LOCAL, train=frozenset({Branch.LOCAL}), num_steps=30
    )
    trained = engine.fit(local, engine.initial_adapter(), [cat] * 30, seed=0).adapter
    assert engine.evaluate(trained, View.LOCAL, cat, TASK).value == 1.0
    assert engine.evaluate(trained, View.GLOBAL, cat, TASK).value < 1.0


@pytest.mark.parametrize("metric", ["F1", "RougeL", None])
def test_open_ended_tasks_are_generated_in_either_mode(bundle, metric):
    engine = make(bundle, "lora", mode="likelihood")
    samples = [replace(s, turns=("hello ?", "red and blue")) for s in text_samples(4)]
    task = TaskSpec(dataset="words", subset_id=0, kind="open-ended", metric=metric)
    pass_ = replace(PASSES["lora"], num_steps=30)
    result = engine.fit(pass_, engine.initial_adapter(), [samples] * 30, seed=0)
    score = engine.evaluate(result.adapter, View.LOCAL, samples, task)
    assert score.value == pytest.approx(1.0)
    assert score.metric == (metric or "RougeL")


def test_an_unknown_metric_and_an_empty_test_set(bundle):
    engine = make(bundle, "lora")
    bleu = TaskSpec(dataset="words", subset_id=0, metric="BLEU")
    with pytest.raises(ConfigError, match="expected F1, Judge, Bleu-1"):
        engine.evaluate(None, View.BASE, text_samples(1), bleu)
    empty = engine.evaluate(None, View.BASE, (), TASK)
    assert empty.num_samples == 0
    assert empty.value != empty.value


def test_images_are_learned_from(tmp_path, name):
    save_llava(tmp_path / "model", "qwen2")
    bundle = load_model("tiny", ModelSpec(path=str(tmp_path / "model")), CPU)
    samples = image_samples(tmp_path, 6)
    engine = make(bundle, name)
    pass_ = replace(PASSES[name], num_steps=60)
    result = engine.fit(pass_, engine.initial_adapter(), [samples] * 60, seed=0)
    assert result.losses[-1] < 0.7 * result.losses[0]
    task = TaskSpec(dataset="colours", subset_id=0, kind="multi-choice")
    score = engine.evaluate(result.adapter, pass_.view, samples, task)
    assert score.value > 0.5


def test_a_sketch_of_a_model_that_trains_is_the_base_models(bundle, name):
    samples = text_samples(3)
    expected = SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
    engine = make(bundle, name)
    result = engine.fit(PASSES[name], engine.initial_adapter(), batches_of(), seed=0)
    before = engine.evaluate(result.adapter, View.LOCAL, samples, TASK)
    actual = SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
    torch.testing.assert_close(actual, expected)
    assert engine.evaluate(result.adapter, View.LOCAL, samples, TASK) == before


def test_the_input_gate_trains_and_answers_alike_in_any_batch(bundle):
    config = replace(ADAPTER, gate="input")
    samples = text_samples(6)
    task = replace(TASK, kind="open-ended")
    scores = []
    for size in (1, 6):
        engine = make(bundle, "pq_lora", adapter=config, batch_size=size)
        result = engine.fit(PASSES["pq_lora"], engine.initial_adapter(), batches_of(), seed=0)
        score = engine.evaluate(result.adapter, View.GATED, samples, task)
        scores.append(score.value)
        engine.close()
    assert scores[0] == scores[1]
    ranking = make(bundle, "pq_lora", adapter=config, mode="likelihood")
    cat = [replace(sample, turns=(sample.prompt, "cat")) for sample in samples]
    pass_ = replace(PASSES["pq_lora"], num_steps=30)
    trained = ranking.fit(pass_, ranking.initial_adapter(), [cat] * 30, seed=0).adapter
    assert ranking.evaluate(trained, View.GATED, cat, TASK).value == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_stay_float32_over_a_base_of_lower_precision(folder, name, dtype):
    bundle = load_model("tiny", ModelSpec(path=str(folder), dtype=dtype), CPU)
    engine = make(bundle, name)
    result = engine.fit(PASSES[name], engine.initial_adapter(), batches_of(), seed=0)
    assert result.losses[-1] < result.losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in result.adapter.values())
    assert 0 <= engine.evaluate(result.adapter, View.LOCAL, text_samples(4), TASK).value <= 1
    assert SketchEngine(bundle, SketchConfig(), 0).gradient(text_samples(2)).isfinite().all()


@pytest.mark.parametrize("broken", [{"rank": 33}, {"num_blocks": 5}, {"target_modules": ("qkv",)}])
def test_an_adapter_that_does_not_fit_leaves_the_bundle_usable(bundle, broken):
    with pytest.raises(AdapterError):
        make(bundle, "pq_lora", adapter=replace(ADAPTER, **broken))
    assert bundle.adapter is None
    make(bundle, "pq_lora").close()


def test_a_prompt_without_choices_is_wrong_and_an_empty_choice_is_none(bundle):
    (sample,) = text_samples(1)
    engine = make(bundle, "lora", mode="likelihood")
    none = replace(sample, turns=("what is this ?", "cat"))
    assert engine.evaluate(None, View.BASE, [none], TASK).value == 0.0
    trailing = replace(sample, turns=("what is this ? Choice list:[cat, ].", "cat"))
    assert engine.evaluate(None, View.BASE, [trailing], TASK).value == 1.0
