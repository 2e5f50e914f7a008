"""GSM8K and MMLU: files, prompts, parsed answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.exams import (
    Choice,
    Problem,
    draw_shots,
    final_number,
    fitting_shots,
    gsm8k_prompt,
    mmlu_prompt,
    normal_number,
    read_gsm8k,
    read_mmlu,
    subject_means,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", "1234"), ("$5.00", "5"), ("-3", "-3"), ("0.50", "0.5"), ("7.", "7"), ("x", None),
    ],
)  # fmt: skip
def test_numbers_are_compared_by_value(text: str, number: str | None) -> None:
    assert normal_number(text) == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("2 + 3 = 5. The answer is 5.", "5"),
        ("First the answer is 4, no: the answer is $1,250.", "1250"),
        ("She has 3 cats and 12 dogs.", "12"),
        ("The answer is unclear, maybe 8 or 9", "8"),
        ("The answer is not known; 3 of 4", "3"),
        ("It is -2.50 degrees", "-2.5"),
        ("12 in all. The answer is 12.\n\nQuestion: How many? The answer is 99.", "12"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_worked_answer(answer: str, number: str | None) -> None:
    assert final_number(answer) == number


def write_gsm8k(folder: Path, count: int = 10) -> None:
    for split in ("train", "test"):
        rows = [
            {
                "question": f"{split} {n} and {n} ?",
                "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}.\nSo it is.\n#### {2 * n}",
            }
            for n in range(count)
        ]
        text = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def test_gsm8k_is_read_as_published(tmp_path: Path) -> None:
    write_gsm8k(tmp_path)
    found = read_gsm8k(tmp_path, "test")
    assert len(found) == 10
    expected = Problem(question="test 3 and 3 ?", reasoning="3 + 3 = 6. So it is.", answer="6")
    assert found[3] == expected
    shots = draw_shots(read_gsm8k(tmp_path, "train"), 8, seed=1)
    assert len(set(shots)) == 8
    assert shots == draw_shots(read_gsm8k(tmp_path, "train"), 8, seed=1)
    prompt = gsm8k_prompt(found[3], shots)
    assert prompt.count("The answer is ") == 8
    assert prompt.endswith("\n\nQuestion: test 3 and 3 ?\nAnswer:")
    # A model that repeats an example's answer is understood.
    assert final_number(f"{shots[0].reasoning} The answer is {shots[0].answer}.") == shots[0].answer
    with pytest.raises(DataError, match="11 worked examples are asked for, but there are 10"):
        draw_shots(found, 11, seed=0)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.jsonl: expected GSM8K's file"):
        read_gsm8k(tmp_path, "test")
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "no number"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:1: expected a solution"):
        read_gsm8k(tmp_path, "test")
    with pytest.raises(DataError, match=r"expected MMLU's files SUBJECT_dev\.csv"):
        read_mmlu(tmp_path, "dev")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/law_dev.csv").write_text("q,a,b,c,d,E\n")
    with pytest.raises(DataError, match=r"law_dev\.csv:1: expected a question, 4 options"):
        read_mmlu(tmp_path, "dev")


def write_mmlu(folder: Path) -> None:
    for split, count in (("dev", 5), ("test", 3)):
        (folder / split).mkdir()
        for subject in ("high_school_law", "art"):
            rows = [f'"{subject}, {split} {n} ?",w{n},x,y,z,{"ABCD"[n % 4]}' for n in range(count)]
            (folder / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n")


def test_mmlu_is_read_as_published(tmp_path: Path) -> None:
    write_mmlu(tmp_path)
    found = read_mmlu(tmp_path, "test")
    assert {subject: len(questions) for subject, questions in found.items()} == {
        "art": 3, "high_school_law": 3,
    }  # fmt: skip
    assert found["art"][1] == Choice(
        subject="art", question="art, test 1 ?", options=("w1", "x", "y", "z"), answer="B"
    )
    shots = read_mmlu(tmp_path, "dev")["high_school_law"]
    prompt = mmlu_prompt(found["high_school_law"][0], shots)
    assert prompt.startswith("Choose the right answer. The subject is high school law.")
    assert [line for line in prompt.splitlines() if line.startswith("Answer:")] == [
        "Answer: A", "Answer: B", "Answer: C", "Answer: D", "Answer: A", "Answer:",
    ]  # fmt: skip
    assert prompt.endswith("high_school_law, test 0 ?\nA. w0\nB. x\nC. y\nD. z\nAnswer:")


def test_solved_questions_are_left_out_until_the_prompt_fits(tmp_path: Path) -> None:
    write_mmlu(tmp_path)
    choice = read_mmlu(tmp_path, "test")["art"][0]
    shots = read_mmlu(tmp_path, "dev")["art"]
    full, bare = mmlu_prompt(choice, shots), mmlu_prompt(choice, ())
    assert fitting_shots(choice, shots, len, len(full)) == full
    shorter = fitting_shots(choice, shots, len, len(full) - 1)
    assert shorter == mmlu_prompt(choice, shots[:4])
    assert fitting_shots(choice, shots, len, 5) == bare


def test_means_over_subjects_and_questions() -> None:
    macro, micro = subject_means({"a": [True], "b": [False, False, True, False], "c": []})
    assert macro == pytest.approx((1 + 0.25) / 2)
    assert micro == pytest.approx(2 / 5)
    with pytest.raises(DataError, match="without questions"):
        subject_means({})
