"""Public samples from files, from data roots, and what names their content."""

from __future__ import annotations

import json

import pytest
from tiny_models import save_image, text_samples

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.public import public_split, samples_at, samples_digest


def write(path, *answers, image=None):
    rows = [
        {
            "conversations": [
                {"value": f"{'<image>' if image else ''}question {number}"},
                {"value": answer},
                {"value": "and now?"},
                {"value": "the same"},
            ],
            **({"image": image} if image else {}),
        }
        for number, answer in enumerate(answers)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_the_public_split_of_a_data_root(tmp_path):
    write(tmp_path / "dataset/Pets/train/dataset-0.json", "a")
    assert public_split(tmp_path) == ()
    assert [s.answer for s in samples_at(tmp_path)] == ["a"]
    write(tmp_path / "dataset/Pets/pretrain/dataset-0.json", "e")
    assert [s.answer for s in public_split(tmp_path)] == ["e"]
    write(tmp_path / "dataset/Pets/public/dataset-1.json", "c", "d")
    write(tmp_path / "dataset/Chat/public/dataset-0.json", "b")
    found = public_split(tmp_path)
    assert [(s.task, s.answer) for s in found] == [
        ("Chat-0", "b"),
        ("Pets-1", "c"),
        ("Pets-1", "d"),
    ]
    assert found[0].turns == ("question 0", "b", "and now?", "the same")
    assert samples_at(tmp_path) == found


def test_images_are_relative_to_the_data_root_or_to_the_file(tmp_path):
    save_image(tmp_path / "pictures/a.png", "red")
    inside = write(tmp_path / "dataset/Pets/train/dataset-0.json", "a", image="pictures/a.png")
    beside = write(tmp_path / "chat.json", "a", image=["pictures/a.png"])
    for path in (inside, beside):
        assert samples_at(path)[0].images == (tmp_path / "pictures/a.png",)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"chat\.json.*got nothing there"):
        samples_at(tmp_path / "chat.json")
    with pytest.raises(DataError, match="got none"):
        samples_at(tmp_path)


def test_the_digest_names_texts_order_and_images(tmp_path):
    samples = text_samples(4)
    known = samples_digest(samples)
    assert samples_digest(text_samples(4, task="other")) == known
    assert samples_digest(samples[::-1]) != known
    assert samples_digest(samples[:3]) != known
    image = save_image(tmp_path / "a.png", "red")
    path = write(tmp_path / "chat.json", "a", image="a.png")
    red = samples_digest(samples_at(path))
    save_image(image, "blue")
    assert samples_digest(samples_at(path)) != red
    (shown,) = samples_at(path)
    image.unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        samples_digest([shown])
