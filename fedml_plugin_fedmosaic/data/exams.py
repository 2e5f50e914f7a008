"""Published exams for language models: GSM8K and MMLU, as prompts and as judged answers.

GSM8K (arXiv 2110.14168) is asked with worked examples in the prompt (chain of thought, arXiv
2201.11903); the answer is a number. MMLU (arXiv 2009.03300) is asked with solved questions of the
same subject; the answer is the most likely of the letters A to D. Nothing is downloaded: a folder
holds the files as they were published.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random

LETTERS = ("A", "B", "C", "D")
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")
_STATED = re.compile(r"the answer is", re.IGNORECASE)
_CALCULATION = re.compile(r"<<[^>]*>>")
_NEXT_QUESTION = re.compile(r"\n\s*Question:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question of GSM8K.

    Attributes:
        question: as published.
        reasoning: the worked solution without its calculator marks and final number.
        answer: the number, as a normalised text.
    """

    question: str
    reasoning: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One question of MMLU.

    Attributes:
        subject: file name without ending, e.g. ``abstract_algebra``.
        question: as published.
        options: four texts.
        answer: one of :data:`LETTERS`.
    """

    subject: str
    question: str
    options: tuple[str, str, str, str]
    answer: str


def normal_number(text: str) -> str | None:
    """A number without currency, thousands separators and needless zeros; None if it is none."""
    plain = text.replace(",", "").replace("$", "").rstrip(".")
    try:
        value = float(plain)
    except ValueError:
        return None
    return str(int(value)) if value.is_integer() else repr(value)


def final_number(answer: str) -> str | None:
    """The number that a worked answer ends with.

    The first number after the last "the answer is" of the first answer, else its last number; what
    a model adds as a next question is left out. The released code looks after the first "the
    answer is" of the whole text, which may belong to a question that the model made up.

    Args:
        answer: generated text.

    Returns:
        As :func:`normal_number`; None if there is no number.
    """
    first = _NEXT_QUESTION.split(answer, maxsplit=1)[0]
    stated = _STATED.split(first)
    if len(stated) > 1:
        found = _NUMBER.search(stated[-1])
        if found:
            return normal_number(found[0])
    numbers = _NUMBER.findall(first)
    return normal_number(numbers[-1]) if numbers else None


def read_gsm8k(folder: Path, split: str) -> tuple[Problem, ...]:
    """Problems of ``<folder>/<split>.jsonl`` with ``question`` and ``answer`` per line.

    Args:
        folder: as published.
        split: ``train`` or ``test``.

    Raises:
        DataError: the file is missing, or a line is not a problem.
    """
    path = folder / f"{split}.jsonl"
    problems = []
    for number, line in enumerate(_text(path, "GSM8K's").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            solution, _, last = str(row["answer"]).rpartition("####")
            answer = normal_number(last.strip())
            question = str(row["question"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected an object with question and answer") from (
                error
            )
        if answer is None or not solution:
            raise DataError(f"{path}:{number}: expected a solution that ends with '#### NUMBER'")
        reasoning = " ".join(_CALCULATION.sub("", solution).split())
        problems.append(Problem(question=question, reasoning=reasoning, answer=answer))
    return tuple(problems)


def read_mmlu(folder: Path, split: str) -> dict[str, tuple[Choice, ...]]:
    """Questions of ``<folder>/<split>/<subject>_<split>.csv``, by subject.

    Args:
        folder: as published.
        split: ``dev`` (five solved questions per subject), ``val`` or ``test``.

    Raises:
        DataError: there is no file, or a row is not a question with four options and a letter.
    """
    paths = sorted((folder / split).glob(f"*_{split}.csv"))
    if not paths:
        raise DataError(
            f"{folder / split}: expected MMLU's files SUBJECT_{split}.csv, got none",
            hint="give the folder that holds dev/ and test/",
        )
    return {path.stem.removesuffix(f"_{split}"): _read_subject(path, split) for path in paths}


def _read_subject(path: Path, split: str) -> tuple[Choice, ...]:
    subject = path.stem.removesuffix(f"_{split}")
    found = []
    for number, row in enumerate(csv.reader(_text(path, "MMLU's").splitlines(True)), start=1):
        if len(row) != 6 or row[5] not in LETTERS:
            raise DataError(f"{path}:{number}: expected a question, 4 options and one of A to D")
        found.append(
            Choice(
                subject=subject,
                question=row[0].strip(),
                options=(row[1], row[2], row[3], row[4]),
                answer=row[5],
            )
        )
    return tuple(found)


def _text(path: Path, whose: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected {whose} file, got: {getattr(error, 'strerror', None) or error}",
            hint="give the folder with the published files",
        ) from error


def draw_shots(problems: Sequence[Problem], count: int, seed: int) -> tuple[Problem, ...]:
    """Worked examples for the prompt: drawn once per seed, in a shuffled order.

    Raises:
        DataError: there are fewer problems.
    """
    if count > len(problems):
        raise DataError(f"{count} worked examples are asked for, but there are {len(problems)}")
    return tuple(python_random(seed, "exam shots").sample(list(problems), count))


def gsm8k_prompt(problem: Problem, shots: Sequence[Problem]) -> str:
    """A problem after worked examples, each of which ends with "The answer is N."."""
    parts = [
        f"Question: {shot.question}\nAnswer: {shot.reasoning} The answer is {shot.answer}."
        for shot in shots
    ]
    return "\n\n".join([*parts, f"Question: {problem.question}\nAnswer:"])


def mmlu_prompt(choice: Choice, shots: Sequence[Choice]) -> str:
    """A question after solved ones of its subject; the letter is what comes next."""
    subject = choice.subject.replace("_", " ")
    parts = [f"Choose the right answer. The subject is {subject}."]
    parts += [f"{_asked(shot)} {shot.answer}" for shot in shots]
    return "\n\n".join([*parts, _asked(choice)])


def _asked(choice: Choice) -> str:
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, choice.options, strict=True)]
    return "\n".join([choice.question, *options, "Answer:"])


def fitting_shots(
    choice: Choice, shots: Sequence[Choice], length: Callable[[str], int], limit: int
) -> str:
    """The prompt with as many solved questions as fit into a number of tokens.

    Args:
        choice: the question.
        shots: solved questions; the last ones are left out first.
        length: tokens of a prompt.
        limit: most tokens; a question alone may be longer.
    """
    for count in range(len(shots), 0, -1):
        prompt = mmlu_prompt(choice, shots[:count])
        if length(prompt) <= limit:
            return prompt
    return mmlu_prompt(choice, ())


def subject_means(correct: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """Mean over subjects, and mean over questions (subjects weighted by their size).

    Raises:
        DataError: there is no question.
    """
    sizes = {subject: len(flags) for subject, flags in correct.items() if flags}
    if not sizes:
        raise DataError("an exam without questions")
    rights = {subject: sum(correct[subject]) for subject in sizes}
    macro = sum(rights[subject] / sizes[subject] for subject in sizes) / len(sizes)
    return macro, sum(rights.values()) / sum(sizes.values())
