from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from lite_pools import made_library
from tiny_models import save_image

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.data import lite


def call(*args: object):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_image(tmp_path / "p.png", "red")
    turns = [{"value": "<image> which ? Choice list:[cat, dog]."}, {"value": "cat"}]
    for split, count in (("train", 4), ("test", 2)):
        path = tmp_path / f"dataset/Pets/{split}/dataset-0.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([{"image": ["p.png"], "conversations": turns}] * count))
    task = {"dataset": "Pets", "subset_id": 0, "type": "multi-choice"}
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios/one.json").write_text(
        json.dumps([{"client_id": 0, "model_id": "small", "datasets": [task]}])
    )
    return tmp_path


def test_verify_looks_at_a_folder_or_a_scenario(root):
    for what in (root, root / "scenarios/one.json"):
        result = call("data", "verify", what)
        assert result.exit_code == 0, result.output
        assert "6 samples in 2 files, 1 images: all well" in result.output
    (root / "p.png").write_text("broken")
    result = call("data", "verify", root)
    assert result.exit_code == 2
    assert "train/dataset-0.json, sample 3" in result.output
    assert "6 problems in 6 samples" in result.output


def test_stats_and_show(root):
    result = call("data", "stats", root / "scenarios/one.json")
    assert result.exit_code == 0, result.output
    assert "Images in both splits: Pets-0." in result.output
    page = root / "page.html"
    result = call("data", "show", root / "scenarios/one.json", "--out", page, "--samples", 1)
    assert result.exit_code == 0, result.output
    assert page.read_text().count('<div class="sample">') == 1


def test_what_is_neither_scenario_nor_configuration_is_refused(root, tmp_path):
    result = call("data", "stats", "nowhere")
    assert result.exit_code == 2
    assert (
        "expected a configuration (.yaml) or a scenario (.json), got no such file" in result.output
    )
    lonely = tmp_path / "a/b/c/d/s.json"
    lonely.parent.mkdir(parents=True)
    lonely.write_text("[]")
    result = call("data", "show", lonely)
    assert "expected a folder dataset/ beside the scenario" in result.output
    result = call("data", "stats", root / "scenarios/one.json", "--cf", "x.yaml")
    assert "give one of them" in result.output


def test_build_drake_lite_writes_the_folder_and_prints_the_table(tmp_path, monkeypatch):
    from fedml_plugin_fedmosaic.data.lite.build import Sizes

    asked = []

    def pools(variant, say, fetch):
        asked.append((variant, fetch))
        return made_library(), [{"pool": "made up"}]

    real = lite.build_folder
    monkeypatch.setattr(lite, "open_library", pools)
    monkeypatch.setattr(
        lite,
        "build_folder",
        lambda *args, **more: real(*args, **more, sizes=Sizes(pretrain=1, train=4, test=4)),
    )
    out = tmp_path / "lite"
    result = call("data", "build", "drake-lite", "--packages-only", "--offline", "--out", out)
    assert result.exit_code == 0, result.output
    assert asked == [("packages", False)]
    assert json.loads((out / "build.json").read_text())["variant"] == "packages"
    assert "ShapeCount-0" in result.output
    assert "majority" in result.output
    assert str(out) in result.output.splitlines()[-1]
