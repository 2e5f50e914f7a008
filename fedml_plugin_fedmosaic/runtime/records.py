"""What checkpoints hold, as typed records, and the same as plain data for files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    AdapterState,
    ClientState,
    ClientUpdate,
    Moments,
    OptimizerState,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import FitProgress, Result, Work
from fedml_plugin_fedmosaic.runtime.worktree import (
    result_from_tree,
    results_tree,
    work_from_tree,
    works_tree,
)

EventRecord = Mapping[str, Any]
"""An event as :func:`core.events.to_record` makes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRecord:
    """A client that has finished its part of a round.

    Attributes:
        state: the client's next state.
        update: what it sends.
        events: what was reported while it trained, so that it can be reported again.
    """

    state: ClientState
    update: ClientUpdate
    events: tuple[EventRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A client that was stopped inside a pass.

    Attributes:
        pass_idx: which piece of work of the turn, 0-based.
        state: the client's state before that pass, without its adapter (see ``progress``).
        progress: where in the pass.
        events: of the round's finished passes.
        works: the turn's work.
        results: of the turn's finished work, by name; a pass's without tensors.
    """

    pass_idx: int
    state: ClientState
    progress: FitProgress
    events: tuple[EventRecord, ...] = ()
    works: tuple[Work, ...] = ()
    results: Mapping[str, Result] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCheckpoint:
    """Everything needed to go on after a round.

    Attributes:
        round_idx: 0-based round.
        num_rounds: rounds that the run was to have.
        server: the strategy's state.
        progress: JSON values of the loop itself.
        clients: states of the clients that were asked for and ever took part.
        uploads: last accepted tensors of these clients, as far as there are any.
        downlinks: what these clients received last, as far as they did.
    """

    round_idx: int
    num_rounds: int
    server: Mapping[str, Any]
    progress: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[int, ClientState]
    uploads: Mapping[int, SharedTensors] = field(default_factory=dict)
    downlinks: Mapping[int, SharedTensors]


def _adapter_tree(adapter: AdapterState) -> dict[str, Any]:
    return {str(key): tensor for key, tensor in adapter.items()}


def _adapter(tree: Mapping[str, Any]) -> AdapterState:
    return {AdapterKey.parse(key): tensor for key, tensor in tree.items()}


def _moments_tree(moments: OptimizerState) -> dict[str, Any]:
    return {
        str(key): {"step": entry.step, "first": entry.first, "second": entry.second}
        for key, entry in moments.items()
    }


def _moments(tree: Mapping[str, Any]) -> OptimizerState:
    return {
        AdapterKey.parse(key): Moments(
            step=entry["step"], first=entry["first"], second=entry["second"]
        )
        for key, entry in tree.items()
    }


def state_tree(state: ClientState) -> dict[str, Any]:
    """A client's state as plain data."""
    return {
        "client_id": state.client_id,
        "participations": state.participations,
        "adapter": _adapter_tree(state.adapter),
        "sketch": state.sketch,
        "sketch_average": state.sketch_average,
        "moments": _moments_tree(state.moments),
        "extra": dict(state.extra),
        "sets": {name: _adapter_tree(tensors) for name, tensors in state.sets.items()},
        "tensors": dict(state.tensors),
    }


def state_from_tree(tree: Mapping[str, Any]) -> ClientState:
    """The inverse of :func:`state_tree`."""
    return ClientState(
        client_id=tree["client_id"],
        participations=tree["participations"],
        adapter=_adapter(tree["adapter"]),
        sketch=tree["sketch"],
        sketch_average=tree.get("sketch_average"),
        moments=_moments(tree["moments"]),
        extra=tree["extra"],
        sets={name: _adapter(tensors) for name, tensors in tree.get("sets", {}).items()},
        tensors=tree.get("tensors", {}),
    )


def client_tree(record: ClientRecord) -> dict[str, Any]:
    """A finished client as plain data."""
    header = record.update.header
    return {
        "state": state_tree(record.state),
        "header": {
            "client_id": header.client_id,
            "round_idx": header.round_idx,
            "num_examples": header.num_examples,
            "sketch": header.sketch,
            "notes": dict(header.notes),
        },
        "update": dict(record.update.tensors),
        "events": list(record.events),
    }


def client_from_tree(tree: Mapping[str, Any]) -> ClientRecord:
    """The inverse of :func:`client_tree`."""
    return ClientRecord(
        state=state_from_tree(tree["state"]),
        update=ClientUpdate(header=UpdateHeader(**tree["header"]), tensors=tree["update"]),
        events=tuple(tree["events"]),
    )


def step_tree(record: StepRecord) -> dict[str, Any]:
    """A stopped client as plain data."""
    progress = record.progress
    return {
        "pass_idx": record.pass_idx,
        "state": state_tree(record.state),
        "progress": {
            "adapter": _adapter_tree(progress.adapter),
            "moments": _moments_tree(progress.moments),
            "losses": list(progress.losses),
            "num_tokens": progress.num_tokens,
            "duration_s": progress.duration_s,
            "sets": {name: _adapter_tree(value) for name, value in progress.sets.items()},
            "set_moments": {name: _moments_tree(m) for name, m in progress.set_moments.items()},
            "task_sums": {task: list(entry) for task, entry in progress.task_sums.items()},
            "flops": progress.flops,
        },
        "events": list(record.events),
        "works": works_tree(record.works),
        "results": results_tree(record.results),
    }


def step_from_tree(tree: Mapping[str, Any]) -> StepRecord:
    """The inverse of :func:`step_tree`."""
    progress = tree["progress"]
    return StepRecord(
        pass_idx=tree["pass_idx"],
        state=state_from_tree(tree["state"]),
        progress=FitProgress(
            adapter=_adapter(progress["adapter"]),
            moments=_moments(progress["moments"]),
            losses=tuple(progress["losses"]),
            num_tokens=progress["num_tokens"],
            duration_s=progress["duration_s"],
            sets={name: _adapter(value) for name, value in progress["sets"].items()},
            set_moments={name: _moments(value) for name, value in progress["set_moments"].items()},
            task_sums={
                task: (loss, count) for task, (loss, count) in progress["task_sums"].items()
            },
            flops=progress["flops"],
        ),
        events=tuple(tree["events"]),
        works=tuple(work_from_tree(work) for work in tree["works"]),
        results={name: result_from_tree(value) for name, value in tree["results"].items()},
    )
