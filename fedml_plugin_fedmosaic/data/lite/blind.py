"""A model that sees the text only: what can be guessed without images?

A conditional logit over the choices of a question: the score of a choice is a sum of weights of
features of the text, fitted on training rows. If it beats chance on the test rows, a task has a
shortcut. Open questions count as a choice among the answers of the training rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.data.metrics import parse_choices

_STEPS = 150
_RATE = 0.3
_DECAY = 0.02
_BUCKETS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Blind:
    """What text alone gives away in one task.

    Attributes:
        accuracy: of the blind model on the test rows.
        chance: mean of one over the number of choices.
        majority: share of the most frequent answer of the test rows.
    """

    accuracy: float
    chance: float
    majority: float
    num_rows: int

    @property
    def suspicious(self) -> bool:
        """Whether the accuracy is above what guessing gives, by over three standard errors."""
        level = max(self.chance, self.majority)
        return self.accuracy > level + 3 * math.sqrt(level * (1 - level) / self.num_rows)


Pair = tuple[str, str]
"""Prompt and answer."""


def blind_model(train: Sequence[Pair], test: Sequence[Pair]) -> Blind:
    """Fits the blind model on training rows and judges it on test rows; deterministic.

    Args:
        train: prompts and answers.
        test: the same.

    Returns:
        Accuracy, chance and majority on ``test``.
    """
    answers = tuple(sorted({answer for _, answer in train}))
    fitted = _fit([_Row.of(pair, answers) for pair in train])
    rows = [_Row.of(pair, answers) for pair in test]
    right = [int(_scores(fitted, row).argmax()) == row.gold for row in rows]
    counts: dict[str, int] = {}
    for _, answer in test:
        counts[answer] = counts.get(answer, 0) + 1
    return Blind(
        accuracy=sum(right) / len(rows),
        chance=sum(1 / len(row.features) for row in rows) / len(rows),
        majority=max(counts.values()) / len(rows),
        num_rows=len(rows),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    features: list[list[int]]
    gold: int

    @classmethod
    def of(cls, pair: Pair, answers: Sequence[str]) -> _Row:
        prompt, answer = pair
        choices = parse_choices(prompt, answer) or answers
        question = prompt.partition("Choice list:")[0].replace("<image>", " ")
        words = sorted(set(re.findall(r"\w+", question.lower())))
        features = [
            _features(choice, position, words, question) for position, choice in enumerate(choices)
        ]
        gold = choices.index(answer) if answer in choices else -1
        return cls(features, gold)


def _features(choice: str, position: int, words: Sequence[str], question: str) -> list[int]:
    names = [f"choice {choice}", f"position {position}"]
    names += [f"said {choice.lower() in question.lower()}"]
    names += [f"{word} & {choice}" for word in words]
    names += [f"{word} & {position}" for word in words]
    return [_bucket(name) for name in names]


def _bucket(name: str) -> int:
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value % _BUCKETS


def _scores(weights: Tensor, row: _Row) -> Tensor:
    return torch.stack([weights[torch.tensor(features)].sum() for features in row.features])


def _fit(rows: Sequence[_Row]) -> Tensor:
    """Weights ``(buckets,)`` by gradient descent on the mean log-loss with weight decay."""
    known = [row for row in rows if row.gold >= 0]
    flat = [features for row in known for features in row.features]
    where = torch.tensor([bucket for features in flat for bucket in features])
    owner = torch.tensor([i for i, features in enumerate(flat) for _ in features])
    group = torch.tensor([i for i, row in enumerate(known) for _ in row.features])
    gold = torch.zeros(len(flat))
    start = 0
    for row in known:
        gold[start + row.gold] = 1.0
        start += len(row.features)
    weights = torch.zeros(_BUCKETS)
    for _ in range(_STEPS):
        score = torch.zeros(len(flat)).index_add_(0, owner, weights[where])
        score = (score - score.max()).exp()
        total = torch.zeros(len(known)).index_add_(0, group, score)
        error = score / total[group] - gold
        gradient = torch.zeros(_BUCKETS).index_add_(0, where, error[owner]) / len(known)
        weights -= _RATE * (gradient + _DECAY * weights)
    return weights
