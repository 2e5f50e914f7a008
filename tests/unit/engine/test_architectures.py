"""Any causal language model or LLaVA-like model: parts, adapters, training, exact sketches."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, INNER, LAYERS, TOWERS, save_family, save_family_llava
from tiny_models import image_samples, text_samples

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
    SketchConfig,
)
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import Pass
from fedml_plugin_fedmosaic.data.base import TaskSpec
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

CPU = torch.device("cpu")
PLAIN = {"llama", "llama-tied", "mistral", "qwen2", "qwen3", "smollm3", "phi3"}
ADAPTER = AdapterConfig(rank=2, alpha=4.0, num_blocks=2, target_modules=("all-linear",))
OPTIM = OptimConfig(learning_rate=1e-2, pq_learning_rate=1e-2, batch_size=4)
TASK = TaskSpec(dataset="words", subset_id=0, kind="multi-choice")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    made = {}

    def get(name, kind=save_family):
        key = (name, kind)
        if key not in made:
            made[key] = kind(root / f"{kind.__name__}-{name}", name)
        return made[key]

    return get


def load(folder, **options):
    return load_model("tiny", ModelSpec(path=str(folder), **options), CPU)


def autograd(bundle, samples):
    """True gradient of the mean loss over all supervised tokens, in float64."""
    model = bundle.model.double()
    weight = bundle.last_down_proj.weight.requires_grad_(True)
    batch = bundle.processor.encode_train(samples)
    labels = batch.pop("labels")
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    logits = model(**batch).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
    gradient = weight.grad.float()
    weight.requires_grad_(False)
    weight.grad = None
    model.float()
    return gradient


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_are_found_by_structure(folders, name):
    bundle = load(folders(name))
    assert bundle.num_layers == LAYERS
    assert len(bundle.decoder_layers) == LAYERS
    assert bundle.down_proj_name == FAMILIES[name].down
    assert bundle.last_down_proj.in_features == INNER


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sketchs_gradient_is_autograds(folders, name):
    bundle = load(folders(name))
    samples = text_samples(4)
    sketcher = SketchEngine(bundle, SketchConfig(), 0)
    assert sketcher._is_plain == (name in PLAIN)
    actual = sketcher.gradient(samples)
    expected = autograd(bundle, samples)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "pq_lora"])
def test_clients_train_and_are_scored(folders, name, adapter):
    bundle = load(folders(name))
    engine = TorchEngine(
        bundle, ADAPTER, adapter, OPTIM, EvalConfig(mode="likelihood", batch_size=4), 0
    )
    adapted = {key.module for key in engine.initial_adapter()}
    assert adapted == set(FAMILIES[name].linears)
    samples = text_samples(4)
    view = View.LOCAL if adapter == "lora" else View.GATED
    branches = frozenset({Branch.LOCAL} if adapter == "lora" else {Branch.LOCAL, Branch.SHARED})
    pass_ = Pass(name="local", view=view, train=branches, num_steps=8)
    result = engine.fit(pass_, engine.initial_adapter(), [samples] * 8, seed=0)
    assert result.losses[-1] < result.losses[0]
    score = engine.evaluate(result.adapter, view, samples, TASK)
    assert score.num_samples == 4
    engine.close()


@pytest.mark.parametrize("name", TOWERS)
def test_image_text_models_with_any_tower(folders, tmp_path, name):
    bundle = load(folders(name, save_family_llava))
    assert bundle.num_layers == LAYERS
    samples = image_samples(tmp_path, 3)
    actual = SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
    expected = autograd(bundle, samples)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_half_precision_sketches_agree(folders, name):
    exact = SketchEngine(load(folders(name)), SketchConfig(), 0).gradient(text_samples(4))
    half = SketchEngine(load(folders(name), dtype="bfloat16"), SketchConfig(), 0)
    cosine = torch.cosine_similarity(half.gradient(text_samples(4)).flatten(), exact.flatten(), 0)
    assert cosine > 0.98


def test_attention_with_capped_scores_is_never_the_fused_one(folders):
    assert load(folders("gemma2")).model.config._attn_implementation == "eager"
    assert load(folders("llama")).model.config._attn_implementation == "sdpa"
    assert load(folders("llama"), attention="eager").model.config._attn_implementation == "eager"


def test_a_model_without_chat_template_gets_a_plain_one(tmp_path):
    bundle = load(save_family(tmp_path, "llama", template=False))
    sample = text_samples(1)[0]
    ids = bundle.processor.encode_prompt([sample])["input_ids"][0].tolist()
    text = bundle.processor.tokenizer.decode(ids)
    assert text.startswith("<|bos|>")
    assert "is :" in text
    answer = bundle.processor.encode_choices(sample, ["cat"])[0].tolist()
    assert answer[-1] == bundle.processor.tokenizer.eos_token_id
    assert answer[-1] in bundle.processor.end_ids
    whole = bundle.processor.encode_train([sample])
    assert whole["input_ids"][0, len(ids) : len(ids) + len(answer)].tolist() == answer
    supervised = whole["labels"][0][whole["labels"][0] != -100].tolist()
    assert supervised == answer
