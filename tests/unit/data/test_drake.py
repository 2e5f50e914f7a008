from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_image

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data import drake
from fedml_plugin_fedmosaic.data.drake import load_drake


def row(number: int, images: object = None, question: str = "what ?", answer: str = "cat") -> dict:
    entry = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
    }
    return entry if images is None else {**entry, "image": images}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def task(name: str, subset: int = 0, **more: object) -> dict:
    return {"dataset": name, "subset_id": subset, "type": "multi-choice", **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    picture = "dataset/Pets/images/a.png"
    save_image(tmp_path / picture, "red")
    for split, count in (("train", 6), ("test", 3)):
        write(
            tmp_path / f"dataset/Pets/{split}/dataset-0.json",
            [row(k, [picture, picture], "<image> and <image> ?") for k in range(count)],
        )
        write(
            tmp_path / f"dataset/Pets/{split}/dataset-1.json",
            [row(k, picture, "<image> ?") for k in range(count)],
        )
        write(tmp_path / f"dataset/Words/{split}/dataset-0.json", [row(k) for k in range(count)])
    write(
        tmp_path / "scenarios/two.json",
        [
            {"client_id": 0, "model_id": "small", "datasets": [task("Pets"), task("Words")]},
            {
                "client_id": 1,
                "model_id": "large",
                "datasets": [task("Pets"), task("Pets", 1), {"dataset": "dummy", "subset_id": 0}],
            },
        ],
    )
    return tmp_path


def load(root: Path, scenario: str = "two", **more: object):
    return load_drake(DataConfig(source="drake", root=str(root), scenario=scenario, **more))


def set_rows(root: Path, rows: object, split: str = "train", name: str = "Words") -> Path:
    path = root / f"dataset/{name}/{split}/dataset-0.json"
    write(path, rows)
    return path


def test_the_published_layout_is_read(root):
    data = load(root)
    assert data.name == "two"
    assert [client.client_id for client in data.clients] == [0, 1]
    assert [client.model_id for client in data.clients] == ["small", "large"]
    assert set(data.tasks) == set(data.test) == {"Pets-0", "Pets-1", "Words-0"}
    assert data.tasks["Pets-0"].kind == "multi-choice"
    assert [len(samples) for samples in data.clients[0].train] == [6, 6]
    sample = data.clients[1].train[1][0]
    assert sample.images == (root / "dataset/Pets/images/a.png",)
    assert (sample.sample_id, sample.prompt, sample.answer) == ("r0", "<image> ?", "cat")
    assert len(data.clients[0].train[0][0].images) == 2
    assert data.clients[0].train[1][0].images == ()


def test_a_dummy_task_is_a_time_slot_without_data(root):
    data = load(root)
    assert data.clients[1].tasks[2].dataset == "dummy"
    assert data.clients[1].train[2] == ()
    assert "dummy-0" not in data.tasks


def test_each_file_is_read_once(root, monkeypatch):
    opened = []
    original = drake._read_rows
    monkeypatch.setattr(
        drake, "_read_rows", lambda path, task: opened.append(path) or original(path, task)
    )
    data = load(root)
    assert len(opened) == len(set(opened)) == 6
    assert data.clients[0].train[0] is data.clients[1].train[0]


def test_long_conversations_are_kept_for_training_and_cut_for_testing(root):
    turns = [{"value": text} for text in ("a", "b", "c", "d")]
    set_rows(root, [{"conversations": turns}])
    set_rows(root, [{"conversations": turns}], "test")
    data = load(root)
    assert data.clients[0].train[1][0].turns == ("a", "b", "c", "d")
    assert data.test["Words-0"][0].turns == ("a", "b")


def test_upper_bounds_keep_a_fixed_random_subset_in_file_order(root):
    set_rows(root, [row(k) for k in range(100)])
    first = load(root, max_train_samples=10, max_test_samples=2)
    ids = [int(sample.sample_id[1:]) for sample in first.clients[0].train[1]]
    assert len(ids) == 10
    assert ids == sorted(ids)
    assert ids != list(range(10))
    assert len(first.test["Words-0"]) == 2
    assert first == load(root, max_train_samples=10, max_test_samples=2)


def test_rows_with_the_same_id_stay_distinct(root):
    set_rows(root, [row(1), row(1), {"conversations": row(1)["conversations"]}])
    ids = [sample.sample_id for sample in load(root).clients[0].train[1]]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (row(7, ["x.png"]), r"sample 2 \(id 'r7'\): expected as many <image> marks as images, got"),
        (row(7, "x.png", "<image>"), r"sample 2 \(id 'r7'\): expected image file 'x.png'"),
        (row(7, None, "<image>"), "got 1 marks, 0 images"),
        (row(7, 3), "'image' to be a path or a list of paths, got int 3"),
        (row(7, answer=" "), "expected an answer in turn 1, got an empty text"),
        ({"id": 7}, r"sample 2 \(id 7\): expected 'conversations' to be a list, got nothing"),
        ({"conversations": [{"value": "a"}]}, "user and assistant turns in pairs, got 1 turns"),
        ({"conversations": [{"value": "a"}, {}]}, "a text under 'value' in turn 1"),
        ("text", "sample 2: expected an object, got str 'text'"),
    ],
)
def test_a_wrong_sample_is_named_with_file_and_index(root, bad, expected):
    path = set_rows(root, [row(0), row(1), bad])
    with pytest.raises(DataError, match=expected) as caught:
        load(root)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_five_problems_of_a_file_are_reported_together(root):
    set_rows(root, [row(k, answer="") for k in range(8)])
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert "8 wrong samples" in message
    assert message.count("expected an answer") == 5
    assert "and 3 more" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [('[{"a": 1},\n', ":2: expected valid JSON"), ("[]", "at least one sample"), ("{}", "a list")],
)
def test_a_broken_sample_file_is_named(root, content, expected):
    set_rows(root, content)
    with pytest.raises(DataError, match=expected):
        load(root)


