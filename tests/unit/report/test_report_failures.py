"""Dropped clients and skipped rounds in tables, summary and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.failures import client_failures, failed_rounds
from fedml_plugin_fedmosaic.report.html import write_report
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.tables import summary_rows, write_summary

OOM = "OutOfMemoryError: tried to allocate 2 GiB"
NORM = "refused: its norm 12 is above <10>"


def dropped(round_idx: int, client_id: int, stage: str, reason: str) -> ev.ClientDropped:
    return ev.ClientDropped(
        strategy="fedmosaic", round_idx=round_idx, client_id=client_id, stage=stage, reason=reason
    )


@pytest.fixture
def failing_run(make_run, tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", num_clients=3, rounds=4)
    events = [
        dropped(2, 1, "fit", OOM),
        dropped(0, 1, "fit", OOM),
        dropped(0, 2, "update", NORM),
        dropped(0, 2, "update", NORM),  # the round was repeated after a resume
        ev.RoundSkipped(strategy="fedmosaic", round_idx=0, delivered=1, needed=2, cohort_size=3),
    ]
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(ev.to_record(event)) + "\n" for event in events)
    return folder


def test_per_client_and_reason(failing_run: Path) -> None:
    table = client_failures(load_run(failing_run))
    assert table is not None
    assert [(row[1], *row[3:]) for row in table.rows] == [
        ("1", "fit", OOM, "2", "1, 3"),
        ("2", "update", NORM, "1", "1"),
    ]


def test_per_round(failing_run: Path) -> None:
    table = failed_rounds(load_run(failing_run))
    assert table is not None
    assert [row[1:] for row in table.rows] == [
        ["1", "skipped: 1 delivered, 2 needed", "1, 2", "2", "3"],
        ["3", "mixed without them", "1", "1", "3"],
    ]


def test_one_line_below_the_summary(failing_run: Path) -> None:
    notes = [note for note in summary_rows(failing_run).notes if "Failures" in note]
    expected = "3 dropped (fit 2, update 1), 1 round skipped without a quorum"
    assert notes == [f"Failures of fedmosaic: {expected}."]
    record = json.loads(write_summary(failing_run).read_text())["strategies"]
    assert record["fedmosaic"]["dropped_clients"] == 3
    assert record["fedmosaic"]["skipped_rounds"] == 1
    assert record["local"]["dropped_clients"] == 0


def test_the_page_shows_them_and_escapes_reasons(failing_run: Path) -> None:
    page = write_report(failing_run).read_text()
    assert '<section id="failures">' in page
    assert '<section id="failed-rounds">' in page
    assert "above &lt;10&gt;" in page


def test_nothing_is_said_without_failures(finished_run: Path, make_run, tmp_path: Path) -> None:
    run = load_run(finished_run)
    assert client_failures(run) is None
    assert failed_rounds(run) is None
    assert not any("Failures" in note for note in summary_rows(finished_run).notes)
    page = write_report(make_run(tmp_path / "run", num_clients=2, rounds=1)).read_text()
    assert "Failures" not in page
