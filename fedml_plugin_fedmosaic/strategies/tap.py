"""TAP: adapters per task and modality, replaced where the federation is better (arXiv 2509.26524).

A key q is a pair of modalities and task, e.g. (image+text, vqa). Client k with keys Q_k holds two
editions of one shared adapter and one adapter per key: federated F_k, personal P_k. A sample of key
q runs with both adapters added: ``y = W x + s B_sh A_sh x + s B_q A_q x``. A round of client k:

1. ``F_k <-`` the server's averages; F_k is trained on the round's samples, each with its own key.
2. Replacement, key by key, with L_F and L_P the unscaled losses of both models on held-out
   samples::

       P_k[q] <- F_k[q]    if L_F(q) < (1 - mu_q) L_P(q)         (or L_F + mu_q < L_P, absolute)
       P_k[sh] <- F_k[sh]  if at least a fraction rho of the keys were replaced

   A personal adapter that was never trained is always replaced.
3. P_k is trained: on the samples of step 1 if nothing was replaced, else on a new draw.
4. Only F_k is uploaded. The server averages every key over the round's clients that trained it,
   with n_kq client k's samples of key q::

       G[q] = sum_k n_kq F_k[q] / sum_k n_kq

   A key that nobody trained in a round stays. P_k never leaves the client.

After the last round every client, also one that was never drawn, goes through the final stage: F_k
is fine-tuned (the teacher z_F), then P_k (the student z_P) with, at the supervised tokens, ::

    task loss + lambda_q T_q^2 KL(softmax(z_F / T_q) || softmax(z_P / T_q))

Reported: ``personal_post`` (the student; before the final stage the personal model), ``personal``,
``regular`` (federated: averaging per key), ``regular_ft`` (the teacher). Tasks that are not the
client's own are answered with the shared adapter alone.

Across architectures, ``exchange`` says what is averaged: ``family`` only clients of one shape
class; ``colora``, with the adapter pq_lora, also P and Q per key and block between all clients that
hold the key, which fit every architecture (FedMosaic, arXiv 2506.11024); ``none`` nothing at all.

Differences to the paper's released code: adapters on decoder language models instead of a bank of
modules on FLAVA and ViLT; keys and modalities come from the data, never from names of tasks. What
the server averages is what clients start from, tensor by tensor; a tensor that is missing or
unknown is an error. A replacement swaps a key's adapter as a whole, and the shared one by vote
instead of by any single key. Losses are compared on held-out samples and are not scaled by the
key's share of the batch (``test: train`` compares training losses, ``margin_kind: absolute`` adds
the margin, both as released). Averages weigh a client's samples of the key, not all its samples.
Every sample takes its own key's path, also in mixed batches. Only adapter tensors are trained and
sent. Cohorts depend on the seed in every round. Distillation is per supervised token. Clients that
never took part begin the final stage with the federated adapters instead of fresh ones. The
rounds' learning rates are those of ``optim``, without a warm-up over the first rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fedml_plugin_fedmosaic.core.cost import PLAIN_SAMPLES, Cost
from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    CHANNEL_CONV,
    CHANNEL_PQ,
    ClientManifest,
    MixingPlan,
    MixRow,
    Relevance,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.equations.tap import average_weights
from fedml_plugin_fedmosaic.strategies.base import ServerState, StrategyBase
from fedml_plugin_fedmosaic.strategies.common import (
    check_participants,
    layouts_by_client,
    weight_matrix,
)
from fedml_plugin_fedmosaic.strategies.tap_client import FINALIZE, TapClient
from fedml_plugin_fedmosaic.strategies.tap_options import TapOptions
from fedml_plugin_fedmosaic.strategies.tap_sets import (
    SHARED,
    channel_key,
    channel_name,
    keys_of,
)

_ALL_HELD_OUT = 64
"""Held-out samples that are charged where the options do not bound them."""


class Tap(StrategyBase):
    """Averages per key; replacement and distillation are the clients' own."""

    name: ClassVar[str] = "tap"
    adapter: str = "dual_lora"
    eval_view: ClassVar[str] = "personal_post"
    final_views: ClassVar[tuple[str, ...]] = ("personal", "regular_ft", "regular")
    Options: ClassVar[type] = TapOptions

    def __init__(self, options: TapOptions) -> None:
        self.options = options
        if options.exchange == "colora":
            self.adapter = "pq_lora"
        self._client = TapClient(options)

    @property
    def needs_held_out(self) -> bool:
        """Unless training losses are compared."""
        return self.options.test == "held_out"

    @property
    def cost(self) -> Cost:
        """Two passes over the samples of a local step, and two models on held-out samples.

        The final stage, once after the last round, is not part of a round.
        """
        compared = 2 * (self.options.test_samples or _ALL_HELD_OUT) if self.needs_held_out else 0
        return Cost(forwards=2.0, backwards=2.0, comparisons=compared / PLAIN_SAMPLES)

    @property
    def final_stages(self) -> tuple[str, ...]:
        """Fine-tuning and distillation."""
        return (FINALIZE,)

    def init(self, manifests: Sequence[ClientManifest], seed: int) -> ServerState:
        """Remembers the clients, their keys and their samples; nothing has an average yet.

        Raises:
            PlanError: no client, an id twice, or an option for a task that no client has.
        """
        layouts = layouts_by_client(manifests)
        by_task = self.options.key == "task"
        names = {
            name
            for manifest in manifests
            for name in (manifest.tasks if by_task else manifest.modalities.values())
        }
        unknown = sorted(self.options.named - names)
        if unknown:
            raise PlanError(
                f"TAP has options for {unknown}, which no client has",
                hint=f"known: {', '.join(sorted(names))}",
            )
        return {
            "seed": seed,
            "layouts": layouts,
            "signatures": {str(m.client_id): m.signature for m in manifests},
            "samples": {str(m.client_id): self._samples(m) for m in manifests},
            "averages": {},
        }

    def _samples(self, manifest: ClientManifest) -> dict[str, int]:
        """Key -> the client's samples of it over the run; ``shared``: all of them."""
        keys = keys_of(manifest, by_task=self.options.key == "task")
        counts = dict.fromkeys(keys.values(), 0)
        for task, key in keys.items():
            # Without counts per task, all tasks are equally large.
            share = manifest.num_examples // max(len(keys), 1)
            counts[key] += manifest.task_examples.get(task, share)
        names = {} if self.options.sets == "shared" else counts
        return {**names, SHARED: sum(counts.values())} if self._has_shared else names

    @property
    def _has_shared(self) -> bool:
        return self.options.sets != "key"

    def plan(
        self,
        state: ServerState,
        headers: Sequence[UpdateHeader],
        relevance: Relevance | None = None,  # noqa: ARG002 - the contract's signature
    ) -> tuple[ServerState, MixingPlan]:
        """One row per client and channel of which somebody exchangeable has trained the key.

        Raises:
            PlanError: a header of an unknown client, two of one client, or one without notes.
        """
        check_participants(state["layouts"], [header.client_id for header in headers])
        pools = self._pools(state)
        averages = {
            channel: {**state["averages"].get(channel, {}), **self._fresh(state, channel, headers)}
            for channel in pools
        }
        rows = {
            channel: tuple(
                MixRow(
                    target=client,
                    sources=tuple(averages[channel][pool]["sources"]),
                    weights=tuple(averages[channel][pool]["weights"]),
                )
                for client, pool in members.items()
                if pool in averages[channel]
            )
            for channel, members in pools.items()
        }
        rows = {channel: made for channel, made in rows.items() if made}
        widest = next((made for name, made in rows.items() if channel_key(name) == SHARED), ())
        plan = MixingPlan(
            rows=rows, weights=weight_matrix(map(int, state["layouts"]), widest) if rows else None
        )
        return {**state, "averages": averages}, plan

    def _groups(self) -> tuple[str, ...]:
        return () if self.options.exchange == "none" else (CHANNEL_CONV, CHANNEL_PQ)

    def _pools(self, state: ServerState) -> dict[str, dict[int, str]]:
        """Channel -> client that has its key -> pool of clients that are averaged with it."""
        pools: dict[str, dict[int, str]] = {}
        for client, layouts in state["layouts"].items():
            for group in self._groups():
                if group not in layouts:
                    continue
                everyone = group == CHANNEL_PQ and self.options.exchange == "colora"
                scope = "" if everyone else state["signatures"][client]
                for key in state["samples"][client]:
                    members = pools.setdefault(channel_name(group, key), {})
                    members[int(client)] = f"{scope}/{layouts[group]}"
        return pools

    def _fresh(
        self, state: ServerState, channel: str, headers: Sequence[UpdateHeader]
    ) -> dict[str, dict[str, Any]]:
        """Pool -> sources and weights, for the pools of a channel that this round changes.

        Averages are kept in the state as rows over the clients' last uploads. A source that took
        part again without samples of the key has uploaded the average that it had received, and
        that upload alone now is the average.
        """
        key, members = channel_key(channel), self._pools(state)[channel]
        kept: Mapping[str, Mapping[str, Any]] = state["averages"].get(channel, {})
        trained: dict[str, dict[int, int]] = {}
        fresh: dict[str, dict[str, Any]] = {}
        for header in sorted(headers, key=lambda header: header.client_id):
            client = header.client_id
            if client not in members:
                continue
            pool = members[client]
            if _has_trained(header, key):
                samples = state["samples"][str(client)][key]
                trained.setdefault(pool, {})[client] = max(samples, 1)
            elif client in kept.get(pool, {}).get("sources", ()):
                fresh.setdefault(pool, {"sources": [client], "weights": [1.0]})
        for pool, samples in trained.items():
            weights = average_weights(samples)
            fresh[pool] = {"sources": list(weights), "weights": list(weights.values())}
        return fresh


def _has_trained(header: UpdateHeader, key: str) -> bool:
    if "trained" not in header.notes:
        raise PlanError(
            f"client {header.client_id}, round {header.round_idx + 1}: the header does not say "
            "which keys were trained"
        )
    trained: Sequence[str] = header.notes["trained"]
    return bool(trained) if key == SHARED else key in trained
