"""``fedmosaic align`` from a configuration and with everything named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from letter_model import save_letter_model
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.report.alignment import read_alignments


def align(*args: str) -> Result:
    return CliRunner().invoke(cli, ["align", *args], catch_exceptions=False)


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    return write_world(tmp_path)


def test_a_configuration_is_aligned_once(world: Path, tmp_path: Path) -> None:
    options = ("--cf", str(world), "--data", "train", "--positions", "all", "--lr", "0.01")
    first = align(*options)
    assert first.exit_code == 0, first.output
    lines = first.output.splitlines()
    assert any(line.startswith("small: the anchor,") for line in lines)
    assert any(line.startswith("large: aligned with small,") for line in lines)
    rows = [line.split() for line in lines if line.strip().startswith("large ")]
    # The blocks, then how well they do on fitted and on new samples.
    assert [row[:5] for row in rows[:2]] == [
        ["large", "1", "1", "|", "2"],
        ["large", "2", "2", "|", "4"],
    ]
    assert [row[:2] for row in rows[2:]] == [["large", "1"], ["large", "2"]]
    out = Path("alignments/tiny")
    assert lines[-1] == f"to use them: adapter_args: {{adapter: {{alignment: {out}}}}}"
    page = (out / "alignment.html").read_text()
    assert page.count("<svg") == 2
    assert "CKA between the layers of small and large" in page
    assert str(tmp_path) not in page
    second = align(*options)
    assert "small: the anchor, was there already" in second.output
    assert "large: aligned with small, was there already" in second.output
    assert second.output.splitlines()[-4:] == lines[-4:]
    kept = align(*options, "--set", "adapter.alignment=elsewhere")
    assert "was there already" in kept.output  # from the cache
    assert "to use them" not in kept.output
    assert Path("elsewhere/large.safetensors").is_file()


def test_models_and_data_can_be_named(tmp_path: Path) -> None:
    save_letter_model(tmp_path / "letters", hidden=16, layers=3)
    rows = [{"conversations": [{"value": f"which {n} ?"}, {"value": "a cat"}]} for n in range(9)]
    Path("chat.json").write_text(json.dumps(rows))
    done = align(
        *("--anchor", "models/small", "--model", "big=models/large", "--model", "letters"),
        *("--data", "chat.json", "--out", "out", "--positions", "all"),
        *("--set", "adapter.rank=3", "--set", "adapter.num_blocks=1"),
    )
    assert done.exit_code == 0, done.output
    found = read_alignments(Path("out"))
    assert list(found) == ["small", "big", "letters"]
    assert {manifest["rank"] for manifest in found.values()} == {3}
    assert found["letters"]["data"]["source"] == ["chat.json"]


def test_mistakes_are_explained(world: Path) -> None:
    missing = align("--model", "models/large", "--data", "train")
    assert missing.exit_code == 2
    assert "--model needs --anchor" in missing.output
    none = align("--cf", str(world))
    assert none.exit_code == 2
    assert "no public samples to align on" in none.output
    assert "--data train" in none.output
    unknown = align("--cf", str(world), "--data", "train", "--anchor", "huge")
    assert unknown.exit_code == 2
    assert "no model 'huge' to be the anchor; models: small, large" in unknown.output
    same = align("--anchor", "a=models/small", "--model", "a=models/large", "--data", "train")
    assert same.exit_code == 2
    assert "'a'" in same.output
