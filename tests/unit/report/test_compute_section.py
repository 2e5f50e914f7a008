from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.compute import compute, flops_text
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.sections import all_sections


def trained(strategy: str, round_idx: int, client_id: int, name: str, flops: float) -> ev.Event:
    return ev.ClientTrained(
        strategy=strategy,
        round_idx=round_idx,
        client_id=client_id,
        pass_name=name,
        num_steps=1,
        num_examples=2,
        num_tokens=3,
        mean_loss=1.0,
        duration_s=2.0,
        flops=flops,
    )


def finished(strategy: str, round_idx: int) -> ev.Event:
    return ev.RoundFinished(
        strategy=strategy,
        round_idx=round_idx,
        duration_s=1.0,
        uplink_bytes={0: 1024, 1: 3072},
        downlink_bytes={0: 512, 1: 512},
    )


def write(run_dir: Path, events: list[ev.Event]) -> Path:
    lines = [json.dumps(ev.to_record(event)) + "\n" for event in events]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    clients = [
        {"client_id": i, "model": "m", "family": "f", "size": "1B", "signature": "s",
         "tasks": ["a-0"], "num_examples": 2}
        for i in (0, 1)
    ]  # fmt: skip
    (run_dir / "clients.json").write_text(json.dumps(clients))
    return run_dir


def test_work_is_told_apart_and_averaged(tmp_path: Path) -> None:
    events = [trained("local", 0, client, "local", 4e9) for client in (0, 1)] + [
        finished("local", 0)
    ]
    for round_idx in (0, 1):
        events += [
            trained("takfl", round_idx, 0, "local", 2e9),
            trained("takfl", round_idx, 1, "local", 4e9),
            trained("takfl", round_idx, 0, "server.teacher-1", 1e9),
            trained("takfl", round_idx, 0, "server.teacher-2", 1e9),
            finished("takfl", round_idx),
        ]
    # A stage after the last round is no round.
    events.append(trained("takfl", 2, 0, "final", 9e12))
    run = load_run(write(tmp_path, events))
    section = compute(run)
    assert section is not None
    assert section.table is not None
    rows = {row[0]: row for row in section.table.rows}
    assert rows["local"][1:5] == ["4 GFLOP", "1.00", "-", rows["local"][4]]
    assert rows["takfl"][1:4] == ["3 GFLOP", "0.75", "2 GFLOP"]
    assert rows["takfl"][5:] == ["2.0 KiB", "512 B"]
    assert "compute" in [part.anchor for part in all_sections(run)]


def test_old_runs_without_operations_have_no_such_section(tmp_path: Path) -> None:
    events = [trained("local", 0, 0, "local", 0.0), finished("local", 0)]
    assert compute(load_run(write(tmp_path, events))) is None


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 FLOP"), (1.234e6, "1.23 MFLOP"), (5e15, "5 PFLOP")]
)
def test_prefixes(value: float, text: str) -> None:
    assert flops_text(value) == text
