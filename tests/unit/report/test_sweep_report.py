"""A sweep's table, CSV files and page, with finished, going, failed and missing runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.statistics import mean_interval
from fedml_plugin_fedmosaic.launch.sweep_manifest import Entry, Manifest
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.sweep import (
    SweepResults,
    groups_csv,
    load_results,
    objective_value,
    runs_csv,
    sweep_table,
)
from fedml_plugin_fedmosaic.report.sweep_page import write_collection

STATES = {
    # (temperature, seed): status and rounds of events that are kept
    (0.1, 1): ("COMPLETED", None),
    (0.1, 2): ("COMPLETED", None),
    (0.1, 3): ("RUNNING", 3),
    (0.5, 1): ("RUNNING", 3),
    (0.5, 2): ("PENDING", 0),
    (0.5, 3): ("FAILED", 0),
}


def _cut(run_dir: Path, rounds: int) -> None:
    """Leaves what a run has written after some rounds of its main strategy."""
    path = run_dir / "metrics.jsonl"
    kept = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        main = record["strategy"] == "fedmosaic"
        if main and (record["event"] == "RunFinished" or record.get("round_idx", 0) >= rounds):
            continue
        if record.get("final") and main:
            continue
        kept.append(line)
    path.write_text("\n".join(kept) + "\n")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepResults:
    folder = tmp_path_factory.mktemp("sweep")
    entries = []
    for (temperature, seed), (status, rounds) in STATES.items():
        name = f"temperature={temperature},seed={seed}"
        if rounds != 0:
            run_dir = make_run(folder / "runs" / name, seed=seed, num_clients=3, rounds=5)
            if rounds:
                _cut(run_dir, rounds)
        entries.append(
            Entry(
                name=name,
                levels={"temperature": temperature, "seed": seed},
                changes={},
                folder=f"runs/{name}",
                status=status,
            )
        )
    return load_results(folder, Manifest(identity={}, runs=entries))


def values(sweep: SweepResults, name: str) -> list[float]:
    runs = [load_run(sweep.folder / f"runs/temperature=0.1,seed={seed}") for seed in (1, 2)]
    return [getattr(run.strategies["fedmosaic"], name) for run in runs]


def test_the_table_groups_by_what_is_not_the_seed(sweep: SweepResults) -> None:
    table = sweep_table(sweep)
    assert table.columns[:3] == ["temperature", "runs", "Self\nA_last"]
    assert [row[:2] for row in table.rows] == [["0.1", "2/3"], ["0.5", "0/3"]]
    estimate = mean_interval(values(sweep, "self_mean"))
    assert estimate.half_width is not None
    # Only the finished runs count; the running one would pull the mean down.
    assert table.rows[0][2] == f"{100 * estimate.mean:.1f} ± {100 * estimate.half_width:.1f}"


def test_a_group_without_a_finished_run_is_marked(sweep: SweepResults) -> None:
    table = sweep_table(sweep)
    run = load_run(sweep.folder / "runs/temperature=0.5,seed=1")
    reached = run.strategies["fedmosaic"].self_mean
    assert reached is not None
    assert table.rows[1][2] == f"{100 * reached:.1f}*"
    assert any(note.startswith("* no run has finished") for note in table.notes)
    assert any("temperature=0.5,seed=3; the same 'fedmosaic sweep'" in n for n in table.notes)


def _rows(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_run_is_a_line_of_the_csv(sweep: SweepResults) -> None:
    rows = _rows(runs_csv(sweep))
    assert [row["status"] for row in rows] == [status for status, _ in STATES.values()]
    assert [row["finished"] for row in rows] == ["true", "true", *["false"] * 4]
    assert [row["rounds"] for row in rows] == ["5", "5", "3", "3", "", ""]
    assert [float(row["self"]) for row in rows[:2]] == values(sweep, "self_mean")
    assert rows[5]["self"] == ""
    assert {row["seed"] for row in rows} == {"1", "2", "3"}


def test_every_group_is_a_line_of_the_other_csv(sweep: SweepResults) -> None:
    first, second = _rows(groups_csv(sweep))
    estimate = mean_interval(values(sweep, "others_mean"))
    assert float(first["others"]) == pytest.approx(estimate.mean)
    assert float(first["others_ci95"]) == pytest.approx(estimate.half_width)
    assert (first["runs"], first["finished"], first["partial"]) == ("3", "2", "false")
    assert (second["runs"], second["finished"], second["partial"]) == ("3", "0", "true")
    assert float(first["train_s"]) > 0
    assert second["self_ci95"] == ""


def test_compared_strategies_get_rows_of_their_own(sweep: SweepResults) -> None:
    table = sweep_table(load_results(sweep.folder, sweep.manifest, compared=True))
    assert table.columns[:2] == ["temperature", "strategy"]
    assert ["0.1", "local"] in [row[:2] for row in table.rows]
    assert ["0.1", "fedmosaic"] in [row[:2] for row in table.rows]


def test_the_page_is_complete_and_says_what_is_missing(sweep: SweepResults) -> None:
    page, runs, groups = write_collection(sweep)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") >= 2
    assert "2 of 6" in text
    assert "1 failed, 1 pending, 2 running" in text
    assert "temperature=0.5,seed=3" in text
    for outside in ("src=", "http://", "https://", "url(http"):
        assert outside not in text, outside
    assert runs.read_text() == runs_csv(sweep)
    assert groups.read_text() == groups_csv(sweep)


def test_two_axes_make_a_matrix(sweep: SweepResults, tmp_path: Path) -> None:
    entries = []
    for number, (mix, algo) in enumerate((m, a) for m in "ab" for a in ("local", "fedmosaic")):
        name = f"mix={mix},algo={algo}"
        make_run(tmp_path / "runs" / name, seed=number, num_clients=3, rounds=3)
        levels = {"mix": mix, "algo": algo}
        entry = Entry(name=name, levels=levels, changes={}, folder=f"runs/{name}")
        entry.status = "COMPLETED"
        entries.append(entry)
    results = load_results(tmp_path, Manifest(identity={}, runs=entries))
    text = write_collection(results)[0].read_text(encoding="utf-8")
    assert 'aria-label="Self A_last by mix and algo"' in text
    assert "± is" not in sweep_table(results).to_text()


def test_a_sweep_that_has_not_begun_has_a_page_too(tmp_path: Path) -> None:
    entry = Entry(name="seed=1", levels={"seed": 1}, changes={}, folder="runs/seed=1")
    results = load_results(tmp_path, Manifest(identity={}, runs=[entry]))
    assert sweep_table(results).rows == [["0/1", *["-"] * 8]]
    assert "0 of 1" in write_collection(results)[0].read_text(encoding="utf-8")


def test_the_objective_of_a_run(sweep: SweepResults, tmp_path: Path) -> None:
    run_dir = sweep.folder / "runs/temperature=0.1,seed=1"
    main = load_run(run_dir).strategies["fedmosaic"]
    assert objective_value(run_dir, "self") == main.self_mean
    assert objective_value(run_dir, "others") == main.others_mean
    assert objective_value(run_dir, "worst") == main.worst
    assert objective_value(run_dir, "a_auc") == main.a_auc
    assert objective_value(tmp_path, "self") is None


def test_a_damaged_run_is_named(sweep: SweepResults, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "runs/x", num_clients=2, rounds=1)
    (run_dir / "metrics.jsonl").write_text("broken\nbroken\n")
    entry = Entry(name="x", levels={}, changes={}, folder="runs/x")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        load_results(tmp_path, Manifest(identity={}, runs=[entry]))


def test_a_going_run_of_several_ranks_is_read_from_all_their_files(tmp_path: Path) -> None:
    whole = load_run(make_run(tmp_path / "whole", num_clients=4, rounds=2))
    run_dir = make_run(tmp_path / "split", num_clients=4, rounds=2)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    other = [line for line in lines if json.loads(line).get("client_id") in (1, 3)]
    rest = [line for line in lines if line not in set(other)]
    (run_dir / "metrics.jsonl").write_text("\n".join(rest) + "\n")
    (run_dir / "metrics.rank1.jsonl").write_text("\n".join(other) + "\n")
    split = load_run(run_dir).strategies["fedmosaic"]
    assert split.client_scores("self") == whole.strategies["fedmosaic"].client_scores("self")
