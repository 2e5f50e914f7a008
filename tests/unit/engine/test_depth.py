from __future__ import annotations

import json

import pytest
import torch
from families import save_family, save_family_llava
from transformers import AutoModelForCausalLM

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.depth import cut_model, kept_layers
from fedml_plugin_fedmosaic.engine.derived import made_from
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.places import model_folder

CPU = torch.device("cpu")
TEXTS = ("what is the animal in this image ?", "the dog and the cat are good animals")


def test_the_run_that_turns_the_stream_least_goes():
    steps = torch.eye(8)
    states = [steps[0], steps[1], steps[2], steps[2] * 2, steps[2] * 3, steps[3], steps[4]]
    states = [state[None] for state in states]
    assert kept_layers(states, 4) == (0, 1, 4, 5)
    assert kept_layers(states, 6) == tuple(range(6))
    assert kept_layers([steps[:1]] * 5, 2) == (0, 3)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "smollm3", "gpt-neox"])
def test_a_cut_model_is_the_original_without_those_layers(tmp_path, name):
    source = save_family(tmp_path / "whole", name)
    report = cut_model("m", source, 3, tmp_path / "cut", TEXTS)
    assert report.layers == 4
    assert len(report.kept) == 3
    assert {0, 3} <= set(report.kept)
    cut = load_model("m", ModelSpec(path=str(tmp_path / "cut")), CPU)
    whole = load_model("m", ModelSpec(path=str(source)), CPU)
    assert cut.num_layers == 3
    for index, kept in enumerate(report.kept):
        theirs = whole.decoder_layers[kept].state_dict()
        for key, value in cut.decoder_layers[index].state_dict().items():
            assert torch.equal(value, theirs[key])
    types = getattr(whole.model.config, "layer_types", None)
    if types:
        assert cut.model.config.layer_types == [types[kept] for kept in report.kept]
    assert report.parameters == (whole.info.num_parameters, cut.info.num_parameters)
    ids = torch.tensor([[3, 7, 11, 5]])
    assert cut.model(ids, use_cache=True).logits.isfinite().all()


def test_cuts_are_deterministic_and_keep_the_dtype(tmp_path):
    source = save_family(tmp_path / "whole", "qwen3")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    first = cut_model("m", source, 2, tmp_path / "a", TEXTS)
    assert first == cut_model("m", source, 2, tmp_path / "b", TEXTS)
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").dtype == torch.bfloat16
    )


def test_image_text_models_are_cut_in_their_text_tower(tmp_path):
    source = save_family_llava(tmp_path / "whole", "qwen2")
    cut_model("m", source, 2, tmp_path / "cut", TEXTS)
    cut = load_model("m", ModelSpec(path=str(tmp_path / "cut")), CPU)
    assert cut.num_layers == 2
    assert len(cut.model.model.vision_tower.encoder.layers) == 2


def test_a_configurations_cut_is_made_once_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    source = save_family(tmp_path / "whole", "llama")
    spec = ModelSpec(path=str(source), layers=2)
    folder = model_folder("m", spec)
    before = (tmp_path / "cache/models").stat().st_mtime_ns
    assert model_folder("m", spec) == folder
    assert (tmp_path / "cache/models").stat().st_mtime_ns == before
    manifest = made_from(tmp_path / "cache/models" / folder.rpartition("/")[2])
    assert manifest["report"]["kept"] == json.loads(json.dumps([0, 3]))
    assert load_model("m", spec, CPU).num_layers == 2


@pytest.mark.parametrize("keep", [1, 5])
def test_impossible_cuts_are_refused(tmp_path, keep):
    source = save_family(tmp_path / "whole", "llama")
    with pytest.raises(ConfigError, match=r"has 4 decoder layers; expected to keep 2 to 4"):
        cut_model("m", source, keep, tmp_path / "cut", TEXTS)


def test_texts_without_tokens_are_refused(tmp_path):
    source = save_family(tmp_path / "whole", "llama")
    with pytest.raises(ConfigError, match="hold no token"):
        cut_model("m", source, 2, tmp_path / "cut", ("", "cat"))
