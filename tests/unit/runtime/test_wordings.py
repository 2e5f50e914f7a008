"""Clients with different tokenizers exchange answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from letter_model import save_letter_model
from model_rounds import Member, ModelRounds
from tiny_models import save_text_model

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass, Result, Work
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.wordings import share_wordings

WORDS, LETTERS = Member(model="words"), Member(model="letters")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelBundle]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    save_text_model(folder / "words", "llama", hidden=16, layers=2)
    save_letter_model(folder / "letters", hidden=32, layers=2)
    device = torch.device("cpu")
    return {
        name: load_model(name, ModelSpec(path=str(folder / name)), device)
        for name in ("words", "letters")
    }


class Watched(ModelRounds):
    """Remembers passes with their results, and plays a strategy's later stages."""

    def work(self, client: ClientRunner, work: Work) -> Result:
        result = super().work(client, work)
        if isinstance(work, Pass) and isinstance(result, LocalResult):
            self.passes.append((client.client_id, work, result))
        return result

    def play_stages(self) -> list[Any]:
        """One round with all stages; the passes of the later ones."""
        self.passes: list[Any] = []
        self.play()
        done = len(self.passes)
        for stage in self.strategy.stages[1:]:
            chosen = self.strategy.select_stage(self.state, stage, 0, tuple(self.clients))
            updates = [self.train(client_id, stage) for client_id in chosen]
            found = self.comm.exchange_headers([update.header for update in updates])
            self.state, plan = self.strategy.plan_stage(self.state, stage, found)
            sent = {update.header.client_id: update.tensors for update in updates}
            for client_id, tensors in self.comm.execute(plan, sent).items():
                self.downlinks[client_id] = {**self.downlinks.get(client_id, {}), **tensors}
        return self.passes[done:]


@pytest.fixture
def rounds(bundles: dict[str, ModelBundle]) -> Iterator[Any]:
    opened: list[Watched] = []

    def make(name: str, *members: Member, **options: Any) -> Watched:
        opened.append(Watched(name, options, bundles, members))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def share(one: ModelRounds) -> dict[str, Any]:
    manifests = [client.manifest for client in one.clients.values()]
    return share_wordings(one.comm, one.strategy, manifests, one.clients)


def test_a_letter_reader_learns_from_a_word_reader(rounds: Any) -> None:
    one = rounds("fedmkt", WORDS, LETTERS, epochs=8)
    assert len(share(one)) == 2
    passes = one.play_stages()
    foreign = [(c, r) for c, work, r in passes if work.distil[0].vocabularies]
    # Random models: a word of 78 is a better guess than three or four letters of 100.
    assert [client for client, _ in foreign] == [1]
    losses = foreign[0][1].losses
    assert len(losses) > 5
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["feddistill", "takfl"])
def test_averages_learn_from_all_vocabularies(rounds: Any, name: str) -> None:
    one = rounds(name, WORDS, LETTERS, epochs=6)
    share(one)
    taught = [(c, r) for c, work, r in one.play_stages() if _is_foreign(work)]
    assert [client for client, _ in taught] == [0, 1]
    for _, result in taught:
        assert sum(result.losses[-3:]) / 3 < 0.95 * result.losses[0]


def _is_foreign(work: Pass) -> bool:
    return any(term.vocabularies for term in work.distil)


def test_nothing_is_exchanged_where_nothing_has_to_be(rounds: Any) -> None:
    for name, members, options in (
        ("fedmkt", (LETTERS, LETTERS), {}),
        ("fedavg", (WORDS, LETTERS), {}),
        ("fedmkt", (WORDS, LETTERS), {"vocabularies": "own"}),
    ):
        one = rounds(name, *members, **options)
        one.comm = Silent()
        assert share(one) == {}
        one.close()


class Silent(LocalCommunicator):
    def share(self, text: str) -> tuple[str, ...]:
        raise AssertionError(f"shared {text[:20]!r}")


class TwoRanks(LocalCommunicator):
    """Hears what the other rank says."""

    def __init__(self, other: dict[str, Any]) -> None:
        super().__init__()
        self.other = other
        self.said: list[Any] = []

    def share(self, text: str) -> tuple[str, ...]:
        self.said.append(json.loads(text))
        # First whether it went well, then the vocabularies.
        return text, json.dumps(self.other if len(self.said) == 2 else None)


def test_every_rank_speaks_for_its_own_clients(rounds: Any) -> None:
    one = rounds("fedmkt", WORDS, LETTERS, WORDS)
    manifests = [client.manifest for client in one.clients.values()]
    digest = manifests[1].vocabulary
    answers = {"t/a": [1]}
    comm = TwoRanks({digest: {"texts": ["", "é\ue000"], "answers": answers}})
    mine = {client: one.clients[client] for client in (0, 2)}
    found = share_wordings(comm, one.strategy, manifests, mine)
    # The other rank has client 1; both clients here have one vocabulary.
    assert set(comm.said[1]) == {manifests[0].vocabulary}
    assert found[digest].texts == ["", "é\ue000"]
    assert found[digest].answers == answers
