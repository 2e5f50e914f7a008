"""Sums up the events of one strategy: Self, Others, curves, bytes, losses, relevance.

Self is a client's mean accuracy over its own tasks, Others over all other tasks; both are shares in
[0, 1]. Means over clients give every client the same weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fedml_plugin_fedmosaic.core import events as ev
from fedml_plugin_fedmosaic.data.metrics import a_auc
from fedml_plugin_fedmosaic.data.statistics import effective_number
from fedml_plugin_fedmosaic.report.learning import Stream, forgetting_of, forward_transfer_of

_SERVER = "server"
_LISTED = 12


def on_server(pass_name: str) -> bool:
    """Whether a pass is the server's own training, which a client's rank group carries out."""
    return pass_name == _SERVER or pass_name.startswith(f"{_SERVER}.")


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    items = list(values)
    return sum(items) / len(items) if items else None


def others_number(row: Sequence[float | None], receiver: int) -> float | None:
    """Effective number of sources among the others in a row of mixing weights.

    Args:
        row: weights of all sources; None where unknown.
        receiver: index of the client itself, whose weight for itself does not count.
    """
    return effective_number(value or 0.0 for j, value in enumerate(row) if j != receiver)


@dataclass(frozen=True)
class StrategyMetrics:
    """All events of one strategy of a run; a repeated round (after a resume) counts once.

    Attributes:
        name: strategy, or ``base``.
        events: its events in file order.
        stream: when the clients' tasks arrive, and what the base models score.
    """

    name: str
    events: Sequence[ev.Event] = field(repr=False)
    stream: Stream = field(default_factory=Stream, repr=False)

    @cached_property
    def started(self) -> ev.RunStarted | None:
        """The last start, or None."""
        return next((e for e in reversed(self.events) if isinstance(e, ev.RunStarted)), None)

    @cached_property
    def finished(self) -> ev.RunFinished | None:
        """The end (of the slowest rank), or None if the strategy has not finished."""
        ends = [event for event in self.events if isinstance(event, ev.RunFinished)]
        return max(ends, key=lambda event: event.duration_s, default=None)

    @cached_property
    def rounds(self) -> dict[int, ev.RoundFinished]:
        """Finished rounds by index; the bytes of several ranks' records are put together."""
        found: dict[int, ev.RoundFinished] = {}
        for event in self.events:
            if isinstance(event, ev.RoundFinished):
                known = found.get(event.round_idx)
                found[event.round_idx] = event if known is None else _merged(known, event)
        return dict(sorted(found.items()))

    @cached_property
    def plans(self) -> dict[int, ev.PlanMade]:
        """Relevance and mixing weights by round index."""
        found = {e.round_idx: e for e in self.events if isinstance(e, ev.PlanMade)}
        return dict(sorted(found.items()))

    @property
    def effective_sources(self) -> float | None:
        """How many others a client learns from in the last round; None if nobody mixes others.

        Mean over the clients of :func:`others_number`.
        """
        weights = [plan.weights for plan in self.plans.values() if plan.weights is not None]
        numbers = [others_number(row, i) for i, row in enumerate(weights[-1])] if weights else []
        return mean(number for number in numbers if number is not None)

    @cached_property
    def groups(self) -> dict[int, dict[int, str]]:
        """Client -> name of its group, by round index; empty if the strategy finds no groups."""
        return {r: dict(plan.groups) for r, plan in self.plans.items() if plan.groups}

    @cached_property
    def group_moves(self) -> tuple[tuple[int, int], ...]:
        """Round index and client of each change from one group to another, in order."""
        found: list[tuple[int, int]] = []
        last: dict[int, str] = {}
        for round_idx, members in self.groups.items():
            found += [
                (round_idx, c) for c in sorted(members) if last.get(c, members[c]) != members[c]
            ]
            last.update(members)
        return tuple(found)

    @property
    def group_text(self) -> str:
        """The groups of the last round in a few words; empty without any."""
        members: dict[str, list[int]] = {}
        for client, name in sorted(self.groups[max(self.groups)].items()) if self.groups else ():
            members.setdefault(name, []).append(client)
        return "; ".join(
            f"{name}: {', '.join(map(str, ids)) if len(ids) <= _LISTED else f'{len(ids)} clients'}"
            for name, ids in sorted(members.items())
        )

    @cached_property
    def trained(self) -> tuple[ev.ClientTrained, ...]:
        """Training passes in order of round and client."""
        found = {
            (e.round_idx, e.client_id, e.pass_name): e
            for e in self.events
            if isinstance(e, ev.ClientTrained)
        }
        return tuple(found[key] for key in sorted(found))

    @cached_property
    def cohorts(self) -> dict[int, tuple[int, ...]]:
        """Clients that were asked to train, by round index."""
        found = {e.round_idx: e.cohort for e in self.events if isinstance(e, ev.RoundStarted)}
        return dict(sorted(found.items()))

    @cached_property
    def dropped(self) -> tuple[ev.ClientDropped, ...]:
        """Clients that did not deliver, in order of round and client."""
        found = {
            (e.round_idx, e.client_id): e for e in self.events if isinstance(e, ev.ClientDropped)
        }
        return tuple(found[key] for key in sorted(found))

    @cached_property
    def skipped(self) -> dict[int, ev.RoundSkipped]:
        """Rounds without a quorum, by index."""
        found = {e.round_idx: e for e in self.events if isinstance(e, ev.RoundSkipped)}
        return dict(sorted(found.items()))

    @property
    def failure_text(self) -> str:
        """Dropped clients and skipped rounds in a few words; empty without any."""
        parts = []
        if self.dropped:
            stages = Counter(event.stage for event in self.dropped)
            counts = ", ".join(f"{stage} {count}" for stage, count in sorted(stages.items()))
            parts.append(f"{len(self.dropped)} dropped ({counts})")
        if self.skipped:
            noun = "round" if len(self.skipped) == 1 else "rounds"
            parts.append(f"{len(self.skipped)} {noun} skipped without a quorum")
        return ", ".join(parts)

    @cached_property
    def view(self) -> str | None:
        """The strategy's own view: that of its first evaluation."""
        return next((e.view for e in self.events if isinstance(e, ev.Evaluated)), None)

    @cached_property
    def views(self) -> tuple[str, ...]:
        """All evaluated views, the strategy's own first."""
        return tuple(dict.fromkeys(e.view for e in self.events if isinstance(e, ev.Evaluated)))

    def scores(self, view: str | None = None) -> dict[int, dict[int, dict[str, ev.Evaluated]]]:
        """Evaluations as ``{round_idx: {client_id: {task: event}}}``.

        A final evaluation takes the place of the round's own, because it uses all test samples.

        Args:
            view: branches; the strategy's own when None.
        """
        wanted = self.view if view is None else view
        table: dict[int, dict[int, dict[str, ev.Evaluated]]] = {}
        for event in self.events:
            if not isinstance(event, ev.Evaluated) or event.view != wanted:
                continue
            row = table.setdefault(event.round_idx, {}).setdefault(event.client_id, {})
            known = row.get(event.task)
            if known is None or event.final or not known.final:
                row[event.task] = event
        return dict(sorted(table.items()))

    def final_scores(self, view: str | None = None) -> dict[int, dict[str, ev.Evaluated]]:
        """The last round's evaluations as ``{client_id: {task: event}}``; empty without any."""
        table = self.scores(view)
        return table[max(table)] if table else {}

    def client_scores(self, scope: str, view: str | None = None) -> dict[int, float]:
        """Mean over a client's tasks after the last round, in [0, 1].

        Args:
            scope: ``self`` or ``others``.
            view: branches; the strategy's own when None.
        """
        return _over_tasks(self.final_scores(view), scope)

    @cached_property
    def curves(self) -> dict[int, dict[int, float]]:
        """Self per client and round: ``{client_id: {round_idx: mean over tasks}}``."""
        lines: dict[int, dict[int, float]] = {}
        for round_idx, clients in self.scores().items():
            for client_id, value in _over_tasks(clients, "self").items():
                lines.setdefault(client_id, {})[round_idx] = value
        return dict(sorted(lines.items()))

    @cached_property
    def mean_curve(self) -> dict[int, float]:
        """Mean of :attr:`curves` over the clients, at the rounds where every client has a value."""
        if not self.curves:
            return {}
        common = set.intersection(*(set(line) for line in self.curves.values()))
        return {
            round_idx: sum(line[round_idx] for line in self.curves.values()) / len(self.curves)
            for round_idx in sorted(common)
        }

    @property
    def self_mean(self) -> float | None:
        """Self after the last round (A_last): mean over tasks, then over clients."""
        return mean(self.client_scores("self").values())

    @property
    def others_mean(self) -> float | None:
        """Others after the last round: mean over tasks, then over clients."""
        return mean(self.client_scores("others").values())

    @property
    def worst(self) -> float | None:
        """Self of the client that does worst."""
        return min(self.client_scores("self").values(), default=None)

    @property
    def worst_others(self) -> float | None:
        """Others of the client that does worst."""
        return min(self.client_scores("others").values(), default=None)

    @property
    def a_auc(self) -> float | None:
        """Mean of Self over all evaluated rounds (A_AUC), without the untouched base model."""
        curve = [value for round_idx, value in self.mean_curve.items() if round_idx >= 0]
        return a_auc(curve) if curve else None

    @property
    def forgetting(self) -> float | None:
        """Mean over the clients of how far their earlier tasks' scores have fallen, in [-1, 1]."""
        return mean(forgetting_of(self.scores(), self.stream).values())

    @property
    def forward_transfer(self) -> float | None:
        """Mean over the clients of their gain on tasks that had not begun yet, in [-1, 1]."""
        return mean(forward_transfer_of(self.scores(), self.stream).values())

    def bytes_per_client_round(self, direction: str) -> float | None:
        """Mean bytes that one client moves in one round.

        Args:
            direction: ``uplink`` or ``downlink``.
        """
        return mean(
            number
            for event in self.rounds.values()
            for number in getattr(event, f"{direction}_bytes").values()
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all clients and passes."""
        return sum(event.num_steps for event in self.trained)

    @cached_property
    def flops(self) -> float | None:
        """Estimated floating-point operations of all passes and probes; None if unknown."""
        probed = {
            (e.round_idx, e.client_id, e.probe_name): e.flops
            for e in self.events
            if isinstance(e, ev.ClientProbed)
        }
        total = sum(event.flops for event in self.trained) + sum(probed.values())
        return total or None

    @property
    def duration_s(self) -> float | None:
        """Wall-clock seconds of the whole strategy; None before it has finished."""
        return None if self.finished is None else self.finished.duration_s

    @property
    def train_s(self) -> float | None:
        """Wall-clock seconds of its rounds; the sum of the rounds' before it has finished."""
        if self.finished is not None:
            return self.finished.train_s
        return sum(e.duration_s for e in self.rounds.values()) if self.rounds else None

    def losses(self) -> dict[int, dict[int, float]]:
        """Mean training loss in nats per client and round, over the passes' steps.

        What the server trains on a client's ranks is left out.
        """
        sums: dict[int, dict[int, tuple[float, int]]] = {}
        for event in self.trained:
            if on_server(event.pass_name):
                continue
            total, steps = sums.setdefault(event.client_id, {}).get(event.round_idx, (0.0, 0))
            sums[event.client_id][event.round_idx] = (
                total + event.mean_loss * event.num_steps,
                steps + event.num_steps,
            )
        return {
            client_id: {r: total / steps for r, (total, steps) in line.items() if steps}
            for client_id, line in sorted(sums.items())
        }


def _merged(first: ev.RoundFinished, second: ev.RoundFinished) -> ev.RoundFinished:
    """Two records of one round: each rank's own clients, or the same round after a resume."""
    return replace(
        second,
        duration_s=max(first.duration_s, second.duration_s),
        uplink_bytes={**first.uplink_bytes, **second.uplink_bytes},
        downlink_bytes={**first.downlink_bytes, **second.downlink_bytes},
    )


def _over_tasks(clients: Mapping[int, Mapping[str, ev.Evaluated]], scope: str) -> dict[int, float]:
    means = {
        client_id: mean(event.value for event in row.values() if event.scope == scope)
        for client_id, row in clients.items()
    }
    return {client_id: value for client_id, value in sorted(means.items()) if value is not None}
