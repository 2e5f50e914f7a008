from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.report.groups import agreement_with_data, groups
from fedml_plugin_fedmosaic.report.matrix_plots import membership
from fedml_plugin_fedmosaic.report.metrics import Run, StrategyMetrics
from fedml_plugin_fedmosaic.report.records import ClientInfo
from fedml_plugin_fedmosaic.report.sections import all_sections
from fedml_plugin_fedmosaic.report.style import COLOURS
from fedml_plugin_fedmosaic.report.tables import summary_record, summary_table


def client(client_id: int, data: str, signature: str = "s") -> ClientInfo:
    return ClientInfo(
        client_id=client_id,
        model=signature,
        family=signature,
        size="1M",
        signature=signature,
        tasks=(f"{data}-0", f"{data}-1"),
        num_examples=4,
    )


def planned(round_idx: int, found: Mapping[int, str] | None, strategy: str = "ifca") -> ev.PlanMade:
    return ev.PlanMade(
        strategy=strategy, round_idx=round_idx, relevance=None, weights=None, groups=found
    )


def run_of(clients: tuple[ClientInfo, ...], *events: ev.PlanMade) -> Run:
    names = dict.fromkeys(event.strategy for event in events)
    return Run(
        path=Path(),
        clients=clients,
        strategies={
            name: StrategyMetrics(name, tuple(e for e in events if e.strategy == name))
            for name in names
        },
        main=next(iter(names)),
        config="",
        environment={},
    )


CATS_AND_DOGS = tuple(client(i, "cats" if i % 2 else "dogs") for i in range(4))
MOVING = (
    planned(0, {0: "1", 1: "2"}),
    planned(1, {0: "1", 1: "1", 2: "1"}),
    planned(2, {0: "1", 1: "2", 2: "1", 3: "2"}),
)


def test_a_row_per_strategy_that_finds_groups() -> None:
    run = run_of(CATS_AND_DOGS, *MOVING, planned(0, None, "fedavg"))
    section = groups(run)
    assert section is not None
    assert section.table is not None
    # Client 1 moves to group 1 and back; that client 3 appears is no move.
    assert section.table.rows == [["ifca", "2", "2 + 2", "2", "3", "1.00"]]
    assert len(section.figures) == 1
    assert section in all_sections(run)


def test_the_figure_has_a_colour_and_a_name_per_group() -> None:
    section = groups(run_of(CATS_AND_DOGS, *MOVING))
    assert section is not None
    svg = section.figures[0].svg
    assert all(colour.lower() in svg.lower() for colour in COLOURS[:2])
    assert COLOURS[2].lower() not in svg.lower()
    assert "Groups of ifca by client and round" in svg
    assert "0  dogs" in svg


def test_many_groups_and_rounds_and_clients_can_be_drawn() -> None:
    names = [f"A{i}" for i in range(30)]
    rounds = [str(i) for i in range(25)]
    svg = membership([[name] * 25 for name in names], names, rounds, label="many")
    assert svg.startswith("<svg")
    assert "nan" not in svg.lower()
    crowd = tuple(client(i, "cats") for i in range(61))
    everyone = planned(0, {i: str(i % 3) for i in range(61)})
    section = groups(run_of(crowd, everyone))
    assert section is not None
    assert section.figures == ()
    assert section.table is not None
    assert section.table.rows[0][:4] == ["ifca", "3", "21 + 20 + 20", "0"]


def test_runs_without_groups_have_no_section() -> None:
    run = run_of(CATS_AND_DOGS, planned(0, None))
    assert groups(run) is None
    assert not any("Groups of" in note for note in summary_table(run).notes)
    record = summary_record(run)["strategies"]["ifca"]
    assert record["groups"] is None
    assert record["group_moves"] is None


def test_summaries_name_the_groups() -> None:
    run = run_of(CATS_AND_DOGS, *MOVING)
    note = "Groups of ifca after the last round (clients): 1: 0, 2; 2: 1, 3."
    assert note in summary_table(run).notes
    record = summary_record(run)["strategies"]["ifca"]
    assert record["groups"] == {"0": "1", "1": "2", "2": "1", "3": "2"}
    assert record["group_moves"] == 2
    crowd = run_of(CATS_AND_DOGS, planned(0, dict.fromkeys(range(13), "1")))
    assert crowd.strategies["ifca"].group_text == "1: 13 clients"


def test_agreement_is_the_adjusted_rand_index() -> None:
    # 6 clients, {0, 1, 2 | 3, 4, 5} against {0, 1 | 2, 3, 4, 5}: found 4 pairs, expected
    # 6 * 7 / 15 = 2.8, possible 6.5.
    clients = tuple(client(i, "cats" if i < 2 else "dogs") for i in range(6))
    found = {i: "1" if i < 3 else "2" for i in range(6)}
    assert agreement_with_data(found, clients) == pytest.approx((4 - 2.8) / (6.5 - 2.8))


def test_agreement_counts_pairs_of_one_signature_only() -> None:
    clients = tuple(client(i, "cats" if i % 2 else "dogs", "s" if i < 4 else "t") for i in range(8))
    found = {i: f"{'A' if i < 4 else 'B'}{i % 2}" for i in range(8)}
    assert agreement_with_data(found, clients) == 1.0


@pytest.mark.parametrize(
    "found", [{}, {0: "1"}, {0: "1", 2: "1"}], ids=["nobody", "one client", "one kind of data"]
)
def test_agreement_without_contrast_is_not_defined(found: dict[int, str]) -> None:
    assert agreement_with_data(found, CATS_AND_DOGS) is None


def test_groups_survive_the_metrics_file_and_old_files_can_be_read() -> None:
    event = planned(1, {3: "A1", 0: "B2"})
    assert ev.from_record(json.loads(json.dumps(ev.to_record(event)))) == event
    old = {key: value for key, value in ev.to_record(event).items() if key != "groups"}
    assert ev.from_record(old) == planned(1, None)
