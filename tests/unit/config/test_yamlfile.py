"""Reading YAML: numbers, lines, duplicates, and files that are no configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedml_plugin_fedmosaic.config.yamlfile import parse_value, read_document
from fedml_plugin_fedmosaic.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("-7", -7),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2026-01-02", "2026-01-02"),
        ("e5", "e5"),
        ("true", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("'2e-5'", "2e-5"),
    ],
)
def test_values(text: str, value: Any) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_infinity_and_nan_are_numbers() -> None:
    assert parse_value("-.inf") == float("-inf")
    assert parse_value(".nan") != parse_value(".nan")


@pytest.mark.parametrize("text", ["[1", "a: b: c", "!!python/object:os.system x", "!!int x"])
def test_what_is_not_a_value(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_value(text)


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_knows_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a:\n  b: 1\n\n  c:\n    - x\n    - {d: 2}\n")
    document = read_document(path)
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    lines = {key: document.origin(key) for key in [("a",), ("a", "b"), ("a", "c", 1, "d")]}
    assert [value.rpartition(":")[2] for value in lines.values()] == ["1", "2", "6"]
    assert document.origin(("a", "b", "below")) == f"{path}:2"
    assert document.origin(("missing",)) == str(path)


def test_a_key_written_twice_is_noted_with_both_lines(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "a:\n  b: 1\n  b: 2\na: {}\n"))
    assert [str(problem).partition("c.yaml")[2] for problem in document.problems] == [
        ":4: a: the key is already set in line 1",
        ":3: a.b: the key is already set in line 2",
    ]


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "base: &base {x: 1, y: 2}\nmore:\n  <<: *base\n  y: 3\n"
    document = read_document(write(tmp_path, text))
    assert document.data["more"] == {"x": 1, "y": 3}
    assert document.problems == []


def test_an_alias_inside_itself_is_noted(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "a: &a\n  b: *a\n"))
    assert "refers to its own parent" in str(document.problems[0])


def test_keys_must_be_text(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "a:\n  1: x\n  [q]: y\n"))
    assert len(document.problems) == 2
    assert all("a key must be text" in str(problem) for problem in document.problems)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n- b\n", "expected sections"),
        (b"just text\n", "expected sections"),
        (b"a:\n  b: [1, 2\nc: 3\n", ":3: broken YAML"),
        (b"a:\n\tb: 1\n", ":2: broken YAML"),
        (b"a: 1\n---\nb: 2\n", "broken YAML"),
        (b"a: \x00\n", "broken YAML"),
        (b"a: \xff\n", "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such configuration file"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_document(tmp_path)
