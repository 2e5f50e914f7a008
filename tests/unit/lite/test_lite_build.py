from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from lite_pools import made_library

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.lite import LiteSource, load_lite
from fedml_plugin_fedmosaic.data.lite.build import Sizes, build_folder
from fedml_plugin_fedmosaic.data.lite.report import lite_table
from fedml_plugin_fedmosaic.data.lite.scenarios import MIXES, scenarios_of
from fedml_plugin_fedmosaic.data.lite.tasks import Variant, clients_of, tasks_of
from fedml_plugin_fedmosaic.data.stats import stats_table, task_stats
from fedml_plugin_fedmosaic.data.verify import verify

SIZES = Sizes(pretrain=6, train=12, test=12)
VARIANTS: tuple[Variant, ...] = ("full", "packages")


def build(folder: Path, variant: Variant) -> Path:
    build_folder(folder, made_library(), variant, sizes=SIZES, sources=[{"pool": "made up"}])
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def built(request, tmp_path_factory) -> tuple[Variant, Path]:
    variant = request.param
    return variant, build(tmp_path_factory.mktemp("lite") / variant, variant)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(folder: Path, split: str) -> dict[str, list[dict]]:
    return {
        f"{path.parent.parent.name}-{path.stem.rpartition('-')[2]}": json.loads(path.read_text())
        for path in folder.glob(f"dataset/*/{split}/*.json")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_forty_different_tasks_in_drakes_order_and_seven_new_ones(variant):
    tasks = tasks_of(variant)
    seen = [task for task in tasks if task.unseen is None]
    assert len(seen) == len({task.name for task in seen}) == 40
    assert len({task.mirrors for task in seen}) == 40
    assert Counter(task.unseen for task in tasks if task.unseen) == {
        "new visual domain": 4,
        "new task type": 3,
    }
    clients = [[task.mirrors for task in tasks] for tasks in clients_of(variant)]
    assert len(clients) == 10
    # The assignment of the published scenario files.
    assert clients[0] == ["Fashion200K-0", "MagicBrush-0", "VISION-0", "FashionIQ-0"]
    assert clients[3] == ["VizWiz-0", "IRFL-2", "Bongard-HOI-1", "MIT-States-0"]
    assert clients[9] == ["iconqa-0", "Co-Instruct-DB-3", "SEED-Bench-2-0", "WCVQA-2"]
    assert Counter(task.kind for task in seen) == {"multi-choice": 38, "open-ended": 2}


def test_a_folder_is_clean_and_in_the_published_layout(built):
    _, folder = built
    result = verify(folder)
    assert result.problems == ()
    assert result.num_files == 2 * 47
    assert result.num_samples == 47 * 24
    names = {name.rpartition("-")[0] for name in rows(folder, "train")}
    assert len(rows(folder, "pretrain")) == 42
    assert {"Captions", "Words"}.isdisjoint(names)


def test_no_image_is_in_two_audiences(built):
    _, folder = built
    parts = {
        split: {
            name: {image for row in made for image in row["image"]}
            for name, made in rows(folder, split).items()
        }
        for split in ("pretrain", "train", "test")
    }
    seen = {task.name for task in tasks_of(built[0]) if task.unseen is None}
    for name in parts["train"]:
        assert not parts["train"][name] & parts["test"][name], name
    every = {split: set().union(*(found[k] for k in found if k in seen or split == "pretrain"))
             for split, found in parts.items()}  # fmt: skip
    assert not every["pretrain"] & (every["train"] | every["test"])
    assert not every["train"] & every["test"]


def test_answers_are_balanced(built):
    _, folder = built
    for name, made in rows(folder, "test").items():
        counts = Counter(row["conversations"][1]["value"] for row in made)
        assert max(counts.values()) - min(counts.values()) <= 1, name


def test_the_same_pools_give_the_same_bytes_and_replace_a_folder(built, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    (again / "stray").write_text("from before")
    build(again, built[0])
    assert content(again) == content(built[1])
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_scenarios_load_with_every_mix(built):
    variant, folder = built
    for name in scenarios_of(variant):
        data = load_lite(DataConfig(source="drake-lite", root=str(folder), scenario=name))
        assert len(data.clients) == (10 if name in MIXES else len(data.tasks))
    data = load_lite(DataConfig(source="drake-lite", root=str(folder)))
    assert data.name == "heterogeneous"
    models = Counter(client.model_id for client in data.clients)
    assert models == {"lite-llama-small": 4, "lite-llama-large": 6}


def test_statistics_tell_what_is_there(built):
    variant, folder = built
    data = load_lite(DataConfig(source="drake-lite", root=str(folder)))
    first = task_stats(data)[0]
    assert first.name == clients_of(variant)[0][0].name
    assert (first.clients, first.train, first.test, first.images) == ((0,), 12, 12, 3)
    assert first.shared_images == 0
    table = stats_table(data)
    assert len(table.rows) == 40
    assert table.notes[-1] == "No image is in both splits of a task."
    assert len(lite_table(folder).rows) == 47


def test_what_is_not_built_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path))
    config = DataConfig(source="drake-lite")
    with pytest.raises(DataError, match="expected it built") as caught:
        load_lite(config)
    assert "fedmosaic data build drake-lite" in str(caught.value.hint)
    source = LiteSource()
    assert source.missing(config)
    # The scenario is known all the same.
    assert len(source.clients(config)) == 10
    assert source.models(config) == {"lite-llama-small", "lite-llama-large"}
    with pytest.raises(DataError, match="no scenario 'nope'"):
        source.clients(DataConfig(source="drake-lite", scenario="nope"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"name": "drake-lite", "version": "1"}', "expected version 2 of DRAKE-lite, got 1"),
        ("[]", "got no readable one"),
    ],
)
def test_another_version_has_to_be_built_again(tmp_path, content, problem):
    (tmp_path / "build.json").write_text(content)
    config = DataConfig(source="drake-lite", root=str(tmp_path))
    with pytest.raises(DataError, match=problem) as caught:
        load_lite(config)
    assert "fedmosaic data build drake-lite" in str(caught.value.hint)
    assert problem in LiteSource().missing(config)[0]


def test_models_that_were_not_made_are_said(tmp_path, monkeypatch):
    from fedml_plugin_fedmosaic.engine.places import resolve

    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        resolve("a", "cached:drake-lite/a")
    assert "fedmosaic models build-drake-lite" in str(caught.value.hint)
    folder = tmp_path / "models/drake-lite/a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve("a", "cached:drake-lite/a") == str(folder)
