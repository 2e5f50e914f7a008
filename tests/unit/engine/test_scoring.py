"""Which metric a task's answers are judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedml_plugin_fedmosaic.config.judge import JudgeConfig
from fedml_plugin_fedmosaic.config.sections import EvalConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.data.judge import judge_prompt
from fedml_plugin_fedmosaic.data.text_metrics import bleu, rouge_l
from fedml_plugin_fedmosaic.engine import scoring

SAMPLES = tuple(
    Sample(sample_id=str(n), task="t-0", turns=("say it", f"the cat sat {n}")) for n in range(2)
)
ANSWERS = ["the cat sat 0", "the dog sat 1"]


def score(
    monkeypatch: pytest.MonkeyPatch, metric: str | None, config: EvalConfig | None = None
) -> Any:
    monkeypatch.setattr(scoring, "generate_answers", lambda *_args, **_kwargs: ANSWERS)
    task = TaskSpec(dataset="t", subset_id=0, kind="open-ended", metric=metric)
    return scoring.score_task(
        None,
        None,
        SAMPLES,
        task,
        config or EvalConfig(),
        share_prompt=True,  # type: ignore[arg-type]
    )


def test_open_ended_tasks_are_scored_by_the_metric_they_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golds = [sample.answer for sample in SAMPLES]
    for named in (None, "RougeL"):
        found = score(monkeypatch, named)
        assert (found.metric, found.value) == ("RougeL", rouge_l(ANSWERS, golds))
    found = score(monkeypatch, "Bleu-4")
    assert (found.metric, found.value) == ("Bleu-4", bleu(ANSWERS, golds))


def test_a_judge_grades_from_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "judge.jsonl"
    rows = [
        {"prompt": judge_prompt(sample.prompt, sample.answer, answer), "response": f"[[{grade}]]"}
        for sample, answer, grade in zip(SAMPLES, ANSWERS, (10, 3), strict=True)
    ]
    record.write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = EvalConfig(judge=JudgeConfig(record=str(record)))
    assert score(monkeypatch, "Judge", config).value == pytest.approx(0.65)


def test_a_judge_that_is_not_configured_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"eval_args\.evaluation\.judge is not set"):
        score(monkeypatch, "Judge")
