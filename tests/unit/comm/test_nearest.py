from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.comm.exchange import Parcels
from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.comm.ranked import RankedCommunicator
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import NearestQuery, Neighbours
from fedml_plugin_fedmosaic.equations.neighbours import RECEIVER_TILE, nearest
from fedml_plugin_fedmosaic.equations.relevance import flat_similarity, unit_columns


class ThreadRanks(RankedCommunicator):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, mail: Any) -> None:
        super().__init__(rank, size)
        self._mail = mail

    def _send(self, other: int, item: Any) -> None:
        self._mail[self.rank, other].put(item)

    def _gather(self, payload: bytes) -> list[bytes]:
        for other in range(self.size):
            self._send(other, payload)
        return [self._mail[other, self.rank].get(timeout=30) for other in range(self.size)]

    def _swap(self, sends: Parcels, receives: Parcels) -> None:
        for other, tensor in sends:
            self._send(other, tensor.clone())
        for other, room in receives:
            room.copy_(self._mail[other, self.rank].get(timeout=30))

    def barrier(self) -> None: ...

    def abort(self, code: int) -> None: ...


def _on_ranks(
    size: int, kind: Any, sketches: dict[int, Tensor], queries: Sequence[NearestQuery]
) -> list[Any]:
    """Every rank's answer, or what it raised."""
    mail = {(a, b): Queue[Any]() for a in range(size) for b in range(size)}
    answers: list[Any] = [None] * size

    def run(rank: int) -> None:
        comm = ThreadRanks(rank, size, mail)
        own = {client: sketches[client] for client in comm.owned(sorted(sketches))}
        try:
            answers[rank] = comm.nearest(kind, own, queries)
        except PlanError as error:
            answers[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _sketches(count: int, rows: int = 6, columns: int = 1) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {client: torch.randn(rows, columns, generator=generator) for client in range(count)}


def _same(first: tuple[Neighbours, ...], second: tuple[Neighbours, ...]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.receivers == other.receivers
        assert torch.equal(one.sources, other.sources)
        assert torch.equal(one.cosines, other.cosines)


QUERIES = (
    NearestQuery(receivers=tuple(range(1200)), sources=tuple(range(0, 1200, 3)), k=4),
    NearestQuery(receivers=(3, 7, 1100), sources=(3, 5, 700), k=5),
    NearestQuery(receivers=(8,), sources=(), k=2),
)


@pytest.mark.parametrize("kind", ["columns", "flat"])
@pytest.mark.parametrize("columns", [1, 3])
def test_ranks_find_the_same_bits(kind: str, columns: int) -> None:
    sketches = _sketches(1200, 6, columns)
    assert len(sketches) > 2 * RECEIVER_TILE
    alone = LocalCommunicator().nearest(kind, sketches, QUERIES)
    for size in (2, 3):
        for answer in _on_ranks(size, kind, sketches, QUERIES):
            _same(alone, answer)


def test_answers_are_the_nearest_by_the_similarity_of_the_kind() -> None:
    sketches = _sketches(20, 5, 3)
    query = NearestQuery(receivers=(2, 9, 19), sources=tuple(range(4, 18)), k=3)
    (found,) = LocalCommunicator().nearest("columns", sketches, [query])
    whole = flat_similarity([unit_columns(sketches[client]) for client in range(20)])
    for place, receiver in enumerate(query.receivers):
        among = [client for client in query.sources if client != receiver]
        best = sorted(among, key=lambda client: -float(whole[receiver, client]))[:3]
        assert found.sources[place].tolist() == best
        torch.testing.assert_close(found.cosines[place], whole[receiver, best], rtol=0, atol=1e-6)


def test_a_receiver_that_is_a_source_does_not_find_itself() -> None:
    query = NearestQuery(receivers=(1, 2), sources=(1, 2), k=4)
    (found,) = LocalCommunicator().nearest("flat", _sketches(3), [query])
    assert found.sources.tolist() == [[2, -1], [1, -1]]
    assert found.cosines[:, 1].isneginf().all()


def test_nothing_asked_nothing_found() -> None:
    assert LocalCommunicator().nearest("flat", {}, []) == ()
    empty = NearestQuery(receivers=(), sources=(), k=3)
    (found,) = LocalCommunicator().nearest("flat", _sketches(2), [empty])
    assert found.sources.shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "query", "text"),
    [
        ({}, NearestQuery(receivers=(0, 9), sources=(1,), k=1), r"nobody holds.*\[9\]"),
        ({1: torch.ones(7, 1)}, NearestQuery(receivers=(0,), sources=(2,), k=1), "different shape"),
        (
            {1: torch.full((6, 1), torch.nan)},
            NearestQuery(receivers=(0,), sources=(2,), k=1),
            "client 1: the sketch holds NaN",
        ),
        ({}, NearestQuery(receivers=(1, 0), sources=(2,), k=1), "ascending"),
    ],
)
def test_mistakes_are_told_on_every_rank(
    change: dict[int, Tensor], query: NearestQuery, text: str
) -> None:
    for answer in _on_ranks(2, "flat", _sketches(4) | change, [query]):
        with pytest.raises(PlanError, match=text):
            raise answer


def test_parts_of_the_receivers_have_the_bits_of_the_whole() -> None:
    vectors = torch.stack([sketch[:, 0] for sketch in _sketches(1300).values()])
    whole = nearest(vectors, 3)
    cuts = [slice(0, 512), slice(512, 512), slice(512, 1300)]
    parts = [nearest(vectors, 3, receivers=cut) for cut in cuts]
    for index in range(2):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
    with pytest.raises(PlanError, match="whole tiles of 512"):
        nearest(vectors, 3, receivers=slice(0, 600))
