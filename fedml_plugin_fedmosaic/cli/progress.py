"""A run on the screen: bars on a terminal, one line per round elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fedml_plugin_fedmosaic.core.events import (
    ClientDropped,
    ClientTrained,
    Evaluated,
    EvaluationProgress,
    Event,
    RoundFinished,
    RoundSkipped,
    RoundStarted,
    RunFinished,
    RunStarted,
    StepsDone,
)
from fedml_plugin_fedmosaic.report.numbers import percent, readable_bytes, seconds

_WIDTH = 100


def dropped_line(event: ClientDropped) -> str:
    """A dropped client in one line of at most 100 characters."""
    reason = " ".join(event.reason.split())
    line = (
        f"{event.strategy:<10} round {event.round_idx + 1}: client {event.client_id} dropped, "
        f"{event.stage}: {reason}"
    )
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."


class DropLines:
    """Event sink of the ranks that show nothing else: one line per client that they drop.

    Args:
        write: takes each line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        if isinstance(event, ClientDropped):
            self._write(dropped_line(event))


@dataclass(slots=True)
class _Round:
    """What is known of the round that runs now."""

    strategy: str
    round_idx: int
    cohort: tuple[int, ...] = ()
    losses: list[float] = field(default_factory=list)
    finished: RoundFinished | None = None
    own: list[float] = field(default_factory=list)
    skipped: RoundSkipped | None = None

    def line(self, num_rounds: int) -> str:
        """The round in one line."""
        parts = [f"{self.strategy:<10} round {self.round_idx + 1}/{num_rounds}"]
        if self.skipped is not None:
            few = self.skipped
            parts.append(f"skipped ({few.delivered} delivered, {few.needed} needed)")
        if self.losses:
            parts.append(f"loss {sum(self.losses) / len(self.losses):.3f}")
        if self.own:
            parts.append(f"Self {percent(sum(self.own) / len(self.own))} %")
        if self.finished is not None:
            up = sum(self.finished.uplink_bytes.values())
            down = sum(self.finished.downlink_bytes.values())
            if up or down:
                parts.append(f"up {readable_bytes(up)}, down {readable_bytes(down)}")
            parts.append(seconds(self.finished.duration_s))
        return "  ".join(parts)


class RoundLines:
    """Event sink: one line per round, when its evaluation is over.

    Args:
        write: takes each line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._num_rounds = 0
        self._round: _Round | None = None
        self._base: list[Evaluated] = []

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        match event:
            case RunStarted():
                self._num_rounds = event.num_rounds
                self._flush_base()
                drawn = f"{event.clients_per_round} of {event.num_clients} clients a round"
                self._write(f"{event.strategy:<10} {event.num_rounds} rounds, {drawn}")
            case RoundStarted():
                self._flush()
                self._round = _Round(event.strategy, event.round_idx, event.cohort)
            case ClientTrained() if self._round is not None:
                self._round.losses.append(event.mean_loss)
            case ClientDropped():
                self._write(dropped_line(event))
            case RoundSkipped() if self._round is not None:
                self._round.skipped = event
            case RoundFinished() if self._round is not None:
                self._round.finished = event
            case Evaluated() if event.round_idx < 0:
                self._base.append(event)
            case Evaluated() if self._round is not None and event.scope == "self":
                self._round.own.append(event.value)
            case RunFinished():
                self._flush()
                self._write(
                    f"{event.strategy:<10} done: training {seconds(event.train_s)}, "
                    f"with evaluation {seconds(event.duration_s)}"
                )
            case _:
                pass

    def _flush(self) -> None:
        if self._round is not None:
            self._write(self._round.line(self._num_rounds))
            self._round = None

    def _flush_base(self) -> None:
        own = [event.value for event in self._base if event.scope == "self"]
        others = [event.value for event in self._base if event.scope == "others"]
        if own:
            text = f"{'base':<10} untouched models  Self {percent(sum(own) / len(own))} %"
            if others:
                text += f"  Others {percent(sum(others) / len(others))} %"
            self._write(text)
        self._base = []


class LiveProgress:
    """Event sink: bars for rounds, the clients' steps and evaluation, above them the round lines.

    Use it as a context manager; it leaves the round lines behind and removes the bars.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            expand=True,
        )
        self._lines = RoundLines(self._print)
        self._rounds: TaskID | None = None
        self._work: TaskID | None = None
        self._position = ""

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def _print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        self._lines(event)
        match event:
            case RunStarted():
                self._drop_work()
                self._rounds = self._progress.add_task(event.strategy, total=event.num_rounds)
            case RoundStarted():
                self._drop_work()
                self._position = f"of {len(event.cohort)} clients"
            case StepsDone():
                text = f"  client {event.client_id} {self._position}"
                self._show_work(text, event.steps, event.total)
            case EvaluationProgress():
                self._show_work(f"  evaluation {event.strategy}", event.done, event.total)
            case RoundFinished() if self._rounds is not None:
                self._progress.update(self._rounds, completed=event.round_idx + 1)
            case RunFinished():
                self._drop_work()
                if self._rounds is not None:
                    self._progress.remove_task(self._rounds)
                    self._rounds = None
            case _:
                pass

    def _show_work(self, text: str, done: int, total: int) -> None:
        if self._work is None:
            self._work = self._progress.add_task(text, total=total)
        self._progress.update(self._work, description=text, completed=done, total=total)

    def _drop_work(self) -> None:
        if self._work is not None:
            self._progress.remove_task(self._work)
            self._work = None
