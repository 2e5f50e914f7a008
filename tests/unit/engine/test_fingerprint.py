"""A fingerprint changes with what a model computes, and with nothing else."""

from __future__ import annotations

import shutil

import pytest
from tiny_models import save_text_model

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine import fingerprint
from fedml_plugin_fedmosaic.engine.fingerprint import model_fingerprint


def of(folder):
    return model_fingerprint("m", ModelSpec(path=str(folder)))


def test_place_and_other_files_do_not_count(tmp_path):
    first = save_text_model(tmp_path / "a")
    known = of(first)
    (first / "README.md").write_text("a model")
    (first / "alignment.safetensors").write_bytes(b"of the model, not in it")
    shutil.move(first, tmp_path / "b")
    assert of(tmp_path / "b") == known


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_changed_file_counts(tmp_path, name):
    folder = save_text_model(tmp_path)
    known = of(folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert of(folder) != known


def test_weights_of_the_same_shape_differ(tmp_path):
    assert of(save_text_model(tmp_path / "a")) != of(save_text_model(tmp_path / "b", seed=1))


def test_of_large_files_pieces_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_WHOLE", 1 << 12)
    monkeypatch.setattr(fingerprint, "_PIECE", 1 << 8)
    folder = save_text_model(tmp_path / "a")
    known = of(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for place in (0, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert of(folder) != known
    path.write_bytes(content)
    assert of(folder) == known
    assert known != of(save_text_model(tmp_path / "b", seed=1))


def test_no_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="'m'"):
        of(tmp_path / "none")
