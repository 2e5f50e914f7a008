from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.report.html import write_report
from fedml_plugin_fedmosaic.report.metrics import StrategyMetrics, load_run
from fedml_plugin_fedmosaic.report.records import read_events
from fedml_plugin_fedmosaic.report.relations import mixing
from fedml_plugin_fedmosaic.report.tables import summary_record


def evaluated(**changes) -> ev.Evaluated:
    values = {
        "strategy": "s",
        "round_idx": 0,
        "client_id": 0,
        "view": "gated",
        "scope": "self",
        "task": "a-0",
        "metric": "accuracy",
        "value": 0.5,
        "num_samples": 10,
    }
    return ev.Evaluated(**{**values, **changes})


STORED = [
    ev.RunStarted(strategy="s", num_rounds=2, num_clients=2, clients_per_round=1, run_dir="runs/x"),
    ev.RoundStarted(strategy="s", round_idx=0, cohort=(0, 1)),
    ev.ClientTrained(
        strategy="s",
        round_idx=0,
        client_id=1,
        pass_name="local",  # noqa: S106 - a training pass
        num_steps=3,
        num_examples=12,
        num_tokens=40,
        mean_loss=0.7,
        duration_s=0.5,
    ),
    ev.ClientProbed(
        strategy="s",
        round_idx=0,
        client_id=1,
        probe_name="public",
        num_models=2,
        num_examples=4,
        duration_s=0.25,
        flops=1e6,
    ),
    ev.ClientReported(strategy="s", round_idx=0, client_id=1, values={"cluster": 2}),
    ev.ClientDropped(
        strategy="s", round_idx=0, client_id=1, stage="fit", reason="MemoryError: none left"
    ),
    ev.RoundSkipped(strategy="s", round_idx=0, delivered=1, needed=2, cohort_size=3),
    ev.PlanMade(strategy="s", round_idx=0, relevance=((None, 0.5), (0.5, None)), weights=None),
    ev.RoundFinished(
        strategy="s", round_idx=0, duration_s=1.0, uplink_bytes={0: 4, 1: 8}, downlink_bytes={}
    ),
    evaluated(final=True),
    ev.RunFinished(strategy="s", duration_s=2.0, train_s=1.0),
]


@pytest.mark.parametrize("event", STORED, ids=lambda event: type(event).__name__)
def test_every_stored_event_survives_json(event):
    assert ev.from_record(json.loads(json.dumps(ev.to_record(event)))) == event


def test_every_event_type_is_transient_or_read():
    known = {type(event) for event in STORED} | set(ev.TRANSIENT)
    assert {kind.__name__ for kind in ev.Event.__subclasses__()} == {k.__name__ for k in known}


def write(path: Path, events, tail: str = "") -> Path:
    lines = "".join(json.dumps(ev.to_record(event)) + "\n" for event in events)
    path.write_text(lines + tail)
    return path


def test_a_torn_last_line_is_left_out(tmp_path, caplog):
    path = write(tmp_path / "metrics.jsonl", STORED[:2], '{"event": "RoundSta')
    assert read_events(path) == STORED[:2]
    assert f"{path}:3" in caplog.text


@pytest.mark.parametrize(
    "line",
    ['{"event": "RoundStarted"', '{"event": "RoundStarted", "strategy": "s"}', "[]", '{"x": 1}'],
)
def test_a_damaged_line_names_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(ev.to_record(STORED[0]))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not an event record"):
        read_events(path)


def test_a_complete_but_wrong_last_line_is_an_error(tmp_path):
    path = write(tmp_path / "metrics.jsonl", STORED[:1], '{"event": "RoundStarted"}\n')
    with pytest.raises(DataError, match=r":2: "):
        read_events(path)


def test_unknown_event_types_are_left_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", STORED[:1], '{"event": "FromTheFuture"}\n')
    assert read_events(path) == STORED[:1]


def test_missing_files_are_errors_with_a_hint(tmp_path):
    with pytest.raises(DataError, match="no such file") as caught:
        load_run(tmp_path)
    assert caught.value.hint
    write(tmp_path / "metrics.jsonl", STORED)
    with pytest.raises(DataError, match=r"clients\.json: no such file"):
        load_run(tmp_path)
    (tmp_path / "clients.json").write_text('[{"client_id": 0}]')
    with pytest.raises(DataError, match="position 0 lacks 'model'"):
        load_run(tmp_path)


