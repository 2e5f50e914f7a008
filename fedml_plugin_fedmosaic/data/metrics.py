"""Scores of answers, over plain Python data.

The protocol follows FedMosaic (arXiv 2506.11024): accuracy on multi-choice tasks, token F1 or a
text metric (:mod:`.text_metrics`) on open-ended ones, A_last and A_AUC over rounds. The
multi-choice scorer of the released code is kept as mode ``official``; the default mode does not
take the article "a" for an option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Literal

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.text_metrics import check_pairs

ChoiceMode = Literal["default", "official"]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LISTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"Choice list:\[(.*?)\]",
        r"Choice lists: \[(.*?)\]",
        r"Choice list: \[(.*?)\]",
        r"Choice List: \[(.*?)\]",
        r"(?m)^\s*\[(.*?)\]\s*$",
    )
)
_LETTERED_LINE = re.compile(r"(?m)^\s*([A-Z])\.\s")
_IMAGE_MARK = re.compile(r"Image [A-Z](?=:)")
_IMAGE_NAME = re.compile(r"Image (?:[A-Z]|\d+)")
_ANSWER_ID = "Print only the answer with a single answer id"
_BARE_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:,]*")
_STATED_LETTER = re.compile(r"(?i:answer|option|choice)(?:\s+is)?\s*:?\s*[(\[]?([A-Z])\b(?!')")
# A capital A or I before a lower-case word is English, not an option.
_FREE_LETTER = re.compile(r"(?<![\w'])(?![AI]\s+[a-z])([A-Z])(?![\w'])")


def parse_choices(prompt: str, gold: str = "") -> tuple[str, ...]:
    """The options that a multi-choice prompt offers.

    Looked for in this order: ``Choice list: [..]`` in four spellings, a line in brackets, lines
    ``A. ..`` (the options are the letters), ``Image A:`` marks, and "Print only the answer with a
    single answer id" (1 to 5). Inside brackets options are separated by commas; with two or more
    bars the options are letters.

    Args:
        prompt: the first user turn.
        gold: the gold answer; quotes around options are dropped unless it has quotes itself.

    Returns:
        The options in order; empty if none are found.
    """
    for pattern in _LISTS:
        found = pattern.search(prompt)
        if found:
            return _listed(found.group(1), gold)
    letters = _LETTERED_LINE.findall(prompt)
    if letters:
        return tuple(dict.fromkeys(letters))
    images = _IMAGE_MARK.findall(prompt)
    if images:
        return tuple(dict.fromkeys(images))
    return ("1", "2", "3", "4", "5") if _ANSWER_ID in prompt else ()


def _listed(inside: str, gold: str) -> tuple[str, ...]:
    barred = inside.split("|")
    if len(barred) > 2:
        return tuple(_LETTERS[: len(barred)])
    options = [option.strip() for option in inside.split(",")]
    if not any(mark in gold for mark in "'\""):
        options = [option.strip("'\"") for option in options]
    names = [_IMAGE_NAME.match(option) for option in options]
    if all(names):
        return tuple(name.group() for name in names if name)
    return tuple(options)


def infer_choice(
    prediction: str, choices: Sequence[str], mode: ChoiceMode = "default"
) -> str | None:
    """The option that a generated answer means.

    Args:
        prediction: the generated text.
        choices: see :func:`parse_choices`.
        mode: ``official`` follows the released code: the first option contained in the answer,
            else any stand-alone letter in any case, so "a bird" means the first option.
            ``default`` works on whole words: the whole answer, a letter that is stated as the
            answer, the option named first (the longest of those that begin there), then a
            stand-alone capital letter.

    Returns:
        One of ``choices``, or None if the answer means none of them.

    Raises:
        ConfigError: unknown mode.
    """
    if mode not in ("default", "official"):
        raise ConfigError(f"choice mode is {mode!r}; expected 'default' or 'official'")
    if not choices:
        return None
    return (
        _infer_official(prediction, choices) if mode == "official" else _infer(prediction, choices)
    )


def _infer_official(prediction: str, choices: Sequence[str]) -> str | None:
    answer = prediction.strip().lower()
    lowered = [choice.lower() for choice in choices]
    if set(lowered) == {"positive", "negative"}:
        for word, meaning in (("yes", "positive"), ("no", "negative")):
            if word in answer:
                return choices[lowered.index(meaning)]
    are_letters = all(len(choice) == 1 and choice.isalpha() for choice in choices)
    if not are_letters:
        for choice, low in zip(choices, lowered, strict=True):
            if low and low in answer:
                return choice
    for letter in re.findall(r"\b([A-Z])\b", answer.upper()):
        position = _LETTERS.index(letter)
        if position < len(choices):
            return choices[position]
    if are_letters:
        for choice, low in zip(choices, lowered, strict=True):
            if f"{low}." in answer or answer == low:
                return choice
    plain = answer.replace("_", " ")
    for choice, low in zip(choices, lowered, strict=True):
        option = low.replace("_", " ")
        if plain == option or (len(option) > 1 and option in plain):
            return choice
    return None


def _infer(prediction: str, choices: Sequence[str]) -> str | None:
    answer = _plain(prediction)
    options = [_plain(choice) for choice in choices]
    if answer in options:
        return choices[options.index(answer)]
    if set(options) == {"positive", "negative"}:
        words = re.findall(r"\w+", answer)
        said = [word for word in words if word in ("yes", "no")]
        if said:
            return choices[options.index("positive" if said[0] == "yes" else "negative")]
    bare = _BARE_LETTER.fullmatch(prediction.strip())
    stated = bare or _STATED_LETTER.search(prediction)
    if stated:
        return _by_letter(stated.group(1), choices)
    if any(len(option) > 1 or not option.isalpha() for option in options):
        named = _first_named(answer, options)
        if named is not None:
            return choices[named]
    free = _FREE_LETTER.search(prediction)
    return _by_letter(free.group(1), choices) if free else None


def _plain(text: str) -> str:
    """Lower case, underscores as blanks, no outer punctuation, single blanks."""
    return " ".join(text.lower().replace("_", " ").split()).strip(" .,:;!?'\"()[]")


def _by_letter(letter: str, choices: Sequence[str]) -> str | None:
    upper = letter.upper()
    for choice in choices:
        if choice.upper() == upper:
            return choice
    position = _LETTERS.index(upper)
    return choices[position] if position < len(choices) else None


def _first_named(answer: str, options: Sequence[str]) -> int | None:
    found = [
        (match.start(), -len(option), index)
        for index, option in enumerate(options)
        if option and (match := re.search(rf"(?<!\w){re.escape(option)}(?!\w)", answer))
    ]
    return min(found)[2] if found else None


def choice_is_correct(
    prompt: str, prediction: str, gold: str, mode: ChoiceMode = "default"
) -> bool:
    """Whether a generated answer means the gold option; an answer that means none is wrong.

    Args:
        prompt: the first user turn.
        prediction: the generated text.
        gold: the gold answer.
        mode: see :func:`infer_choice`.

    Returns:
        True if the inferred option equals the gold answer without regard to case.
    """
    inferred = infer_choice(prediction, parse_choices(prompt, gold), mode)
    return inferred is not None and inferred.strip().lower() == gold.strip().lower()


def accuracy(correct: Iterable[bool]) -> float:
    """The part of answers that are correct, in [0, 1].

    Raises:
        DataError: there is no answer.
    """
    flags = [bool(flag) for flag in correct]
    if not flags:
        raise DataError("accuracy of no answers", hint="the task's test set is empty")
    return sum(flags) / len(flags)


def token_f1(
    predictions: Sequence[Collection[Hashable]],
    golds: Sequence[Collection[Hashable]],
    *,
    special: Collection[Hashable] = (),
    mode: ChoiceMode = "default",
) -> float:
    """F1 of token sets, with matches and totals summed over all answers.

    Args:
        predictions: tokens (or token ids) per generated answer; repetitions do not count.
        golds: tokens per gold answer.
        special: tokens that do not count, such as beginning-of-text.
        mode: ``official`` keeps special tokens and starts the matched and the predicted total at
            1, as the released code does.

    Returns:
        A number in [0, 1]; 0 if nothing matches.

    Raises:
        DataError: no answer, or not as many predictions as gold answers.
    """
    check_pairs(predictions, golds)
    ignored = set() if mode == "official" else set(special)
    start = 1 if mode == "official" else 0
    matched, predicted, wanted = start, start, 0
    for prediction, gold in zip(predictions, golds, strict=True):
        said, meant = set(prediction) - ignored, set(gold) - ignored
        matched += len(said & meant)
        predicted += len(said)
        wanted += len(meant)
    total = predicted + wanted
    return min(1.0, 2 * matched / total) if total else 0.0


def a_last(curve: Sequence[float]) -> float:
    """A_last: the score after the last round.

    Args:
        curve: score after each evaluated round, in order.

    Raises:
        DataError: the curve is empty.
    """
    if not curve:
        raise DataError("A_last of a run that was never evaluated")
    return float(curve[-1])


def a_auc(curve: Sequence[float]) -> float:
    """A_AUC: area under the score curve with unit width per round, over its length (the mean).

    Args:
        curve: score after each evaluated round, in order; rounds at equal distances.

    Raises:
        DataError: the curve is empty.
    """
    if not curve:
        raise DataError("A_AUC of a run that was never evaluated")
    return math.fsum(curve) / len(curve)
