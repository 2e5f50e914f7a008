"""A judge's grades from recorded responses, and from a service that the configuration names."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedml_plugin_fedmosaic.config.judge import JudgeConfig
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.judge import (
    Recorded,
    judge_prompt,
    judged,
    make_judge,
    parse_grade,
)

SAMPLES = tuple(
    Sample(sample_id=str(n), task="t-0", turns=(f"question {n}", f"gold {n}")) for n in range(3)
)
ANSWERS = ("right", "wrong", "odd")
RESPONSES = ("Good. [[9]]", "First [[3]], no: [[1]]", "no grade")


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        ("It is fine. [[7]]", 7.0),
        ("[[ 6.5 ]]", 6.5),
        ("[[2]] or rather [[8]]", 8.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("8/10", None),
        ("", None),
    ],
)
def test_a_grade_stands_in_double_brackets(response: str, grade: float | None) -> None:
    assert parse_grade(response) == grade


def prompts() -> list[str]:
    return [
        judge_prompt(sample.prompt, sample.answer, answer)
        for sample, answer in zip(SAMPLES, ANSWERS, strict=True)
    ]


def record(path: Path) -> Path:
    rows = [
        json.dumps({"prompt": prompt, "response": response})
        for prompt, response in zip(prompts(), RESPONSES, strict=True)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_recorded_responses_are_graded_without_a_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = make_judge(JudgeConfig(record=str(record(tmp_path / "judge.jsonl"))))
    assert judged(ANSWERS, SAMPLES, judge) == pytest.approx((9 + 1) / 2 / 10)
    assert "1 of 3 responses of the judge have no grade" in caplog.text
    with pytest.raises(DataError, match="has no response to a prompt"):
        judged(("new", *ANSWERS[1:]), SAMPLES, judge)


def test_no_grade_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no response of the judge has a grade"):
        judged(ANSWERS, SAMPLES, lambda _prompt: "well")


def test_responses_are_kept_and_asked_for_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "judge.jsonl"
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "[[4]]"

    assert judged(ANSWERS, SAMPLES, Recorded(path, ask)) == pytest.approx(0.4)
    assert asked == prompts()
    assert judged(ANSWERS, SAMPLES, Recorded(path, None)) == pytest.approx(0.4)
    assert len(path.read_text().splitlines()) == 3
    path.write_text('{"prompt": 1')
    with pytest.raises(DataError, match=r"judge\.jsonl:1: expected a JSON object"):
        Recorded(path, None)


def test_the_prompt_shows_question_gold_answer_and_answer() -> None:
    text = judge_prompt("How many?", "three", "four")
    assert all(part in text for part in ("How many?", "three", "four", "[[5]]"))


class _Service(BaseHTTPRequestHandler):
    seen: list[dict[str, Any]]
    reply: dict[str, Any]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({**body, "key": self.headers.get("Authorization")})
        text = json.dumps(type(self).reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def service() -> Iterator[str]:
    _Service.seen = []
    _Service.reply = {"choices": [{"message": {"content": "[[10]]"}}]}
    server = HTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_is_asked_only_if_it_is_named(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "abc")
    config = JudgeConfig(url=service, model="m", key_variable="MY_KEY")
    assert judged(ANSWERS, SAMPLES, make_judge(config)) == 1.0
    first = _Service.seen[0]
    assert (first["model"], first["temperature"], first["key"]) == ("m", 0.2, "Bearer abc")
    assert first["messages"] == [{"role": "user", "content": prompts()[0]}]
    _Service.reply = {"odd": 1}
    with pytest.raises(DataError, match="answered in another form"):
        make_judge(config)("x")


def test_a_service_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"the judge at http://127\.0\.0\.1:9/ cannot be asked"):
        make_judge(JudgeConfig(url="http://127.0.0.1:9/", timeout_s=2))("x")
    with pytest.raises(DataError, match="is no http"):
        make_judge(JudgeConfig(url="file:///etc/hostname"))("x")


def test_a_judge_needs_somebody_to_ask() -> None:
    with pytest.raises(ValidationError, match="record of responses, or the url"):
        JudgeConfig()
