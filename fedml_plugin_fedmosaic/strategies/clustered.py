"""What strategies with clusters share: projections of adapters, sample counts, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    ClientContext,
    ClientManifest,
    ClientState,
    ClientUpdate,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import LocalResult
from fedml_plugin_fedmosaic.strategies.base import ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import check_participants
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvgClient
from fedml_plugin_fedmosaic.strategies.vectors import projection_note, vector_of, with_notes

NOTE = "projection"


class ProjectingClient(FedAvgClient):
    """As FedAvg's, with a projection of the weights in the header.

    Args:
        projection: numbers of the random projection.
    """

    def __init__(self, projection: int) -> None:
        self._projection = projection

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """Uploads the trained tensors and says where they are."""
        update, after = super().finish(result, state, context, header)
        note = projection_note(update.tensors, self._projection, context.seed)
        return with_notes(update, **{NOTE: note}), after


class Clustered(StrategyBase):
    """A server half that remembers every client's last projection, sample count and cluster."""

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients and the seed; there are no clusters yet.

        Raises:
            PlanError: no client, or an id twice.
        """
        empty: dict[str, Any] = {"vectors": {}, "examples": {}, "centres": {}, "clusters": {}}
        return {**super().init(manifests, seed), **empty}

    def taken_in(
        self, state: ServerState, headers: Sequence[UpdateHeader], width: int
    ) -> dict[str, Any]:
        """The state with the headers' projections and sample counts.

        Args:
            state: the state so far.
            headers: of the round.
            width: numbers of a projection.

        Returns:
            A state whose ``vectors``, ``examples``, ``centres`` and ``clusters`` may be changed.

        Raises:
            PlanError: a header of an unknown client, two of one client, or without a projection.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        names = ("vectors", "examples", "centres", "clusters")
        after: dict[str, Any] = {**state, **{name: dict(state[name]) for name in names}}
        for header in headers:
            client = str(header.client_id)
            after["vectors"][client] = vector_of(header, NOTE, width)
            after["examples"][client] = max(header.num_examples, 1)
        return after


def sample_counts(
    state: Mapping[str, Any],
    clients: Sequence[int],
    weighting: Literal["uniform", "num_examples"],
) -> dict[int, int]:
    """Client -> what its weight is in proportion to: 1, or the samples of its last round."""
    uniform = weighting == "uniform"
    return {client: 1 if uniform else state["examples"][str(client)] for client in clients}


def group_names(
    layouts: Mapping[str, Mapping[str, str]], clusters: Mapping[str, int]
) -> dict[int, str]:
    """Names of the clients' clusters for the report, unique over all layouts.

    Args:
        layouts: client -> channel -> layout digest, of all clients.
        clusters: client -> number of its cluster inside its layout, from 0.

    Returns:
        Client -> number of its cluster from 1; after a letter for its layout, in the order of the
        layouts' first clients, if there are several layouts.
    """
    digests = [layouts[client].get(CHANNEL_CONV) for client in sorted(layouts, key=int)]
    kinds = [digest for digest in dict.fromkeys(digests) if digest is not None]
    letters = {
        digest: _letters(place) if len(kinds) > 1 else "" for place, digest in enumerate(kinds)
    }
    return {
        int(client): f"{letters[layouts[client][CHANNEL_CONV]]}{clusters[client] + 1}"
        for client in sorted(clusters, key=int)
    }


def _letters(place: int) -> str:
    """A, B, .., Z, AA, AB, .."""
    before, last = divmod(place, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)