def test_a_file_that_is_not_utf8_is_named(root):
    path = root / "dataset/Words/train/dataset-0.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="UTF-8 text, got byte 0xff"):
        load(root)


def test_a_missing_sample_file_names_the_task(root):
    (root / "dataset/Words/test/dataset-0.json").unlink()
    with pytest.raises(DataError, match="task 'Words-0': expected file"):
        load(root)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s[1].update(client_id=2), "position 1: expected client_id 1, got 2"),
        (lambda s: s[1].update(client_id=True), "position 1: expected client_id 1, got True"),
        (lambda s: s[1].pop("model_id"), "position 1: expected a field 'model_id', got none"),
        (lambda s: s[0].update(modelid="x"), "got modelid"),
        (lambda s: s[0].update(datasets=[]), "datasets to be a list of tasks"),
        (lambda s: s[0]["datasets"][0].update(subset_id="0"), "subset_id to be a number"),
        (lambda s: s[0]["datasets"][0].update(type="mc"), "expected type in multi-choice"),
        (lambda s: s[0]["datasets"][0].update(metric="f"), "expected metric in F1"),
        (lambda s: s[0]["datasets"][0].update(dataset="../x"), "a folder's name"),
        (lambda s: s[0]["datasets"].append(task("Pets")), "each task once, got Pets-0 twice"),
        (lambda s: s[1]["datasets"][0].update(metric="F1"), "type and metric of Pets-0"),
        (lambda s: s.clear(), "at least one client"),
        (lambda s: s.append(3), "position 2: expected an object, got int"),
    ],
)
def test_a_wrong_scenario_is_refused(root, change, expected):
    path = root / "scenarios/two.json"
    scenario = json.loads(path.read_text())
    change(scenario)
    write(path, scenario)
    with pytest.raises(DataError, match=expected) as caught:
        load(root)
    assert str(path) in str(caught.value)


def test_a_missing_scenario_lists_the_known_ones(root):
    with pytest.raises(DataError, match=r"known scenarios: .*\btwo\b"):
        load(root, "tow")


@pytest.mark.parametrize(
    ("root_name", "expected"),
    [(None, "no root is set"), ("nowhere", "expected a folder, got nothing")],
)
def test_a_missing_root_is_named(tmp_path, root_name, expected):
    chosen = None if root_name is None else str(tmp_path / root_name)
    with pytest.raises(DataError, match=expected):
        load_drake(DataConfig(source="drake", root=chosen, scenario="two"))


def test_a_root_without_dataset_folder_is_explained(tmp_path):
    with pytest.raises(DataError, match="the folder above dataset/"):
        load(tmp_path)
