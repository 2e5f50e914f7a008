"""Cells of a comparison put together, its files, and the leaderboard of several."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fedml_plugin_fedmosaic.report import plots
from fedml_plugin_fedmosaic.report.cells import Cells, Joined, join_cells
from fedml_plugin_fedmosaic.report.leaderboard import (
    leaderboard_table,
    mean_ranks,
    write_leaderboard,
)
from fedml_plugin_fedmosaic.report.measures import cost_table, score_table
from fedml_plugin_fedmosaic.report.results import Origin, write_results

ORIGIN = Origin(title="Tiny", command="fedmosaic compare --seeds 2", commit="abc")


def only(folder: Path, *names: str) -> None:
    """Keeps some strategies' events of a run, as a cell's."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["strategy"] in names]
    path.write_text("\n".join(kept) + "\n")


@pytest.fixture
def cells(make_run, tmp_path) -> Cells:
    found: dict[str, dict[int, Path]] = {}
    for name, also in (("local", ("base",)), ("fedmosaic", ())):
        for seed in (4, 5):
            folder = make_run(tmp_path / f"{name}-{seed}", seed=seed, num_clients=3, rounds=2)
            only(folder, name, *also)
            found.setdefault(name, {})[seed] = folder
    return found


@pytest.fixture
def joined(cells) -> Joined:
    return join_cells(cells)


def test_cells_of_one_seed_become_one_run(joined):
    assert joined.seeds == (4, 5)
    assert joined.missing == ()
    assert [run.ordered for run in joined.runs] == [("base", "local", "fedmosaic")] * 2
    # The base model was scored in the cells of local, the transfer is measured against it.
    assert joined.runs[0].strategies["fedmosaic"].forward_transfer is not None
    rows = {row[0]: row for row in score_table(joined.runs).rows}
    assert set(rows) == {"base", "local", "fedmosaic"}


def test_only_finished_cells_count(cells):
    path = cells["fedmosaic"][5] / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    found = join_cells({**cells, "fedavg": {4: path.parent / "nowhere"}})
    assert found.missing == (("fedmosaic", 5), ("fedavg", 4))
    assert [run.ordered for run in found.runs] == [
        ("base", "local", "fedmosaic"),
        ("base", "local"),
    ]


def test_the_tables_share_the_columns(joined):
    scores, cost = score_table(joined.runs), cost_table(joined.runs)
    assert scores.columns[:3] == ["strategy", "runs", "Self\nA_last"]
    assert "training\ntime" not in scores.columns
    assert cost.columns == [
        "strategy",
        "up / client\nand round",
        "down / client\nand round",
        "steps",
        "training\ntime",
    ]
    assert [row[0] for row in cost.rows] == ["local", "fedmosaic"]


def test_the_files_say_how_to_repeat_and_quote_the_results(joined, tmp_path):
    page, results, text = write_results(tmp_path / "out", joined, ORIGIN)
    assert "<svg" in page.read_text()
    record = json.loads(results.read_text())
    assert (record["command"], record["commit"]) == (ORIGIN.command, "abc")
    assert record["seeds"] == [4, 5]
    assert record["config"]["train_args"]["federated_optimizer"] == "FedMosaic"
    assert "packages" in record["environment"]
    ours = record["strategies"]["fedmosaic"]["self"]
    assert ours["mean"] == pytest.approx(sum(ours["by_seed"].values()) / 2)
    theirs = record["strategies"]["local"]["self"]["by_seed"]
    difference = ours["minus_local"]
    expected = [ours["by_seed"][seed] - theirs[seed] for seed in ("4", "5")]
    assert difference["mean"] == pytest.approx(sum(expected) / 2)
    assert 0 <= difference["p_value"] <= 1
    markdown = text.read_text()
    images = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert len(images) == len(set(images)) > 2
    for image in images:
        ET.parse(tmp_path / "out" / image)  # noqa: S314 - our own file
    assert f"```bash\n{ORIGIN.command}\n```" in markdown


