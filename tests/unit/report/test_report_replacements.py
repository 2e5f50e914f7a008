from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics
from fedml_plugin_fedmosaic.report.replacements import replacements


def reported(round_idx: int, client_id: int, **values: Any) -> ev.ClientReported:
    return ev.ClientReported(
        strategy="tap", round_idx=round_idx, client_id=client_id, values=values
    )


def run_of(*events: ev.Event) -> Run:
    return Run(
        path=Path(),
        clients=(),
        strategies={"tap": StrategyMetrics("tap", tuple(events))},
        main="tap",
        config="",
        environment={},
    )


def test_replacements_are_counted_over_clients_and_rounds() -> None:
    run = run_of(
        reported(0, 0, vqa={"replaced": True, "federated": 1.0}, shared={"replaced": True}),
        reported(0, 1, vqa={"replaced": True}, shared={"replaced": False}),
        reported(4, 1, vqa={"replaced": False}, other={"mean": 3.0}),
    )
    section = replacements(run)
    assert section is not None
    assert section.table is not None
    assert section.table.rows == [
        ["tap", "shared", "2", "2", "1", "50.0 %", "1"],
        ["tap", "vqa", "2", "3", "2", "66.7 %", "1"],
    ]


def test_runs_without_replacements_have_no_section() -> None:
    assert replacements(run_of(reported(0, 0, other={"mean": 1.0}))) is None


def test_a_report_survives_the_metrics_file() -> None:
    event = reported(2, 3, vqa={"federated": 0.5, "personal": None, "replaced": True})
    assert ev.from_record(json.loads(json.dumps(ev.to_record(event)))) == event