def test_means_are_over_tasks_then_over_clients():
    metrics = StrategyMetrics(
        "s",
        [
            evaluated(client_id=0, task="a-0", value=0.2),
            evaluated(client_id=0, task="a-1", value=0.6),
            evaluated(client_id=1, task="b-0", value=0.8),
            evaluated(client_id=1, task="a-0", scope="others", value=0.1),
        ],
    )
    assert metrics.client_scores("self") == pytest.approx({0: 0.4, 1: 0.8})
    assert metrics.self_mean == pytest.approx(0.6)
    assert metrics.worst == pytest.approx(0.4)
    assert metrics.client_scores("others") == pytest.approx({1: 0.1})


def test_the_final_score_replaces_the_rounds_own_in_any_order():
    quick, full = evaluated(value=0.3), evaluated(value=0.5, final=True)
    for events in ([quick, full], [full, quick]):
        assert StrategyMetrics("s", events).self_mean == pytest.approx(0.5)


def test_area_under_the_curve_is_the_mean_over_rounds_without_the_base():
    events = [evaluated(round_idx=r, value=v) for r, v in ((-1, 0.0), (0, 0.2), (1, 0.6))]
    assert StrategyMetrics("s", events).a_auc == pytest.approx(0.4)


def test_the_mean_curve_has_only_rounds_that_every_client_has():
    events = [evaluated(client_id=c, round_idx=r) for c, r in ((0, 0), (0, 1), (1, 1))]
    assert list(StrategyMetrics("s", events).mean_curve) == [1]


def test_other_views_do_not_mix_with_the_strategys_own():
    events = [evaluated(value=0.5), evaluated(view="local", value=0.9)]
    metrics = StrategyMetrics("s", events)
    assert metrics.views == ("gated", "local")
    assert metrics.self_mean == pytest.approx(0.5)
    assert metrics.client_scores("self", "local") == pytest.approx({0: 0.9})


def finished(uplink: dict[int, int], duration_s: float) -> ev.RoundFinished:
    return ev.RoundFinished(
        strategy="s", round_idx=0, duration_s=duration_s, uplink_bytes=uplink, downlink_bytes={}
    )


def test_records_of_several_ranks_are_one_round():
    metrics = StrategyMetrics("s", [finished({0: 10}, 1.0), finished({1: 30}, 2.0)])
    assert metrics.rounds[0].uplink_bytes == {0: 10, 1: 30}
    assert metrics.rounds[0].duration_s == 2.0
    assert metrics.bytes_per_client_round("uplink") == 20


def test_a_repeated_round_counts_once():
    metrics = StrategyMetrics("s", [*STORED, *STORED])
    assert metrics.num_steps == 3
    assert metrics.rounds[0].uplink_bytes == {0: 4, 1: 8}
    assert metrics.losses() == {1: {0: pytest.approx(0.7)}}


def test_a_run_knows_its_main_strategy_and_order(finished_run):
    run = load_run(finished_run)
    assert run.main == "fedmosaic"
    assert run.ordered == ("base", "local", "fedmosaic")
    assert len(run.tasks) == 9
    assert run.environment["seed"] == 0


def test_the_main_strategy_without_a_configuration_is_the_last(make_run, tmp_path):
    folder = make_run(tmp_path / "run", num_clients=2, rounds=1)
    (folder / "config.yaml").unlink()
    assert load_run(folder).main == "fedmosaic"


def test_sources_that_count_leave_out_the_client_itself_and_take_the_last_round():
    def plan(round_idx, weights):
        return ev.PlanMade(strategy="s", round_idx=round_idx, relevance=None, weights=weights)

    third = 1 / 3
    early = plan(0, ((0.0, 1.0, 0.0, 0.0),) * 4)
    last = plan(
        1,
        (
            (0.9, 0.05, 0.05, 0.0),  # two others alike, whatever it keeps of its own
            (third, 0.0, third, third),  # three
            (0.0, 1.0, 0.0, 0.0),  # one
            (None, None, None, None),  # was not there
        ),
    )
    assert StrategyMetrics("s", (last, early)).effective_sources == pytest.approx((2 + 3 + 1) / 3)
    assert StrategyMetrics("s", (plan(0, None),)).effective_sources is None
    assert StrategyMetrics("s", ()).effective_sources is None


def test_the_page_and_the_summary_say_how_many_sources_count(make_run, tmp_path):
    folder = make_run(tmp_path / "run")
    run = load_run(folder)
    section = mixing(run)
    assert section is not None
    assert section.table is not None
    record = summary_record(run)["strategies"][run.main]
    shown = [float(row[-1]) for row in section.table.rows]
    assert section.table.columns[-1] == "others that\ncount"
    assert sum(shown) / len(shown) == pytest.approx(record["effective_sources"], abs=0.05)
    assert 1 <= record["effective_sources"] < len(run.clients) - 1
    assert f"{len(run.clients) - 1} is a plain average" in section.table.notes[0]
    assert "is a plain average" in write_report(folder).read_text(encoding="utf-8")
