from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO

import pytest
from click.testing import CliRunner

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.registry import DATASETS, SOURCES
from fedml_plugin_fedmosaic.data import text_files
from fedml_plugin_fedmosaic.data.metrics import parse_choices
from fedml_plugin_fedmosaic.data.text_files import BASE_URL, TEXT_SETS, read_rows
from fedml_plugin_fedmosaic.data.text_tasks import (
    TEXT_TASKS,
    BuildOptions,
    build_text_tasks,
    default_root,
)

SMALL = BuildOptions(train=6, test=3, public=2, max_words=8)


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDMOSAIC_DATA_SOURCES", raising=False)


def text_of(name, index):
    if name in ("amazon", "agnews"):
        return f"Title: headline {name} {index}\nText: body {name} {index}\n"
    return f"Text: {name} number {index}" if name == "sst2" else f"{name} number {index}"


@pytest.fixture
def sources(tmp_path):
    """All data sets as one file of lines, 40 rows to train and 16 to test each."""
    path = tmp_path / "sources" / "classification10.jsonl"
    path.parent.mkdir()
    lines = []
    for name, item in TEXT_SETS.items():
        for split, count in (("train", 40), ("test", 16)):
            for index in range(count):
                label = item.labels[(index // 4) % len(item.labels)]
                text = text_of(name, f"{split}{index}")
                lines.append({"task": name, "split": split, "text": text, "label": label})
    lines.append({"task": "mnli", "split": "train", "text": "unlabelled", "label": "-"})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path.parent


def rows_of(root, task, split):
    source, _, subset = task.rpartition("-")
    path = root / "dataset" / source / split / f"dataset-{subset}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_every_task_is_a_multi_choice_task_with_its_answers_on_offer(tmp_path, sources, name):
    build_text_tasks(tmp_path / "out", [name], SMALL, sources=sources)
    for split in ("train", "test", "public"):
        rows = rows_of(tmp_path / "out", name, split)
        assert rows
        for row in rows:
            prompt, answer = (turn["value"] for turn in row["conversations"])
            assert parse_choices(prompt, answer) == TEXT_TASKS[name].choices
            assert answer in TEXT_TASKS[name].choices


def test_the_parts_of_a_task_and_tasks_of_one_set_share_no_text(tmp_path, sources):
    built = build_text_tasks(tmp_path, options=replace(SMALL, train=99, test=99), sources=sources)
    assert [task.name for task, _ in built] == list(TEXT_TASKS)
    seen = {}
    for task, counts in built:
        for split, count in counts.items():
            rows = rows_of(tmp_path, task.name, split)
            assert len(rows) == count > 0
            for row in rows:
                number = row["conversations"][0]["value"].split("\n")[1].split()[-1]
                key = (task.source, number.rstrip("."))
                assert seen.setdefault(key, (task.name, split)) == (task.name, split)


def test_long_texts_are_cut_where_their_end_does_not_decide(tmp_path, sources):
    options = replace(SMALL, max_words=2)
    build_text_tasks(tmp_path, ["sst2-0"], options, sources=sources)
    prompt = rows_of(tmp_path, "sst2-0", "train")[0]["conversations"][0]["value"]
    assert "\nsst2 number ...\n" in prompt
    with pytest.raises(DataError, match="wic-0: no row has at most 2 words"):
        build_text_tasks(tmp_path, ["wic-0"], options, sources=sources)


def test_reviews_become_opinions_without_the_neutral_ones(tmp_path, sources):
    build_text_tasks(tmp_path, ["amazon-1"], replace(SMALL, train=99), sources=sources)
    answers = {row["conversations"][1]["value"] for row in rows_of(tmp_path, "amazon-1", "train")}
    assert answers == {"negative", "positive"}


def test_building_again_gives_the_same_files_and_says_where_they_are_from(tmp_path, sources):
    first, second = tmp_path / "a", tmp_path / "b"
    for root in (first, second):
        build_text_tasks(root, ["cb-0", "rte-0"], SMALL, sources=sources)
    for path in first.rglob("*.json"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
    origin = json.loads((first / "origin.json").read_text())
    assert origin["tasks"]["cb-0"]["licence"] == TEXT_SETS["cb"].licence
    assert set(origin["tasks"]) == {"cb-0", "rte-0"}


def test_the_repositorys_own_files_are_read(tmp_path):
    folder = tmp_path / "CL_Benchmark" / "SC" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps([{"sentence": "Text: fine", "label": "Good"}]))
    rows = read_rows(TEXT_SETS["sst2"], "test", tmp_path, print)
    assert [(row.text, row.label) for row in rows] == [("Text: fine", "Good")]
    with pytest.raises(DataError, match="got neither"):
        read_rows(TEXT_SETS["sst2"], "train", tmp_path, print)
    (folder / "test.json").write_text("[{]")
    with pytest.raises(DataError, match="expected labelled texts"):
        read_rows(TEXT_SETS["sst2"], "test", tmp_path, print)
    (folder / "test.json").write_text("[]")
    with pytest.raises(DataError, match="expected rows of sst2"):
        read_rows(TEXT_SETS["sst2"], "test", tmp_path, print)


def test_downloads_are_kept_and_their_sums_checked(tmp_path, monkeypatch):
    fetched = []

    def urlopen(request, timeout):
        fetched.append(request.full_url)
        return BytesIO(json.dumps([{"sentence": "Text: x", "label": "Bad"}]).encode())

    monkeypatch.setattr(text_files.urllib.request, "urlopen", urlopen)
    for _ in range(2):
        assert len(read_rows(TEXT_SETS["sst2"], "train", None, print)) == 1
    assert fetched == [f"{BASE_URL}CL_Benchmark/SC/SST-2/train.json"]
    path = next((tmp_path / "cache/downloads").rglob("train.json"))
    path.write_text("[]")
    with pytest.raises(DataError, match="expected SHA-256"):
        read_rows(TEXT_SETS["sst2"], "train", None, print)


def test_without_internet_the_folder_is_named(monkeypatch):
    def urlopen(request, timeout):
        raise OSError("no route")

    monkeypatch.setattr(text_files.urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match="cannot be fetched: no route") as raised:
        read_rows(TEXT_SETS["cb"], "train", None, print)
    assert "FEDMOSAIC_DATA_SOURCES" in (raised.value.hint or "")


def test_the_data_set_needs_the_tasks_to_be_built(tmp_path, sources, monkeypatch):
    scenario = tmp_path / "scenario.json"
    task = {"dataset": "cb", "subset_id": 0, "type": "multi-choice"}
    scenario.write_text(json.dumps([{"client_id": 0, "model_id": "m", "datasets": [task]}]))
    config = DataConfig(source="text", scenario=str(scenario))
    source = SOURCES["text"]()
    assert "expected them in" in source.missing(config)[0]
    assert source.models(config) is None
    with pytest.raises(DataError, match="expected them in"):
        DATASETS["text"](config)
    monkeypatch.setenv("FEDMOSAIC_DATA_SOURCES", str(sources))
    said = []
    assert source.fetch(config, None, said.append) == default_root()
    assert any(line.startswith("cb-0:") for line in said)
    assert not source.missing(config)
    assert source.models(config) == {"m"}
    assert len(DATASETS["text"](config).clients[0].train[0]) == 32
    with pytest.raises(DataError, match="leave --repo out"):
        source.fetch(config, "a/b", said.append)


def test_the_command_builds_what_is_named(tmp_path, sources):
    out = tmp_path / "out"
    options = ["--out", str(out), "--sources", str(sources), "--train", "4", "--public", "1"]
    done = CliRunner().invoke(cli, ["data", "build", "text-tasks", "agnews-1", *options])
    assert done.exit_code == 0, done.output
    assert "agnews-1   topic      4 train, 8 test, 1 public" in done.output
    assert "headline" in rows_of(out, "agnews-1", "train")[0]["conversations"][0]["value"]
    wrong = CliRunner().invoke(cli, ["data", "build", "text-tasks", "nothing-0", *options])
    assert wrong.exit_code == 2
    assert "no text task 'nothing-0'" in wrong.output
