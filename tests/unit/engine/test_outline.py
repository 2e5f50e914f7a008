from __future__ import annotations

import pytest
import torch
from tiny_models import save_text_model

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.outline import outline_model


@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_an_outline_says_what_the_loaded_model_says(model, tmp_path):
    spec = ModelSpec(path=str(save_text_model(tmp_path / model, model, hidden=32, layers=4)))
    outline = outline_model("mine", spec)
    assert outline == load_model("mine", spec, torch.device("cpu")).info
    assert outline.num_parameters > 0


def test_a_bundled_model_with_a_vision_tower():
    spec = ModelSpec(path="bundled:llama-small", size="tiny")
    assert outline_model("small", spec) == load_model("small", spec, torch.device("cpu")).info


def test_an_outline_needs_no_weights(tmp_path):
    folder = save_text_model(tmp_path / "model", "llama")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert outline_model("mine", ModelSpec(path=str(folder))).num_layers > 0


def test_a_damaged_configuration_is_named(tmp_path):
    folder = save_text_model(tmp_path / "model", "llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="model 'mine' cannot be loaded from"):
        outline_model("mine", ModelSpec(path=str(folder)))
