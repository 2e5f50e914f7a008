"""A resumed run in the report: marks in the plot and a table of its lives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.html import write_report
from fedml_plugin_fedmosaic.report.lives import lives, resumed_rounds
from fedml_plugin_fedmosaic.report.metrics import load_run


def entry(number: int, strategy: str, rounds_done: int, ranks: int = 1) -> dict[str, object]:
    return {
        "time": f"2026-01-02T03:04:0{number}+0000",
        "strategy": strategy,
        "rounds_done": rounds_done,
        "strategies_done": 0,
        "ranks": ranks,
    }


@pytest.fixture
def resumed_run(make_run, tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", num_clients=3, rounds=4)
    entries = [
        entry(1, "fedmosaic", 2, ranks=4),
        entry(2, "fedmosaic", 2),
        entry(3, "fedmosaic", 0),
        entry(4, "fedmosaic", 4),  # only the last evaluation was missing
        entry(5, "fedavg", 1),  # has never begun
    ]
    (folder / "resumes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder


def test_rounds_at_which_a_life_began(resumed_run: Path) -> None:
    found = resumed_rounds(load_run(resumed_run))
    assert found["fedmosaic"] == (0, 2)


def test_table_of_lives(resumed_run: Path) -> None:
    section = lives(load_run(resumed_run))
    assert section is not None
    assert section.table is not None
    first = ["2", "2026-01-02T03:04:01+0000", "fedmosaic", "2", "4"]
    assert section.table.rows[0] == first
    assert [row[0] for row in section.table.rows] == ["2", "3", "4", "5", "6"]


def test_page_of_a_resumed_run(resumed_run: Path) -> None:
    page = write_report(resumed_run).read_text()
    assert page.count('resumed-fedmosaic-1"') == 1
    assert page.count('resumed-fedmosaic-3"') == 1
    assert "Dotted: rounds at which the run was resumed" in page
    assert "2026-01-02T03:04:05+0000" in page


def test_page_of_an_uninterrupted_run(finished_run: Path) -> None:
    page = write_report(finished_run).read_text()
    assert "resumed" not in page
    assert 'id="lives"' not in page


def test_a_damaged_line_is_named(resumed_run: Path) -> None:
    with (resumed_run / "resumes.jsonl").open("a") as stream:
        stream.write("torn\n")
    with pytest.raises(DataError, match=r"resumes\.jsonl:6: not a resumption"):
        load_run(resumed_run)
