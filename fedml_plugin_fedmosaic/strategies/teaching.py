"""What strategies with public data share: logits of clients, and the server's own training.

Clients send their logits on the public samples, one tensor (supervised tokens, vocabulary) per
sample, in a channel of their vocabulary. The mean of several clients' logits is a row of the
mixing plan like any other. For the server's training one client per layout of tensors, the one
with the smallest id, lends its base model: it is the *host* of that layout's server model and acts
in the stage ``server``. What hosts receive and send there is no client's traffic.

Logits cross vocabularies (:class:`TranslationOptions`): they are averaged inside each, as they are,
and the model that learns from them translates. What brings logits to models of any vocabulary has
a name that ends with ``@`` and the logits' own one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    ClientManifest,
    ClientState,
    MixRow,
    SharedTensors,
    View,
)
from fedml_plugin_fedmosaic.core.work import ModelRef, Probe, ProbeResult, Result, Samples

PROBE = "public"
OWN = "own"
LOGITS = "logits"
LOSS = "loss"
MODEL = "server"
"""Name of the server model's set, and the channel in which it is sent."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TranslationOptions:
    """Options of strategies whose clients teach each other by logits."""

    vocabularies: Literal["all", "own"] = "all"
    """Who teaches: clients of every vocabulary, or only those of the student's own."""
    top_tokens: Annotated[int, Field(ge=1)] = 128
    """Most probable tokens per position that are translated into another vocabulary."""

    @property
    def translates(self) -> bool:
        """Whether logits cross vocabularies."""
        return self.vocabularies == "all"


def logit_channel(vocabulary: str) -> str:
    """The channel of a vocabulary's logits."""
    return f"logits-{vocabulary}"


def spoken_in(name: str, vocabulary: str) -> str:
    """The name of a channel or slot whose logits are in a vocabulary."""
    return f"{name}@{vocabulary}"


def foreign_vocabulary(slot: str, own: str) -> str:
    """The vocabulary of a slot's logits; empty if it is the receiver's own."""
    vocabulary = slot.partition("@")[2]
    return "" if vocabulary == own else vocabulary


def answers_in(downlink: SharedTensors, slots: str, own: str) -> dict[str, Tensor]:
    """Answers of one client per sample: logits, and the loss beside them.

    Args:
        downlink: with keys ``<slot>/logits/<sample key>`` and ``<slot>/loss/<sample key>``.
        slots: how the names of the wanted slots begin.
        own: the receiver's vocabulary.

    Returns:
        ``loss/<key>``, and ``logits/<key>`` or, in another vocabulary,
        ``logits@<vocabulary>/<key>``.
    """
    found = {}
    for name, value in downlink.items():
        slot, _, rest = name.partition("/")
        part, _, key = rest.partition("/")
        if slot.startswith(slots):
            vocabulary = foreign_vocabulary(slot, own)
            is_foreign = vocabulary and part == LOGITS
            found[f"{spoken_in(part, vocabulary)}/{key}" if is_foreign else rest] = value
    return found


def voices(
    state: Mapping[str, Any], clients: Sequence[int], host: int, options: TranslationOptions
) -> dict[str, list[int]]:
    """Vocabulary -> clients, of those whose logits may teach a host; ascending."""
    vocabularies: Mapping[str, str] = state["vocabularies"]
    found: dict[str, list[int]] = {}
    for client in clients:
        vocabulary = vocabularies[str(client)]
        if options.translates or vocabulary == vocabularies[str(host)]:
            found.setdefault(vocabulary, []).append(client)
    return dict(sorted(found.items()))


def public_probe(view: View, overlay: tuple[str, ...] = ()) -> Probe:
    """Asks for a model's logits on the public samples."""
    model = ModelRef(overlay=overlay, view=view)
    return Probe(name=PROBE, models={OWN: model}, samples=Samples.PUBLIC, what="logits")


def seen(results: Mapping[str, Result]) -> ProbeResult | None:
    """The public probe's result among those of a turn."""
    found = results.get(PROBE)
    return found if isinstance(found, ProbeResult) else None


def own_logits(result: ProbeResult) -> dict[str, Tensor]:
    """Sample key -> logits."""
    return {key.removeprefix(f"{OWN}/"): value for key, value in result.tensors.items()}


def sample_losses(result: ProbeResult) -> dict[str, float]:
    """Sample key -> mean cross entropy over its supervised tokens."""
    losses = {}
    for key, logits in own_logits(result).items():
        targets = torch.tensor(result.labels[key])
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])
        losses[key] = -float(chosen.mean())
    return losses


def with_tensors(state: ClientState, prefix: str, tensors: Mapping[str, Tensor]) -> ClientState:
    """The state with tensors ``<prefix>/<key>``, in place of all others of that prefix."""
    kept = {key: v for key, v in state.tensors.items() if not key.startswith(f"{prefix}/")}
    new = {f"{prefix}/{key}": value for key, value in tensors.items()}
    return replace(state, tensors={**kept, **new})


def tensors_of(state: ClientState, prefix: str) -> dict[str, Tensor]:
    """Key -> tensor of all ``<prefix>/<key>`` of a state."""
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in state.tensors.items() if k.startswith(start)}


def named(channel: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as uploads of a channel."""
    return {f"{channel}/{key}": value for key, value in sorted(tensors.items())}


def unnamed(downlink: SharedTensors, channel: str) -> dict[str, Tensor]:
    """Key -> tensor of a channel of a downlink."""
    start = f"{channel}/"
    return {k.removeprefix(start): v for k, v in downlink.items() if k.startswith(start)}


def public_state(manifests: Sequence[ClientManifest]) -> dict[str, Any]:
    """What the server remembers for its training: vocabularies, hosts, and who has sent logits.

    Raises:
        PlanError: a client does not say what its vocabulary is.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.client_id)
    silent = [manifest.client_id for manifest in ordered if not manifest.vocabulary]
    if silent:
        raise PlanError(f"clients {silent} do not name their vocabulary; logits need one")
    hosts: dict[str, int] = {}
    for manifest in ordered:
        layout = manifest.layouts.get(CHANNEL_CONV)
        if layout is not None:
            hosts.setdefault(layout, manifest.client_id)
    return {
        "vocabularies": {str(manifest.client_id): manifest.vocabulary for manifest in ordered},
        "hosts": hosts,
        "taught": [],
    }


def host_rows(state: Mapping[str, Any], delivered: Sequence[int]) -> tuple[MixRow, ...]:
    """Rows that bring the hosts' models to every client of their layout.

    Args:
        state: the server's.
        delivered: hosts that have sent a model.
    """
    rows = [
        MixRow(target=int(client), sources=(host,), weights=(1.0,))
        for client, channels in state["layouts"].items()
        if (host := state["hosts"].get(channels.get(CHANNEL_CONV))) in delivered
    ]
    return tuple(sorted(rows, key=lambda row: row.target))
