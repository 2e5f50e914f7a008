"""One task's score: find the answers, then judge them by the task's metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedml_plugin_fedmosaic.config.sections import EvalConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.registry import METRICS
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.data.judge import judged, make_judge
from fedml_plugin_fedmosaic.data.metrics import (
    accuracy,
    choice_is_correct,
    parse_choices,
    token_f1,
)
from fedml_plugin_fedmosaic.data.scenario import OTHER_METRICS
from fedml_plugin_fedmosaic.engine.base import Score
from fedml_plugin_fedmosaic.engine.evaluate import generate_answers, rank_choices
from fedml_plugin_fedmosaic.engine.processor import Processor


def score_task(
    model: Any,
    processor: Processor,
    samples: Sequence[Sample],
    task: TaskSpec,
    config: EvalConfig,
    *,
    share_prompt: bool,
) -> Score:
    """Scores a model on a task.

    Multi-choice tasks are judged by accuracy, from generated answers or from the likelihood of the
    choices in the prompt; a prompt without choices counts as wrong in both. Open-ended tasks are
    always generated and judged by the task's ``metric``: ``F1`` of token sets, ``Judge`` (a
    language model that grades), or a member of the METRICS shelf; ``RougeL`` if it names none.

    Args:
        model: in evaluation mode.
        processor: of the same model.
        samples: test samples.
        task: kind and metric.
        config: mode, batch size, length limit.
        share_prompt: see ``rank_choices``.

    Returns:
        The score; NaN without samples.

    Raises:
        ConfigError: unknown metric.
    """
    metric = _metric(task)
    if not samples:
        return Score(task=task.name, value=math.nan, num_samples=0, metric=metric)
    if metric == "accuracy" and config.mode == "likelihood":
        value = _ranked_accuracy(model, processor, samples, config, share_prompt)
    else:
        answers = generate_answers(
            model,
            processor,
            samples,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
        )
        value = _value(answers, samples, metric, processor, config)
    return Score(task=task.name, value=value, num_samples=len(samples), metric=metric)


def _metric(task: TaskSpec) -> str:
    if task.kind == "multi-choice":
        return "accuracy"
    metric = task.metric or "RougeL"
    if metric not in METRICS and metric not in OTHER_METRICS:
        raise ConfigError(
            f"task {task.name!r}: unknown metric {metric!r}; expected "
            f"{', '.join((*OTHER_METRICS, *METRICS))}",
            hint="correct the scenario file",
        )
    return metric


def _ranked_accuracy(
    model: Any,
    processor: Processor,
    samples: Sequence[Sample],
    config: EvalConfig,
    share_prompt: bool,
) -> float:
    # The gold answer only decides whether quotes belong to the choices.
    parsed = (parse_choices(sample.prompt, sample.answer) for sample in samples)
    named = (tuple(choice for choice in choices if choice.strip()) for choices in parsed)
    offered = {index: choices for index, choices in enumerate(named) if choices}
    best = rank_choices(
        model,
        processor,
        [samples[index] for index in offered],
        list(offered.values()),
        batch_size=config.batch_size,
        share_prompt=share_prompt,
    )
    correct = [False] * len(samples)
    for (index, choices), choice in zip(offered.items(), best, strict=True):
        gold = samples[index].answer.strip().lower()
        correct[index] = choices[choice].strip().lower() == gold
    return accuracy(correct)


def _value(
    answers: Sequence[str],
    samples: Sequence[Sample],
    metric: str,
    processor: Processor,
    config: EvalConfig,
) -> float:
    golds = [sample.answer for sample in samples]
    if metric == "accuracy":
        return accuracy(
            choice_is_correct(sample.prompt, answer, sample.answer)
            for sample, answer in zip(samples, answers, strict=True)
        )
    if metric == "F1":
        return token_f1(
            [processor.token_ids(answer) for answer in answers],
            [processor.token_ids(gold) for gold in golds],
        )
    if metric == "Judge":
        if config.judge is None:
            raise ConfigError(
                "a task has the metric Judge, but eval_args.evaluation.judge is not set",
                hint="give it the url of a service, or a record of responses",
            )
        return judged(answers, samples, make_judge(config.judge))
    return float(METRICS[metric](answers, golds))
