"""The quickstart federation: rows, splits and the built folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.config.sections import DataConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import FederatedData, Sample
from fedml_plugin_fedmosaic.data.metrics import parse_choices
from fedml_plugin_fedmosaic.data.quickstart import load_quickstart
from fedml_plugin_fedmosaic.data.quickstart.build import TEST_ROWS, TRAIN_ROWS, ensure_built
from fedml_plugin_fedmosaic.data.quickstart.tasks import (
    BY_NAME,
    CAPTION_WORDS,
    TASKS,
    UNSEEN,
    captions,
    coarse,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> FederatedData:
    return load_quickstart(DataConfig(root=str(cache)))


def all_samples(data: FederatedData) -> list[Sample]:
    train = [s for client in data.clients for rows in client.train for s in rows]
    return train + [s for rows in data.test.values() for s in rows]


def test_federation_is_as_promised(data: FederatedData) -> None:
    assert len(data.clients) >= 8
    assert len(data.tasks) >= 6
    assert len({task.dataset for task in data.tasks.values()}) == 3
    multi_image = {s.task for rows in data.test.values() for s in rows if len(s.images) > 1}
    assert len(multi_image) >= 3
    assert {len(rows) for client in data.clients for rows in client.train} == {TRAIN_ROWS}
    assert {len(rows) for rows in data.test.values()} == {TEST_ROWS}


def test_groups_span_architectures_and_share_signatures(data: FederatedData) -> None:
    groups: dict[str, list[str]] = {}
    for client in data.clients:
        (group,) = {task.dataset for task in client.tasks}
        groups.setdefault(group, []).append(client.model_id)
    assert {model.split("-")[0] for model in groups["Digits"]} == {"llama", "qwen2"}
    assert all(len(set(models)) >= 2 for models in groups.values())
    counts = [Counter(models) for models in groups.values()]
    assert any(2 in count.values() for count in counts)
    assert any(1 in count.values() for count in counts)
    assert len({client.model_id for client in data.clients}) == 4


def test_clients_of_one_task_have_different_rows(data: FederatedData) -> None:
    owners: dict[str, list[set[str]]] = {}
    for client in data.clients:
        for task, rows in zip(client.tasks, client.train, strict=True):
            owners.setdefault(task.name, []).append({row.sample_id for row in rows})
    assert all(len(sets) == 2 for sets in owners.values())
    assert all(not first & second for first, second in owners.values())


def test_train_and_test_images_are_disjoint(data: FederatedData) -> None:
    train = {p.name for c in data.clients for rows in c.train for s in rows for p in s.images}
    test = {p.name for rows in data.test.values() for s in rows for p in s.images}
    pretrain = {ref.filename for rows in captions().values() for row in rows for ref in row.images}
    assert not train & test
    assert not pretrain & (train | test)


def test_samples_are_well_formed(data: FederatedData) -> None:
    for sample in all_samples(data):
        assert sample.prompt.count("<image>") == len(sample.images)
        choices = parse_choices(sample.prompt)
        assert sample.answer in choices
        assert len(set(choices)) == len(choices)
        assert not any("," in choice for choice in choices)
    assert all(path.is_file() for sample in all_samples(data) for path in sample.images)


@pytest.mark.parametrize("task", [*TASKS, *UNSEEN], ids=lambda task: task.name)
@pytest.mark.parametrize("audience", ["train", "test", "pretrain"])
def test_answers_are_balanced(task, audience) -> None:
    counts = Counter(row.answer for row in task.questions(audience, TEST_ROWS, 0))
    assert set(counts) == set(task.answers)
    assert max(counts.values()) <= 1.3 * TEST_ROWS / len(task.answers)


def test_questions_are_answerable_from_labels() -> None:
    for row in BY_NAME["Digits-2"].questions("test", 40, 0):
        first, second = (int(ref.label) for ref in row.images)
        assert (second - first) % 10 == 1
        assert int(row.answer) == (second + 1) % 10
    for row in BY_NAME["Colours-1"].questions("test", 40, 0):
        first, second = (ref.label.split()[0] for ref in row.images)
        assert second == row.answer != first
    for row in BY_NAME["Digits-3"].questions("test", 40, 0):
        digits = [int(ref.label) for ref in row.images]
        assert "ABC".index(row.answer[-1]) == digits.index(max(digits))
    for row in BY_NAME["Pictures-3"].questions("test", 40, 0):
        shown = row.images["ABC".index(row.answer[-1])]
        assert shown.label in row.text


def test_build_is_deterministic(cache: Path, data: FederatedData, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        assert len(files) > 1000
        parts = [f"{p.relative_to(folder)}".encode() + p.read_bytes() for p in files]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    assert data.name == "quickstart"
    first, second = ensure_built(cache), ensure_built(tmp_path)
    assert first.name == second.name
    assert digest(first) == digest(second)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]


def test_limits_and_unknown_scenarios(cache: Path) -> None:
    small = load_quickstart(DataConfig(root=str(cache), max_train_samples=5, max_test_samples=7))
    assert {len(rows) for client in small.clients for rows in client.train} == {5}
    assert {len(rows) for rows in small.test.values()} == {7}
    with pytest.raises(DataError, match="elsewhere"):
        load_quickstart(DataConfig(root=str(cache), scenario="elsewhere"))


def test_unwritable_cache_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        ensure_built(file)


def test_coarse_labels_stay_in_their_group() -> None:
    task = BY_NAME["Colours-0"]
    rng = python_random(0, "test")
    hits = 0
    for row in task.questions("pretrain", 400, 0):
        blurred = coarse(task, row, 2, rng)
        assert blurred.images == row.images
        assert task.answers.index(blurred.answer) // 2 == task.answers.index(row.answer) // 2
        hits += blurred.answer == row.answer
    assert 150 < hits < 250


def test_captions_use_words_of_no_task() -> None:
    words = set(CAPTION_WORDS.values())
    assert len(words) == len(CAPTION_WORDS)
    assert not words & {answer for task in BY_NAME.values() for answer in task.answers}