def test_scores_on_unseen_tasks_are_means_over_tasks_and_seeds(cells, tmp_path):
    for seed, gain in ((4, 0.0), (5, 0.2)):
        tasks = [
            {
                "task": task,
                "model": "small",
                "scores": {
                    "aggregated": {"0": 0.3 + gain, "5": 0.6},
                    "fresh": {"0": 0.1, "5": 0.2 + gain},
                },
                "likelihood": {"aggregated": 0.5, "fresh": 0.25},
            }
            for task in ("new-0", "new-1")
        ]
        run = {"strategy": "fedmosaic", "scenario": "unseen", "tasks": tasks}
        path = cells["fedmosaic"][seed] / "adaptation.json"
        path.write_text(json.dumps({"version": 1, "runs": [run]}))
    joined = join_cells(cells)
    page, results, text = write_results(tmp_path / "out", joined, ORIGIN)
    record = json.loads(results.read_text())["unseen"]
    assert list(record) == ["fedmosaic"]
    assert record["fedmosaic"]["aggregated"]["updates"] == pytest.approx({"0": 0.4, "5": 0.6})
    assert record["fedmosaic"]["fresh"]["updates"] == pytest.approx({"0": 0.1, "5": 0.3})
    assert record["fedmosaic"]["aggregated"]["likelihood"] == pytest.approx(0.5)
    assert "<h2>Unseen tasks</h2>" in page.read_text()
    assert "| fedmosaic | aggregated | 50.0 | 40.0 | 60.0 |" in text.read_text()


def test_the_leaderboard_ranks_over_the_experiments(joined, cells, tmp_path):
    other = join_cells({name: {4: seeds[4]} for name, seeds in cells.items()})
    comparisons = {"static": joined, "dynamic": other}
    ranks = mean_ranks(comparisons)
    assert set(ranks) == {"local", "fedmosaic"}
    assert sum(ranks.values()) == 3
    table = leaderboard_table(comparisons)
    assert table.columns == ["strategy", "static", "dynamic", "mean\nrank"]
    assert [row[0] for row in table.rows] == [*sorted(ranks, key=ranks.__getitem__), "base"]
    origins = dict.fromkeys(comparisons, ORIGIN)
    page, results, text = write_leaderboard(
        tmp_path / "bench", comparisons, origins, title="Bench", command="fedmosaic bench x"
    )
    headings = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert headings[:2] == ["Leaderboard", "Self against local"]
    record = json.loads(results.read_text())
    assert set(record["experiments"]) == {"static", "dynamic"}
    assert record["experiments"]["dynamic"]["seeds"] == [4]
    assert text.read_text().startswith("## Bench\n")


def _axes_of(svg: str) -> list[str]:
    return re.findall(r'id="panels-axes_(\d+)"', svg)


def _height(svg: str) -> float:
    return float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[0])


def test_panels_with_long_titles_take_several_rows() -> None:
    items = [("fedavg", -5.0, 2.0, [-6.0, -4.0]), ("fedmosaic", 1.0, None, [1.0])]

    def drawn(*titles: str, one_scale: bool = False) -> str:
        groups = dict.fromkeys(titles, items)
        return plots.intervals(groups, xlabel="points", label="panels", one_scale=one_scale)

    short = drawn("Self", "Others", "A_AUC", "worst client")
    titles = [f"{word}-heterogeneous" for word in ("static", "dynamic", "early", "late", "mixed")]
    long = drawn(*titles, one_scale=True)
    assert len(_axes_of(short)) == 4
    assert len(_axes_of(long)) == 5
    assert _height(long) > 1.5 * _height(short)
    assert all(title in long for title in titles)
    assert len(_axes_of(drawn("a title that is wider than the page " * 4, "Self"))) == 2


def test_panels_share_a_scale_only_if_asked() -> None:
    far, near = [("a", -80.0, None, [-80.0, -60.0])], [("a", 1.0, None, [1.0, 2.0])]

    def ticks(*, one_scale: bool) -> int:
        groups = {"far": far, "near": near}
        svg = plots.intervals(groups, xlabel="points", label="panels", one_scale=one_scale)
        return len(re.findall("[\u2212-]80<", svg))

    assert ticks(one_scale=False) == 1
    assert ticks(one_scale=True) == 2
