"""A federation of a few small tensors: what a strategy sees, without models and without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from toy_work import do_turns, merged

from fedml_plugin_fedmosaic.comm.codec import Layout
from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.rng import torch_generator
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    Branch,
    ClientContext,
    ClientManifest,
    ClientState,
    MixingPlan,
    MixRow,
    Part,
    Relevance,
    UpdateHeader,
    channel_of,
)

RANK = 3
MODULE = "q_proj"
# name -> (hidden size, layers, last layer of each of the two blocks)
ARCHITECTURES: Mapping[str, tuple[int, int, tuple[int, int]]] = {
    "S": (5, 4, (1, 3)),
    "M": (6, 6, (2, 5)),
    "X": (4, 2, (0, 1)),
}


def toy_adapter(architecture: str, kind: str, seed: int = 0) -> dict[AdapterKey, Tensor]:
    """Random adapter tensors of one architecture; ``kind`` is an adapter's registry name."""
    hidden, layers, ends = ARCHITECTURES[architecture]
    generator = torch_generator(seed, "adapter", architecture)
    both = (Branch.LOCAL, Branch.GLOBAL)
    state: dict[AdapterKey, Tensor] = {}

    def add(block: int, layer: int, branch: Branch, part: Part, *shape: int) -> None:
        key = AdapterKey(block, layer, MODULE, branch, part)
        state[key] = torch.randn(shape, generator=generator)

    for layer in range(layers):
        block = 0 if layer <= ends[0] else 1
        is_pq = kind == "pq_lora" and layer in ends
        pq_branches = (Branch.SHARED,) if is_pq else both
        branches = {"lora": (Branch.LOCAL,), "dual_lora": both, "pq_lora": pq_branches}[kind]
        for branch in branches:
            add(block, layer, branch, Part.A, RANK, hidden)
            add(block, layer, branch, Part.B, hidden, RANK)
        if kind == "pq_lora":
            add(block, layer, Branch.SHARED, Part.GATE)
        if is_pq:
            for branch in both:
                add(block, layer, branch, Part.P, RANK, RANK)
                add(block, layer, branch, Part.Q, RANK)
    return state


def toy_manifest(client_id: int, architecture: str, kind: str) -> ClientManifest:
    adapter = toy_adapter(architecture, kind)
    shared = {key.share_key: value for key, value in adapter.items() if key.branch is Branch.LOCAL}
    layouts = {
        channel: Layout.of({k: v for k, v in shared.items() if channel_of(k) == channel}).digest
        for channel in sorted({channel_of(key) for key in shared})
    }
    return ClientManifest(
        client_id=client_id,
        model=architecture,
        family="toy",
        signature=architecture,
        num_layers=ARCHITECTURES[architecture][1],
        num_blocks=2,
        num_examples=10 + client_id,
        tasks=("toy-0",),
        layouts=layouts,
        vocabulary="toy words",
        task_examples={"toy-0": 10 + client_id},
        modalities={"toy-0": "text"},
    )


def toy_sketch(client_id: int, round_idx: int, rows: int = 4, columns: int = 6) -> Tensor:
    return torch.randn(rows, columns, generator=torch_generator(7, "sketch", client_id, round_idx))


def plan_with_sketches(
    strategy: Any, state: Any, headers: Sequence[UpdateHeader], held: dict[int, Tensor]
) -> tuple[Any, MixingPlan]:
    """``strategy.plan`` with the relevance of headers that still hold their sketches' values.

    ``held`` are the last sketches of clients that took part earlier; the new ones are added.
    """
    if strategy.similarity is None:
        return strategy.plan(state, headers)
    held.update({header.client_id: header.sketch for header in headers})
    relevance = relevance_of(LocalCommunicator(), strategy, state, headers, held)
    return strategy.plan(state, headers, relevance)


def relevance_of(
    comm: LocalCommunicator,
    strategy: Any,
    state: Any,
    headers: Sequence[UpdateHeader],
    held: Mapping[int, Tensor],
) -> Relevance | None:
    """The similarity that a strategy asks for, as the runtime has it computed."""
    if strategy.similarity is None or not headers:
        return None
    queries = strategy.queries(state, headers)
    if queries is not None:
        found = comm.nearest(strategy.similarity, held, queries)
        return Relevance(clients=(), values=torch.zeros(0, 0), neighbours=found)
    return comm.relevance(strategy.similarity, held, [header.client_id for header in headers])


