from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from lite_pools import made_library

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.lite import changes
from fedml_plugin_fedmosaic.data.lite.build import Sizes, build_folder
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.tiny import LITE_ARCHITECTURES
from fedml_plugin_fedmosaic.runtime.lite_pretrain import (
    LiteRecipe,
    build_lite_models,
    read_lite,
    train_lite,
)

RECIPE = LiteRecipe(steps=2, batch_size=6, chunks=2, warmup=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lite") / "lite"
    build_folder(folder, made_library(), "full", sizes=Sizes(pretrain=2, train=2, test=2))
    return folder


def test_a_model_is_trained_saved_and_found_by_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path))
    out = tmp_path / "models" / "drake-lite"
    said: list[str] = []
    build_lite_models(out, folder, recipe=RECIPE, names=["lite-qwen2-small"], log=said.append)
    assert "mean test accuracy" in said[-1]
    card = (out / "lite-qwen2-small/README.md").read_text()
    assert card.count("\n| ") == 47 + 1
    assert "2 steps of" in card
    spec = ModelSpec(path="cached:drake-lite/lite-qwen2-small")
    bundle = load_model("any", spec, torch.device("cpu"))
    data = read_lite(folder)
    # Every word of every split is one token, so that no task is about unknown words.
    unknown = bundle.processor.tokenizer.unk_token_id
    for rows in (*data.pretrain.values(), *data.test.values()):
        assert all(unknown not in bundle.processor.token_ids(row.prompt) for row in rows)
    before = [weight.clone() for weight in bundle.model.parameters()]
    bundle.model.float().requires_grad_(True)
    bundle.model.model.vision_tower.requires_grad_(False)
    loss = train_lite(bundle, data.pretrain, replace(RECIPE, steps=1), 0, said.append)
    assert 0 < loss < 20
    after = list(bundle.model.parameters())
    assert any(not torch.equal(a.half(), b.half()) for a, b in zip(before, after, strict=True))


def test_rates_warm_up_and_decay():
    recipe = LiteRecipe(steps=100, warmup=10, learning_rate=1.0)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert max(recipe.rate(step) for step in range(100)) == recipe.rate(9)
    assert recipe.rate(99) == pytest.approx(0.05, abs=1e-3)


def test_pretraining_says_labels_of_clients_without_showing_them(folder):
    data = read_lite(folder)
    names = {entry["dataset"] for entry in json.loads((folder / "tasks.json").read_text())}
    assert {"GarmentName", "PhotoCommon"} <= names
    captions = {word for row in data.pretrain["Captions-0"] for word in row.answer.split()}
    said = {row.answer for row in data.pretrain["Words-0"]}
    photos = {
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    }
    assert photos <= said
    assert photos.isdisjoint(captions)
    assert {*changes.DEFECTS, *changes.GRADES, "18"} <= said


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"got no readable tasks\.json"):
        build_lite_models(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="no architecture 'huge'"):
        build_lite_models(tmp_path, folder, names=["huge"])
    assert set(LITE_ARCHITECTURES) == {"lite-llama-small", "lite-llama-large", "lite-qwen2-small"}
