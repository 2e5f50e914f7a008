"""A language model that grades answers from 1 to 10, against the gold answer.

Protocol of FedMosaic (arXiv 2506.11024) on Fed-aya: the judge sees question, gold answer and
answer, and writes its grade as ``[[n]]``. No connection is opened unless the configuration names a
service; responses can be recorded, and recorded ones are used again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.judge import JudgeConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.text_metrics import check_pairs

LOG = logging.getLogger(__name__)

BEST = 10
_GRADE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_PROMPT = """\
Grade an assistant's answer to a question. Compare it with the reference answer; judge whether it is
correct, helpful and in the language of the question, not how long it is.

Question:
{question}

Reference answer:
{gold}

Assistant's answer:
{answer}

Explain your grade in one or two sentences. Then write it as a number from 1 (useless) to {best}
(as good as the reference) in double square brackets, for example: [[5]]
"""


def judge_prompt(question: str, gold: str, answer: str) -> str:
    """What the judge is asked."""
    return _PROMPT.format(question=question, gold=gold, answer=answer, best=BEST)


def parse_grade(response: str) -> float | None:
    """The last ``[[n]]`` of a response, if it is from 1 to 10; else None."""
    found = _GRADE.findall(response)
    grade = float(found[-1]) if found else 0.0
    return grade if 1 <= grade <= BEST else None


class Recorded:
    """Responses kept in a file, in front of somebody who is asked for those that are missing.

    Args:
        path: JSON-lines file of ``{"key", "prompt", "response"}``; None: nothing is kept.
        ask: gives the response to a prompt; None: only the file's are known.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, path: Path | None, ask: Callable[[str], str] | None) -> None:
        self._path = path
        self._ask = ask
        self._known: dict[str, str] = {}
        if path is None or not path.is_file():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._known[_key(entry["prompt"])] = str(entry["response"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number}: expected a JSON object with prompt and response",
                    hint="remove the line",
                ) from error

    def __call__(self, prompt: str) -> str:
        """The response to a prompt.

        Raises:
            DataError: it is not recorded and nobody can be asked.
        """
        key = _key(prompt)
        if key in self._known:
            return self._known[key]
        if self._ask is None:
            raise DataError(
                f"the judge's record {self._path} has no response to a prompt that begins "
                f"{prompt[:40]!r}",
                hint="set eval_args.evaluation.judge.url to ask a service",
            )
        response = self._ask(prompt)
        self._known[key] = response
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                entry = {"key": key, "prompt": prompt, "response": response}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return response


def _key(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


def ask_service(config: JudgeConfig, prompt: str) -> str:
    """Asks a chat completion service (the widespread ``messages`` form).

    Args:
        config: ``url`` is set.
        prompt: of the judge.

    Raises:
        DataError: the service cannot be reached or answers in another form.
    """
    body = {
        "model": config.model,
        "temperature": config.temperature,
        "messages": [{"role": "user", "content": prompt}],
    }
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(config.key_variable)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if not str(config.url).startswith(("http://", "https://")):
        raise DataError(f"the judge's url {config.url!r} is no http(s) address")
    request = urllib.request.Request(  # noqa: S310 - checked above
        str(config.url), json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=config.timeout_s) as reply:  # noqa: S310
            content: Any = json.loads(reply.read())
        return str(content["choices"][0]["message"]["content"])
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"the judge at {config.url} cannot be asked: {error}",
            hint=f"check the address and the key in {config.key_variable}",
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"the judge at {config.url} answered in another form") from error


def make_judge(config: JudgeConfig) -> Recorded:
    """The judge that a configuration means; nothing is opened yet but the record."""
    ask = None if config.url is None else (lambda prompt: ask_service(config, prompt))
    return Recorded(None if config.record is None else Path(config.record).expanduser(), ask)


def judged(answers: Sequence[str], samples: Sequence[Sample], judge: Callable[[str], str]) -> float:
    """Mean grade as a part of the best one.

    Args:
        answers: generated.
        samples: with questions and gold answers.
        judge: gives the response to a prompt.

    Returns:
        A number in [0.1, 1]; responses without a grade do not count.

    Raises:
        DataError: there is no answer, or no response has a grade.
    """
    check_pairs(answers, samples)
    grades = [
        parse_grade(judge(judge_prompt(sample.prompt, sample.answer, answer)))
        for answer, sample in zip(answers, samples, strict=True)
    ]
    found = [grade for grade in grades if grade is not None]
    if not found:
        raise DataError("no response of the judge has a grade in the form [[n]], 1 to 10")
    if len(found) < len(grades):
        LOG.warning("%d of %d responses of the judge have no grade", len(grades) - len(found),
                    len(grades))  # fmt: skip
    return sum(found) / len(found) / BEST
