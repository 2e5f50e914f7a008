"""Exams for the clients of a finished run, from the command to exams.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import save_text_model
from tiny_world import write_world

from fedml_plugin_fedmosaic.cli.main import cli
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.engine import exams
from fedml_plugin_fedmosaic.engine.models import load_model


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def write_exams(folder: Path) -> None:
    for split in ("train", "test"):
        rows = [{"question": f"one and {n} ?", "answer": f"{n} . #### {n}"} for n in range(9)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        name = {"train": "dev", "test": "test"}[split]
        (folder / name).mkdir()
        text = "".join(f"which animal {n},cat,dog,bird,fish,{'ABCD'[n % 4]}\n" for n in range(5))
        (folder / name / f"animals_{name}.csv").write_text(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exams")
    config = write_world(folder, "fedavg")
    done = invoke("run", "--cf", str(config), "--set", "comm_round=1", "--run-dir",
                  str(folder / "out"))  # fmt: skip
    assert done.exit_code == 0, done.output
    write_exams(folder)
    return folder


def test_mmlu_for_some_clients(world: Path) -> None:
    out = world / "out"
    arguments = ("--data", str(world), "--client", "1", "--client", "2")
    result = invoke("exam", str(out), "mmlu", *arguments)
    assert result.exit_code == 0, result.output
    lines = [line.partition(":")[0] for line in result.stdout.splitlines()[:-1]]
    assert sorted(lines) == ["base large", "base small", "client 1", "client 2"]
    found = json.loads((out / "exams.json").read_text())["fedavg"]["mmlu"]
    assert found["client 1"]["num_questions"] == 5
    assert found["client 1"]["parts"]["animals"] == found["client 1"]["score"]
    # The letters are the model's own: a fixed one is right on some of five questions.
    assert all(0 <= row["score"] <= 1 for row in found.values())


def test_gsm8k_is_added_to_the_same_file(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exams, "_GSM8K_TOKENS", 2)
    out = world / "out"
    arguments = ("--data", str(world), "--client", "0", "--questions", "3", "--no-base")
    result = invoke("exam", str(out), "gsm8k", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("client 0: ")
    found = json.loads((out / "exams.json").read_text())["fedavg"]
    assert found["gsm8k"]["client 0"]["num_questions"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "mmlu"], "is not a run folder"),
        (["out", "driving"], "there is no exam 'driving'; known: gsm8k, mmlu"),
        (["out", "mmlu", "--client", "9"], "has no client 9; it has 0 to 2"),
        (["out", "mmlu", "--strategy", "fedmosaic"], "fedmosaic"),
    ],
)
def test_what_cannot_be_examined(
    world: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(world)
    result = invoke("exam", *words, "--data", ".")
    assert result.exit_code != 0
    assert message in result.stderr


def test_the_likeliest_letter_is_that_of_the_logits(tmp_path: Path) -> None:
    save_text_model(tmp_path / "m", "llama", hidden=16, layers=2)
    bundle = load_model("m", ModelSpec(path=str(tmp_path / "m")), torch.device("cpu"))
    prompts = ["which animal is this ? Answer :", "red", "the colour green two A B"]
    found = exams.likeliest_letters(bundle.model, bundle.processor, prompts, batch_size=2)
    for prompt, letter in zip(prompts, found, strict=True):
        inputs = bundle.processor.encode_prompt([exams._asked(prompt, 0, "t")])
        with torch.inference_mode():
            logits = bundle.model(**inputs).logits[0, -1]
        ids = [bundle.processor.token_ids(name)[0] for name in "ABCD"]
        assert letter == "ABCD"[int(logits[ids].argmax())]
