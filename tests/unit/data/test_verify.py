from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_image

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.scenario import read_scenario
from fedml_plugin_fedmosaic.data.verify import verify


def row(question: str, answer: str, images: object = ("p.png",), **more: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r", "image": list(images), "conversations": turns, **more}  # type: ignore[call-overload]


GOOD = row("<image> which ? Choice list:[cat, dog]. Your answer is:", "Cat")


def write(root: Path, rows: object, split: str = "train", name: str = "Pets") -> Path:
    path = root / f"dataset/{name}/{split}/dataset-0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_image(tmp_path / "p.png", "red")
    write(tmp_path, [GOOD, GOOD])
    write(tmp_path, [GOOD], "test")
    return tmp_path


def test_good_data_are_counted(root):
    seen = []
    result = verify(root, progress=lambda done, total: seen.append((done, total)))
    assert result.problems == ()
    assert (result.num_files, result.num_samples, result.num_images) == (2, 3, 1)
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row("<image><image> ?", "a"), "as many <image> marks as images, got 2 and 1"),
        (row("<image> ?", "a", ["gone.png"]), "expected image 'gone.png', got no such file"),
        (row("<image> ?", "a", ["text.png"]), "expected image 'text.png' to decode, got"),
        (row("<image> ? Choice list:[cat, dog].", "cow"), "'cow' among the choices, got 'cat'"),
        (row("<image> ?", " "), "a question and an answer"),
        ({"id": "r", "conversations": [{"value": "only"}]}, "a question and an answer"),
        (row("<image> ?", "a", image=3), "'image' to be a path or a list of paths"),
        ([1], "expected an object, got list"),
    ],
)
def test_a_wrong_sample_is_named_with_file_and_index(root, wrong, message):
    (root / "text.png").write_text("no image")
    path = write(root, [GOOD, wrong, GOOD])
    (problem,) = verify(root).problems
    assert (problem.path, problem.index) == (path, 1)
    assert message in problem.message
    assert str(problem).startswith(f"{path}, sample 1")


def test_all_problems_are_found_not_only_the_first(root):
    bad = row("<image><image> ? Choice list:[cat, dog].", "cow", ["gone.png"])
    write(root, [bad, GOOD, bad])
    assert [problem.index for problem in verify(root).problems] == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("content", ["[{", "{}", "[]"])
def test_a_file_that_cannot_be_read_is_one_problem(root, content):
    path = write(root, content)
    result = verify(root)
    assert [(problem.path, problem.index) for problem in result.problems] == [(path, None)]
    assert result.num_samples == 1


def test_a_scenario_says_what_needs_choices_and_what_must_exist(root):
    write(root, [row("<image> how many ?", "3")], "train", "Open")
    write(root, [row("<image> how many ?", "3")], "test", "Open")
    write(root, [row("<image> which ?", "cat")])
    tasks = [
        {"dataset": "Pets", "subset_id": 0, "type": "multi-choice"},
        {"dataset": "Open", "subset_id": 0, "type": "open-ended", "metric": "F1"},
        {"dataset": "Lost", "subset_id": 0, "type": "multi-choice"},
        {"dataset": "dummy", "subset_id": 0},
    ]
    scenario = root / "s.json"
    scenario.write_text(json.dumps([{"client_id": 0, "model_id": "m", "datasets": tasks}]))
    found = [str(problem) for problem in verify(root, read_scenario(scenario)).problems]
    assert len(found) == 3
    assert sum("Lost" in text and "got nothing there" in text for text in found) == 2
    assert any("choices in the prompt of a multi-choice task" in text for text in found)
    # Without a scenario, a prompt without choices is an open question.
    assert verify(root).problems == ()


def test_a_folder_without_samples_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected files dataset/"):
        verify(tmp_path)
