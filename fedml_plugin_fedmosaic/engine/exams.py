"""Exams as plug-ins: a member of the EXAMS shelf puts questions to a model and scores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.exams import (
    LETTERS,
    Choice,
    draw_shots,
    final_number,
    fitting_shots,
    gsm8k_prompt,
    read_gsm8k,
    read_mmlu,
    subject_means,
)
from fedml_plugin_fedmosaic.engine.evaluate import generate_answers
from fedml_plugin_fedmosaic.engine.processor import Processor

_GSM8K_SHOTS = 8
_GSM8K_TOKENS = 256
_MMLU_SHOTS = 5
_MMLU_LIMIT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamResult:
    """A model's result.

    Attributes:
        score: the exam's own number, in [0, 1].
        num_questions: asked.
        parts: further numbers by name, in [0, 1].
    """

    score: float
    num_questions: int
    parts: Mapping[str, float] = field(default_factory=dict)


class Exam(Protocol):
    """Made from the folder of the published files, a limit on questions, and a seed."""

    def __init__(self, folder: Path, limit: int | None, seed: int) -> None: ...

    def take(self, model: Any, processor: Processor, batch_size: int) -> ExamResult:
        """Asks a model in evaluation mode."""
        ...


def _asked(prompt: str, number: int, task: str) -> Sample:
    return Sample(sample_id=str(number), task=task, turns=(prompt, ""))


class Gsm8k:
    """GSM8K: 8 worked examples, greedy answers of at most 256 tokens, exact numbers.

    The examples are drawn from the published training problems. (The released evaluation samples
    with temperature 0.8; greedy answers give the same score twice.)

    Args:
        folder: holds ``train.jsonl`` and ``test.jsonl``.
        limit: questions from the start of the test file; all when None.
        seed: of the examples.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, limit: int | None, seed: int) -> None:
        self._problems = read_gsm8k(folder, "test")[:limit]
        self._shots = draw_shots(read_gsm8k(folder, "train"), _GSM8K_SHOTS, seed)

    def take(self, model: Any, processor: Processor, batch_size: int) -> ExamResult:
        """The part of the problems whose final number is right."""
        answers = generate_answers(
            model,
            processor,
            [
                _asked(gsm8k_prompt(problem, self._shots), number, "gsm8k")
                for number, problem in enumerate(self._problems)
            ],
            batch_size=batch_size,
            max_new_tokens=_GSM8K_TOKENS,
        )
        numbers = [final_number(answer) for answer in answers]
        right = [
            number == problem.answer
            for number, problem in zip(numbers, self._problems, strict=True)
        ]
        _require(right)
        answered = sum(number is not None for number in numbers)
        return ExamResult(
            score=sum(right) / len(right),
            num_questions=len(right),
            parts={"with a number": answered / len(right)},
        )


class Mmlu:
    """MMLU: 5 solved questions of the subject, the likeliest of four letters, no generation.

    The score is the mean over all questions; the mean over subjects is a part of it.

    Args:
        folder: holds ``dev/`` and ``test/`` with a CSV file per subject.
        limit: questions per subject; all when None.
        seed: unused; the solved questions are the published ones.

    Raises:
        DataError: a file is missing or damaged, or a subject has no solved questions.
    """

    def __init__(self, folder: Path, limit: int | None, seed: int) -> None:  # noqa: ARG002
        self._shots = read_mmlu(folder, "dev")
        self._subjects = {
            subject: questions[:limit] for subject, questions in read_mmlu(folder, "test").items()
        }

    def take(self, model: Any, processor: Processor, batch_size: int) -> ExamResult:
        """The part of the questions whose likeliest letter is right."""

        def length(prompt: str) -> int:
            return processor.prompt_length(_asked(prompt, 0, "mmlu"))

        questions: list[Choice] = []
        prompts: list[str] = []
        for subject, own in self._subjects.items():
            shots = self._shots.get(subject, ())[:_MMLU_SHOTS]
            questions += own
            prompts += [fitting_shots(choice, shots, length, _MMLU_LIMIT) for choice in own]
        letters = likeliest_letters(model, processor, prompts, batch_size=batch_size)
        correct: dict[str, list[bool]] = {}
        for choice, letter in zip(questions, letters, strict=True):
            correct.setdefault(choice.subject, []).append(letter == choice.answer)
        _require(questions)
        macro, micro = subject_means(correct)
        parts = {subject: sum(flags) / len(flags) for subject, flags in correct.items()}
        return ExamResult(
            score=micro, num_questions=len(questions), parts={"mean of subjects": macro, **parts}
        )


def _require(questions: Sequence[object]) -> None:
    if not questions:
        raise ConfigError("the exam has no questions", hint="raise --questions")


@torch.inference_mode()
def likeliest_letters(
    model: Any, processor: Processor, prompts: Sequence[str], *, batch_size: int
) -> list[str]:
    """The letter A to D with the largest logit at the position after each prompt.

    Args:
        model: in evaluation mode.
        processor: of the same model.
        prompts: any number.
        batch_size: prompts per forward pass; similar lengths are put together.

    Raises:
        ConfigError: two letters begin with the same token, so that they cannot be told apart.
    """
    samples = [_asked(prompt, number, "mmlu") for number, prompt in enumerate(prompts)]
    best = [""] * len(samples)
    order = sorted(range(len(samples)), key=lambda index: processor.prompt_length(samples[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        first = [int(ids[0]) for ids in processor.encode_choices(samples[batch[0]], LETTERS)]
        if len(set(first)) < len(LETTERS):
            raise ConfigError("the model's tokenizer gives two letters the same first token")
        inputs = processor.encode_prompt([samples[index] for index in batch])
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        chosen = logits[:, -1][:, first].argmax(-1).tolist()
        for index, letter in zip(batch, chosen, strict=True):
            best[index] = LETTERS[letter]
    return best
