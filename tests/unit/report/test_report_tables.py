from __future__ import annotations

import json
import math
import statistics

import pytest

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.measures import compare_rows
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.numbers import percent, readable_bytes, seconds
from fedml_plugin_fedmosaic.report.tables import (
    MAX_WIDTH,
    SummaryTable,
    summary_rows,
    write_summary,
)


def test_summary_has_a_row_per_client_and_what_sums_them_up_below(finished_run):
    table = summary_rows(finished_run)
    assert [row[0] for row in table.rows[:8]] == [*map(str, range(8))]
    assert [row[0] for row in table.rows[8:]] == [
        "mean",
        "worst client",
        "A_AUC",
        "forgetting",
        "transfer",
    ]
    assert table.columns[3:] == [f"{n}\nSelf / Others" for n in ("base", "local", "fedmosaic")]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.num_footer == 5


def test_summary_cells_are_the_means_of_the_events(finished_run):
    metrics = load_run(finished_run).strategies["fedmosaic"]
    own = statistics.fmean(
        event.value for event in metrics.final_scores()[3].values() if event.scope == "self"
    )
    assert summary_rows(finished_run).rows[3][-1].startswith(f"{100 * own:.1f} / ")


def test_summary_fits_the_width_as_text(finished_run):
    table = summary_rows(finished_run)
    assert table.width <= MAX_WIDTH
    assert max(map(len, table.to_text().splitlines())) <= MAX_WIDTH


def edit_clients(folder, **changes) -> None:
    path = folder / "clients.json"
    path.write_text(json.dumps([{**client, **changes} for client in json.loads(path.read_text())]))


def test_summary_shortens_long_tasks(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=1)
    edit_clients(folder, tasks=[f"a-rather-long-name-of-a-task-{i}" for i in range(4)])
    (folder / "schedule.json").unlink()  # of two tasks per client
    table = summary_rows(folder)
    assert table.width <= MAX_WIDTH
    assert {row[2] for row in table.rows[:2]} <= {"4 tasks", "a-rather-long-name-of-a-task-0 +3"}


def test_summary_leaves_strategies_out_rather_than_breaking_lines(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=1)
    path = folder / "metrics.jsonl"
    text = path.read_text()
    path.write_text(
        text + "".join(text.replace('"local"', f'"other-strategy-{i}"') for i in range(5))
    )
    table = summary_rows(folder)
    assert table.width <= MAX_WIDTH
    assert any("fedmosaic" in head for head in table.columns)
    assert any("Left out for width" in note for note in table.notes)


def test_an_unfinished_run_says_so(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=2)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-40]) + "\n")
    assert any("Not finished: fedmosaic" in note for note in summary_rows(folder).notes)


def test_comparison_is_paired_inside_each_run(make_run, tmp_path):
    folders = [
        make_run(tmp_path / f"run{seed}", seed=seed, num_clients=3, rounds=2) for seed in range(3)
    ]
    runs = [load_run(folder) for folder in folders]
    table = compare_rows(folders)
    assert [row[0] for row in table.rows] == ["base", "local", "fedmosaic"]
    gains = [
        run.strategies["fedmosaic"].others_mean - run.strategies["local"].others_mean
        for run in runs
    ]
    centre, half = statistics.fmean(gains), 4.30265 * statistics.stdev(gains) / math.sqrt(3)
    cell = table.rows[2][table.columns.index("Others\nvs local")]
    assert cell == f"{100 * centre:+.1f} ± {100 * half:.1f} **"
    assert table.rows[1][table.columns.index("Others\nvs local")] == "-"


def test_a_difference_that_is_not_chance_is_marked(make_run, tmp_path):
    folders = [make_run(tmp_path / f"r{seed}", seed=seed, rounds=2) for seed in range(3)]
    table = compare_rows(folders)
    marked = table.rows[2][table.columns.index("Others\nvs local")]
    # One strategy beside the reference: one test a column, so what passes it passes all.
    assert marked.endswith(" **")
    assert any("Holm" in note for note in table.notes)
    assert not any("Holm" in note for note in compare_rows(folders[:1]).notes)


def test_what_needs_a_schedule_is_left_out_without_it(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=2)
    (folder / "schedule.json").unlink()
    assert [row[0] for row in summary_rows(folder).rows[2:]] == ["mean", "worst client", "A_AUC"]
    assert "forgetting" not in compare_rows([folder]).columns
    strategy = json.loads(write_summary(folder).read_text())["strategies"]["fedmosaic"]
    assert strategy["forgetting"] is None
    assert strategy["a_auc"] is not None


def test_one_run_has_no_interval(finished_run):
    assert not any("±" in cell for row in compare_rows([finished_run]).rows for cell in row)


def test_comparing_nothing_is_an_error():
    with pytest.raises(DataError, match="no run folder"):
        compare_rows([])


def test_summary_file_holds_the_same_numbers(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=1)
    path = write_summary(folder)
    assert path == folder / "summary.json"
    record = json.loads(path.read_text())
    assert record["main"] == "fedmosaic"
    metrics = load_run(folder).strategies["fedmosaic"]
    assert record["strategies"]["fedmosaic"]["self"] == pytest.approx(metrics.self_mean)
    assert set(record["strategies"]["fedmosaic"]["views"]) == {"gated", "local", "global"}
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".part") == []


def test_formats():
    assert [percent(0.1234), percent(None)] == ["12.3", "-"]
    assert [readable_bytes(v) for v in (0, 1023, 1536, 3 * 2**20, 5 * 2**30, None)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "-",
    ]
    assert [seconds(v) for v in (1.25, 120, 3599.6, None)] == [
        "1.2 s",
        "2 min 00 s",
        "60 min 00 s",
        "-",
    ]


def test_table_as_text_markdown_and_transposed():
    table = SummaryTable(["name\nlong", "x"], [["a", "1.0"], ["sum", "10.0"]], ["A note."], 1, 1)
    assert table.to_text().splitlines() == [
        "name |",
        "long |    x",
        "-----+-----",
        "a    |  1.0",
        "-----+-----",
        "sum  | 10.0",
        "A note.",
    ]
    assert table.to_markdown().splitlines()[:3] == [
        "| name long | x |",
        "| --- | ---: |",
        "| a | 1.0 |",
    ]
    turned = table.transposed()
    assert turned.columns == ["name long", "a", "sum"]
    assert turned.rows == [["x", "1.0", "10.0"]]
