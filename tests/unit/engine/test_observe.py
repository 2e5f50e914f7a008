"""What the observer sees of a model, and what it leaves undone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.observe import ActivationObserver

MODULES = ("q_proj", "o_proj", "gate_proj", "down_proj")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["text", "llava"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "text":
        saved, samples = save_text_model(folder, "llama", layers=5), text_samples(3)
    else:
        saved, samples = save_llava(folder, layers=5), image_samples(folder, 3)
    bundle = load_model("m", ModelSpec(path=str(saved)), CPU)
    return bundle, bundle.processor.encode_train(samples)


def num_hooks(bundle):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in bundle.model.modules()
    )


def test_inputs_are_those_of_a_whole_forward_pass(case):
    bundle, batch = case
    seen = {}
    handles = []
    for block, layer in enumerate((1, 4)):
        part = bundle.decoder_layers[layer]
        for name, module in part.named_modules():
            short = name.rpartition(".")[2]
            if short in MODULES:
                handles.append(
                    module.register_forward_hook(
                        lambda _, args, out, key=f"{block}/{short}": seen.update({key: args[0]})
                    )
                )
    with torch.no_grad():
        hidden = bundle.model(**batch, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    hooks = num_hooks(bundle)  # transformers leaves some of its own
    observer = ActivationObserver(bundle, MODULES, 2)
    found = observer.observe(batch, layers=True)
    assert set(found.inputs) == set(seen) == set(observer.targets)
    for key, value in seen.items():
        torch.testing.assert_close(found.inputs[key], value)
        assert observer.targets[key].in_features == value.shape[-1]
    assert len(found.layers) == 5
    # The last of these is after the final norm; the others are the layers' outputs.
    for got, expected in zip(found.layers[:-1], hidden[1:-1], strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(bundle.final_norm(found.layers[-1]), hidden[-1])
    assert num_hooks(bundle) == hooks


def test_nothing_runs_after_the_last_block_end(case, monkeypatch):
    bundle, batch = case

    def fail(*args):
        raise AssertionError("ran for nothing")

    monkeypatch.setattr(bundle.final_norm, "forward", fail)
    monkeypatch.setattr(bundle.model.get_output_embeddings(), "forward", fail)
    monkeypatch.setattr(bundle.last_down_proj, "forward", fail)
    found = ActivationObserver(bundle, MODULES, 1).observe(batch)
    assert set(found.inputs) == {f"0/{name}" for name in MODULES}
    assert found.layers == ()


def test_dropout_is_off_and_no_gradient_is_kept(tmp_path):
    bundle = load_model("m", ModelSpec(path=str(save_text_model(tmp_path))), CPU)
    batch = bundle.processor.encode_train(text_samples(2))
    observer = ActivationObserver(bundle, MODULES, 1)
    calm = observer.observe(batch).inputs
    for layer in bundle.decoder_layers:
        layer.self_attn.attention_dropout = 0.9
    bundle.model.train()
    again = observer.observe(batch).inputs
    for key, value in calm.items():
        assert torch.equal(value, again[key])
        assert not again[key].requires_grad
        assert not again[key].is_inference()  # A is trained on it


def test_models_that_cannot_be_observed_are_named(tmp_path):
    bundle = load_model("mine", ModelSpec(path=str(save_text_model(tmp_path))), CPU)
    with pytest.raises(AdapterError, match=r"model 'mine'.*'c_attn'"):
        ActivationObserver(bundle, ("c_attn",), 1)
    with pytest.raises(AdapterError, match="4 decoder layers has no 5 blocks"):
        ActivationObserver(bundle, MODULES, 5)
    bundle.adapter = object()
    with pytest.raises(AdapterError, match="'mine' carries an adapter"):
        ActivationObserver(bundle, MODULES, 1)
