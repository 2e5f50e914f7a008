"""Places where a host framework may look at or change what travels (DP, attacks, defences).

The order in a round is the order of the methods, as in FedML's cross-silo loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedml_plugin_fedmosaic.core.types import ClientUpdate, SharedTensors


class RoundHooks(Protocol):
    """Places of a round; each returns what takes the place of its input.

    What a hook returns may depend on its arguments, the round and the configuration only: a
    resumed run calls it again.
    """

    def begin_round(self, round_idx: int) -> None:
        """Called on every rank before anything else in a round (0-based)."""
        ...

    def before_local_training(self, client_id: int, downlink: SharedTensors) -> SharedTensors:
        """Called per client with what it received."""
        ...

    def after_local_training(self, update: ClientUpdate) -> ClientUpdate:
        """Called per client with what it is about to send (local differential privacy)."""
        ...

    def before_aggregation(self, updates: Mapping[int, ClientUpdate]) -> Mapping[int, ClientUpdate]:
        """Called once per round with all updates (central clipping)."""
        ...

    def after_aggregation(
        self, downlinks: Mapping[int, SharedTensors]
    ) -> Mapping[int, SharedTensors]:
        """Called once per round with what the clients will receive (central noise)."""
        ...


class NoHooks:
    """Changes nothing."""

    def begin_round(self, round_idx: int) -> None:
        """Nothing to do."""

    def before_local_training(self, client_id: int, downlink: SharedTensors) -> SharedTensors:  # noqa: ARG002
        """Returns the downlink."""
        return downlink

    def after_local_training(self, update: ClientUpdate) -> ClientUpdate:
        """Returns the update."""
        return update

    def before_aggregation(self, updates: Mapping[int, ClientUpdate]) -> Mapping[int, ClientUpdate]:
        """Returns the updates."""
        return updates

    def after_aggregation(
        self, downlinks: Mapping[int, SharedTensors]
    ) -> Mapping[int, SharedTensors]:
        """Returns the downlinks."""
        return downlinks
