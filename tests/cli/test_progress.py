"""Events on the screen: bars on a terminal, lines elsewhere, and tables that are never cut."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from fedml_plugin_fedmosaic.cli.progress import DropLines, LiveProgress, RoundLines
from fedml_plugin_fedmosaic.cli.tables import print_table
from fedml_plugin_fedmosaic.core import events as ev


def evaluated(round_idx: int, scope: str, value: float, strategy: str = "fedavg") -> ev.Evaluated:
    return ev.Evaluated(
        strategy=strategy,
        round_idx=round_idx,
        client_id=0,
        view="local",
        scope="self" if scope == "self" else "others",
        task="t-0",
        metric="accuracy",
        value=value,
        num_samples=10,
    )


def a_run() -> Iterator[ev.Event]:
    """A run of two rounds, the last one without traffic."""
    yield ev.EvaluationProgress(strategy="base", done=1, total=1)
    yield evaluated(-1, "self", 0.25, "base")
    yield evaluated(-1, "others", 0.125, "base")
    yield ev.RunStarted(
        strategy="fedavg", num_rounds=2, num_clients=3, clients_per_round=2, run_dir="r"
    )
    for round_idx, (traffic, value) in enumerate([(2048, 0.5), (0, 0.75)]):
        yield ev.RoundStarted(strategy="fedavg", round_idx=round_idx, cohort=(0, 2))
        for client_id, loss in ((0, 1.0), (2, 2.0)):
            yield ev.StepsDone(
                strategy="fedavg", round_idx=round_idx, client_id=client_id, steps=5, total=5
            )
            yield ev.ClientTrained(
                strategy="fedavg",
                round_idx=round_idx,
                client_id=client_id,
                pass_name="local",  # noqa: S106 - not a password
                num_steps=5,
                num_examples=20,
                num_tokens=40,
                mean_loss=loss,
                duration_s=1.0,
            )
        yield ev.PlanMade(strategy="fedavg", round_idx=round_idx, relevance=None, weights=None)
        yield ev.RoundFinished(
            strategy="fedavg",
            round_idx=round_idx,
            duration_s=3.25,
            uplink_bytes={0: traffic, 2: traffic},
            downlink_bytes={0: traffic},
        )
        yield evaluated(round_idx, "self", value)
        yield ev.EvaluationProgress(strategy="fedavg", done=1, total=1)
    yield evaluated(1, "others", 0.5)
    yield ev.RunFinished(strategy="fedavg", duration_s=8.0, train_s=6.5)


LINES = [
    "base       untouched models  Self 25.0 %  Others 12.5 %",
    "fedavg     2 rounds, 2 of 3 clients a round",
    "fedavg     round 1/2  loss 1.500  Self 50.0 %  up 4.0 KiB, down 2.0 KiB  3.2 s",
    "fedavg     round 2/2  loss 1.500  Self 75.0 %  3.2 s",
    "fedavg     done: training 6.5 s, with evaluation 8.0 s",
]


def test_one_line_per_round() -> None:
    written: list[str] = []
    sink = RoundLines(written.append)
    for event in a_run():
        sink(event)
    assert written == LINES


def test_bars_leave_the_lines_behind() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with LiveProgress(console) as sink:
        for event in a_run():
            sink(event)
            if isinstance(event, ev.StepsDone):
                bars = [task.description.strip() for task in sink._progress.tasks]
                assert bars == ["fedavg", f"client {event.client_id} of 2 clients"]
        assert sink._progress.tasks == []
    for line in LINES:
        assert line in stream.getvalue()


def test_an_interrupted_run_gives_the_terminal_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with pytest.raises(KeyboardInterrupt), LiveProgress(console) as sink:  # noqa: PT012
        for event in a_run():
            sink(event)
            if isinstance(event, ev.ClientTrained):
                raise KeyboardInterrupt
    assert sink._progress.live.is_started is False


@dataclass
class Cells:
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    num_left: int = 1
    num_footer: int = 0


def test_a_table_in_a_log_file_is_whole() -> None:
    stream = io.StringIO()
    cells = Cells(
        ["client", "tasks", "local\nSelf / Others"],
        [["0", "x" * 150, "50.0 / 25.0"], ["mean", "", "[50.0] / 25.0"]],
        notes=["a [note]"],
        num_left=2,
        num_footer=1,
    )
    print_table(cells, Console(file=stream, width=80))
    text = stream.getvalue()
    assert "x" * 150 in text
    assert "[50.0] / 25.0" in text
    assert "a [note]" in text


def test_a_table_fits_a_terminal_of_80_columns() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    cells = Cells(["client", "tasks"], [["0", "word " * 40]])
    print_table(cells, console)
    assert max(map(len, stream.getvalue().splitlines())) <= 80


def dropped(round_idx: int, client_id: int, reason: str) -> ev.ClientDropped:
    return ev.ClientDropped(
        strategy="fedavg", round_idx=round_idx, client_id=client_id, stage="fit", reason=reason
    )


def test_failures_have_their_line_at_once_and_are_never_wide() -> None:
    written: list[str] = []
    lines = RoundLines(written.append)
    lines(ev.RunStarted(
        strategy="fedavg", num_rounds=2, num_clients=3, clients_per_round=3, run_dir="r"
    ))  # fmt: skip
    lines(ev.RoundStarted(strategy="fedavg", round_idx=0, cohort=(0, 1, 2)))
    lines(dropped(0, 2, "RuntimeError: first\n  second " + "x" * 90))
    assert written[1].startswith("fedavg     round 1: client 2 dropped, fit: RuntimeError: first s")
    assert len(written[1]) == 100
    assert written[1].endswith("x...")
    lines(ev.RoundSkipped(
        strategy="fedavg", round_idx=0, delivered=1, needed=2, cohort_size=3
    ))  # fmt: skip
    lines(ev.RoundStarted(strategy="fedavg", round_idx=1, cohort=(0, 1, 2)))
    assert written[2] == "fedavg     round 1/2  skipped (1 delivered, 2 needed)"


def test_other_ranks_show_what_they_drop_and_nothing_else() -> None:
    written: list[str] = []
    sink = DropLines(written.append)
    for event in [*a_run(), dropped(1, 5, "MemoryError: none left")]:
        sink(event)
    assert written == ["fedavg     round 2: client 5 dropped, fit: MemoryError: none left"]
