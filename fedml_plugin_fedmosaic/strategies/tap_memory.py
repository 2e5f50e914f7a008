"""What a TAP client remembers between turns and rounds, beside its adapter sets.

``ClientState.extra["tap"]`` holds ``keys`` (task -> key), ``losses`` (key -> training loss of the
personal adapter in the client's last participation), ``log`` (key -> times looked at, times
replaced), and inside a round ``federated`` (key -> training loss of the federated adapter) and
``decision`` (what was compared and replaced).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedml_plugin_fedmosaic.core.types import AdapterState, ClientState
from fedml_plugin_fedmosaic.strategies.tap_sets import FEDERATED, PERSONAL, copies, set_name

MEMORY = "tap"
"""Name in ``ClientState.extra``."""


def recall(state: ClientState) -> Mapping[str, Any]:
    """What the client remembers."""
    memory: Mapping[str, Any] = state.extra[MEMORY]
    return memory


def remember(state: ClientState, **values: Any) -> ClientState:
    """The state with some values remembered."""
    return replace(state, extra={**state.extra, MEMORY: {**recall(state), **values}})


def forget(state: ClientState, *names: str) -> ClientState:
    """The state without some remembered values."""
    kept = {name: value for name, value in recall(state).items() if name not in names}
    return replace(state, extra={**state.extra, MEMORY: kept})


def tasks_of(key: str, keys: Mapping[str, str]) -> tuple[str, ...]:
    """A key's tasks, in time order."""
    return tuple(task for task, name in keys.items() if name == key)


def by_key(
    losses: Mapping[str, float], keys: Mapping[str, str], counts: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Key -> mean loss of its tasks, weighted by their samples if these are given."""
    sums: dict[str, tuple[float, int]] = {}
    for task, loss in losses.items():
        if task in keys:
            weight = 1 if counts is None else counts[task]
            total, number = sums.get(keys[task], (0.0, 0))
            sums[keys[task]] = (total + weight * loss, number + weight)
    return {key: total / number for key, (total, number) in sums.items()}


def adopted(sets: Mapping[str, AdapterState], names: Iterable[str]) -> dict[str, AdapterState]:
    """The sets with some personal ones replaced by copies of their federated twins."""
    changed = {
        set_name(PERSONAL, name): copies(sets[set_name(FEDERATED, name)]) for name in sorted(names)
    }
    return {**sets, **changed}


def logged(log: Mapping[str, Any], decision: Mapping[str, Any]) -> dict[str, list[int]]:
    """Key -> [times looked at, times replaced] over all rounds."""
    after = {key: list(counts) for key, counts in log.items()}
    for key, entry in decision.items():
        looked, replaced = after.get(key, [0, 0])
        after[key] = [looked + 1, replaced + int(entry["replaced"])]
    return after
