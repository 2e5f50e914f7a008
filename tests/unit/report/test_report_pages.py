from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.comparison import write_comparison
from fedml_plugin_fedmosaic.report.html import write_report
from fedml_plugin_fedmosaic.report.metrics import load_run
from fedml_plugin_fedmosaic.report.network_plots import main_sources
from fedml_plugin_fedmosaic.report.sections import by_group

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load or jump to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if "href" in values:
            self.links.append(values["href"])
        if "src" in values or tag in {"link", "script", "iframe", "object", "embed"}:
            self.loads.append(tag)
        self.loads += re.findall(r"url\((?!#)[^)]*\)|@import.*", values.get("style") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data.strip())
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"url\((?!#)[^)]*\)|@import.*", data)


@pytest.fixture(scope="module")
def report(make_run, tmp_path_factory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("pages") / "run"))


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.loads == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://", text)
    return page


def test_the_report_is_complete_and_loads_nothing(report):
    page = assert_self_contained(report.read_text())
    assert page.headings == [
        "Result",
        "Accuracy per round",
        "Over the stream",
        "Relevance",
        "Who learns from whom",
        "Every client on every task",
        "Branches",
        "Bytes per round",
        "Training loss",
        "Time",
        "Configuration",
        "Environment",
    ]


def test_figures_are_valid_svg_with_readable_text(report):
    figures = re.findall(r"<svg.*?</svg>", report.read_text(), flags=re.DOTALL)
    assert len(figures) == 11
    for figure in figures:
        root = ET.fromstring(figure)  # noqa: S314 - written by this test
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert root.findall(".//text")
        assert "<image" not in figure


def test_task_boundaries_and_main_sources_are_drawn(report):
    text = report.read_text()
    # Eight rounds, two tasks: the second begins in round 5, in two figures.
    assert len(re.findall(r'id="[\w-]+task-5"', text)) == 2
    arrows = set(re.findall(r'id="[\w-]*from-(\d)-to-(\d)"', text))
    # Clients 0, 3 and 6 are of one group and learn most from each other.
    assert {("0", "3"), ("3", "0"), ("6", "3")} <= arrows
    assert ("1", "0") not in arrows


def test_equal_weights_have_no_main_source():
    uniform = [[None if i == j else 0.5 for j in range(3)] for i in range(3)]
    assert main_sources(uniform) == []
    rows = [[0.9, 0.06, 0.04], [None, None, None], [0.3, 0.1, 0.6]]
    assert main_sources(rows) == [(1, 0, 0.06), (0, 2, 0.3)]


def test_the_report_follows_the_colour_scheme_and_prints(report):
    text = report.read_text()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "currentColor" in text


def test_the_same_run_gives_the_same_page(report):
    before = report.read_text()
    assert write_report(report.parent).read_text() == before


def test_text_from_the_run_is_escaped(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=1)
    path = folder / "clients.json"
    clients = json.loads(path.read_text())
    clients[0]["family"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(clients))
    text = write_report(folder).read_text()
    assert "<script>" not in text
    assert_self_contained(text)


def test_clients_of_one_group_stand_together(finished_run):
    order = [client.client_id for client in by_group(load_run(finished_run))]
    assert order == [0, 3, 6, 1, 4, 7, 2, 5]


def test_one_client_and_many_clients(make_run, tmp_path):
    for count in (1, 26):
        folder = make_run(tmp_path / f"run{count}", num_clients=count, rounds=1)
        assert_self_contained(write_report(folder).read_text())


def test_a_run_that_has_just_started(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=1)
    path = folder / "metrics.jsonl"
    path.write_text("")
    assert "no strategy yet" in write_report(folder).read_text()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_comparison_page(make_run, tmp_path):
    folders = [make_run(tmp_path / f"r{s}", seed=s, num_clients=2, rounds=1) for s in range(3)]
    out = write_comparison(folders, tmp_path / "pages" / "comparison.html")
    page = assert_self_contained(out.read_text())
    assert page.headings == [
        "Result",
        "Scores",
        "Difference to local",
        "Who gains, who loses",
        "Cost",
        "Runs",
    ]
    with pytest.raises(DataError, match="no run folder"):
        write_comparison([], out)


def test_tensorboard_has_the_scalars(make_run, tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from fedml_plugin_fedmosaic.report.records import read_events
    from fedml_plugin_fedmosaic.report.tensorboard import TensorBoardSink

    folder = make_run(tmp_path / "run", num_clients=2, rounds=2)
    with TensorBoardSink(tmp_path / "tb") as sink:
        for event in read_events(folder / "metrics.jsonl"):
            sink(event)
    reader = tensorboard.EventAccumulator(str(tmp_path / "tb"))
    reader.Reload()
    tags = set(reader.Tags()["scalars"])
    assert {"fedmosaic/bytes/up", "fedmosaic/loss/local/client0", "local/round_s"} <= tags
    assert [item.step for item in reader.Scalars("fedmosaic/loss/local/client1")] == [1, 2]
