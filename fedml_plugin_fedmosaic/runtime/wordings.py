"""Tells every engine the other vocabularies of a run, for strategies whose logits cross them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.core.types import ClientManifest
from fedml_plugin_fedmosaic.equations.translation import Wording
from fedml_plugin_fedmosaic.runtime.client import ClientRunner
from fedml_plugin_fedmosaic.runtime.setup import together
from fedml_plugin_fedmosaic.strategies.base import Strategy


def share_wordings(
    comm: Communicator,
    strategy: Strategy,
    manifests: Sequence[ClientManifest],
    mine: Mapping[int, ClientRunner],
) -> dict[str, Wording]:
    """Exchanges vocabularies and the public answers in them; once per run, and not per client.

    Tokenizers are public parts of the base models, so this is no client's traffic. Nothing is
    exchanged if the strategy translates nothing, or all clients have one vocabulary.

    Args:
        comm: all ranks call it.
        strategy: says whether it translates.
        manifests: of all clients.
        mine: clients of this rank's group; their engines learn what is found.

    Returns:
        Digest -> wording, for all vocabularies of the run; empty if nothing is exchanged.

    Raises:
        DataError: a public sample cannot be encoded, on any rank.
    """
    if not strategy.translates or len({manifest.vocabulary for manifest in manifests}) < 2:
        return {}
    # The first client of a vocabulary speaks for it.
    speakers: dict[str, int] = {}
    for manifest in sorted(manifests, key=lambda manifest: manifest.client_id):
        speakers.setdefault(manifest.vocabulary, manifest.client_id)
    said = together(
        comm,
        lambda: {
            vocabulary: _record(mine[client_id].wording())
            for vocabulary, client_id in speakers.items()
            if comm.is_leader and client_id in mine
        },
    )
    found: dict[str, Wording] = {}
    for text in comm.share(json.dumps(said, ensure_ascii=False)):
        for vocabulary, record in json.loads(text).items():
            found[vocabulary] = Wording(texts=record["texts"], answers=record["answers"])
    for client in mine.values():
        client.engine.translator.learn(found)
    return found


def _record(wording: Wording) -> dict[str, object]:
    answers = {key: list(ids) for key, ids in wording.answers.items()}
    return {"texts": list(wording.texts), "answers": answers}