@dataclass
class ToyFederation:
    """Plays rounds as the runtime does; training adds fixed random steps to what a pass trains.

    Args:
        strategy: a strategy object.
        architectures: one name of ``ARCHITECTURES`` per client.
        per_round: clients drawn per round; all when omitted.
        seed: root seed.
    """

    strategy: Any
    architectures: Sequence[str]
    per_round: int | None = None
    seed: int = 3
    rounds: int = 0
    downlinks: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    uploads: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    stage_uploads: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    sketches: dict[int, Tensor] = field(default_factory=dict)
    plan: MixingPlan = field(default_factory=MixingPlan)
    headers: tuple[UpdateHeader, ...] = ()

    def __post_init__(self) -> None:
        self.manifests = [
            toy_manifest(client, name, self.strategy.adapter)
            for client, name in enumerate(self.architectures)
        ]
        self.state = self.strategy.init(self.manifests, self.seed)
        self.clients: dict[int, ClientState] = {
            manifest.client_id: self.strategy.client.init_state(
                toy_adapter(manifest.signature, self.strategy.adapter), self.context(manifest)
            )
            for manifest in self.manifests
        }
        self.comm = LocalCommunicator()

    def context(self, manifest: ClientManifest, stage: str = "train") -> ClientContext:
        return ClientContext(
            manifest=manifest,
            round_idx=self.rounds,
            num_rounds=9,
            num_steps=5,
            seed=self.seed,
            stage=stage,
            public_steps=2,
        )

    def play(self, rounds: int = 1) -> ToyFederation:
        for _ in range(rounds):
            cohort = self.strategy.select(
                self.state, self.rounds, self.per_round or len(self.manifests)
            )
            self.headers = self.comm.exchange_headers([self.train(client) for client in cohort])
            relevance = self.relevance(self.headers)
            self.state, self.plan = self.strategy.plan(self.state, self.headers, relevance)
            self.downlinks.update(self.comm.execute(self.plan, self.uploads))
            for stage in self.strategy.stages[1:]:
                self.play_stage(stage, cohort)
            self.rounds += 1
        return self

    def finalise(self) -> ToyFederation:
        """The stages after the last round, for everyone."""
        for stage in self.strategy.final_stages:
            self.play_stage(stage, sorted(self.clients))
        return self

    def play_stage(self, stage: str, cohort: Sequence[int]) -> MixingPlan:
        """A later stage: what it mixes was sent in it, what it delivers adds to the downlinks."""
        chosen = self.strategy.select_stage(self.state, stage, self.rounds, tuple(cohort))
        headers = self.comm.exchange_headers([self.train(client, stage) for client in chosen])
        self.state, plan = self.strategy.plan_stage(self.state, stage, headers)
        sent = {client: self.stage_uploads[client] for client in chosen}
        for client, tensors in self.comm.execute(plan, sent).items():
            if tensors:
                self.downlinks[client] = merged(self.downlinks.get(client, {}), tensors)
        return plan

    def relevance(self, headers: Sequence[UpdateHeader]) -> Relevance | None:
        return relevance_of(self.comm, self.strategy, self.state, headers, self.sketches)

    def train(self, client: int, stage: str = "train") -> UpdateHeader:
        context = self.context(self.manifests[client], stage)
        half = self.strategy.client
        state, result, _ = do_turns(
            half, self.downlinks.get(client, {}), self.clients[client], context
        )
        first = stage == "train"
        sketch = toy_sketch(client, self.rounds) if self.strategy.needs_sketch and first else None
        header = UpdateHeader(
            client_id=client, round_idx=self.rounds, num_examples=20 + client, sketch=sketch
        )
        update, state = half.finish(result, state, context, header)
        if update.header.sketch is not None:
            self.sketches[client] = update.header.sketch
        self.clients[client] = replace(state, participations=state.participations + first)
        (self.uploads if first else self.stage_uploads)[client] = update.tensors
        return update.header


def random_uploads(num_clients: int, seed: int = 0) -> dict[int, dict[str, Tensor]]:
    """Uploads of clients of two kinds (even and odd ids) with a common and an own channel."""
    uploads: dict[int, dict[str, Tensor]] = {}
    for client in range(num_clients):
        generator = torch_generator(seed, "upload", client)
        width = 11 if client % 2 == 0 else 17
        shapes = {"pq/0/m/P": (8, 8), "pq/0/m/Q": (8,), "pq/1/m/P": (8, 8)}
        shapes |= {f"conv/{layer}/m/A": (8, width) for layer in range(3)}
        uploads[client] = {
            key: torch.randn(shape, generator=generator) * 10.0 ** (client - 3)
            for key, shape in shapes.items()
        }
    return uploads


def random_plan(num_clients: int, seed: int = 0) -> MixingPlan:
    """Rows with random sources and weights; some clients receive nothing, some share sources."""
    generator = torch_generator(seed, "plan")
    rows: dict[str, list[MixRow]] = {"pq": [], "conv": []}
    for channel, made in rows.items():
        for target in range(num_clients):
            peers = [
                client
                for client in range(num_clients)
                if channel == "pq" or client % 2 == target % 2
            ]
            keep = torch.rand(len(peers), generator=generator) < 0.6
            if channel == "conv":  # all receivers of a kind read the same sources
                keep[:] = True
            sources = tuple(c for c, kept in zip(peers, keep.tolist(), strict=True) if kept)
            weights = torch.rand(len(sources), generator=generator, dtype=torch.float64)
            if sources and target != 2:
                made.append(MixRow(target=target, sources=sources, weights=tuple(weights.tolist())))
    return MixingPlan(rows={channel: tuple(made) for channel, made in rows.items()})
