"""TAP's decisions, averages and views, without models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fedml_plugin_fedmosaic.comm.local import LocalCommunicator
from fedml_plugin_fedmosaic.core.errors import AdapterError, PlanError
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    Branch,
    ClientContext,
    ClientManifest,
    ClientState,
    Part,
    UpdateHeader,
    View,
)
from fedml_plugin_fedmosaic.core.work import LocalResult, Pass, Probe, ProbeResult, Samples
from fedml_plugin_fedmosaic.equations.tap import (
    average_weights,
    distillation_weight,
    replaces,
    shared_is_replaced,
)
from fedml_plugin_fedmosaic.strategies.tap import Tap
from fedml_plugin_fedmosaic.strategies.tap_options import TapOptions

INF = math.inf
CODE, VQA = "text:code", "image+text:vqa"


def adapter(parts: str = "AB") -> dict[AdapterKey, Tensor]:
    shapes = {"A": (2, 5), "B": (4, 2), "P": (2, 2), "Q": (2,)}
    return {
        AdapterKey(0, 0, "q_proj", branch, Part(part)): torch.randn(shapes[part])
        for branch in (Branch.LOCAL, Branch.GLOBAL)
        for part in parts
    }


def manifest(client_id: int, tasks: Mapping[str, int], signature: str = "S") -> ClientManifest:
    kinds = {"vqa": "image+text", "captions": "image+text"}
    return ClientManifest(
        client_id=client_id,
        model=signature,
        family="toy",
        signature=signature,
        num_layers=1,
        num_blocks=1,
        num_examples=sum(tasks.values()),
        tasks=tuple(tasks),
        layouts={"conv": f"{signature}-layout", "pq": "blocks"},
        task_examples=dict(tasks),
        modalities={task: kinds.get(task, "text") for task in tasks},
    )


def context(one: ClientManifest, stage: str = "train") -> ClientContext:
    return ClientContext(manifest=one, round_idx=0, num_rounds=3, num_steps=5, seed=0, stage=stage)


def result(**losses: float) -> LocalResult:
    return LocalResult(
        adapter={}, losses=(1.0,), num_examples=4, num_tokens=4, duration_s=0.0, task_losses=losses
    )


class Client:
    """One client half with its state; training moves every set that a pass names."""

    def __init__(self, tasks: Mapping[str, int], **options: Any) -> None:
        self.strategy = Tap(TapOptions(**options))
        self.half = self.strategy.client
        self.manifest = manifest(0, tasks)
        self.context = context(self.manifest)
        self.state: ClientState = self.half.init_state(adapter("ABPQ"), self.context)

    def train(self, work: Pass) -> None:
        names = {*work.route.values(), *filter(None, [work.into])}
        moved = {
            name: {
                key: value + 1.0 + ("p." in name) for key, value in self.state.sets[name].items()
            }
            for name in names
        }
        self.state = replace(self.state, sets={**self.state.sets, **moved})

    def advance(self, **results: Any) -> tuple[Any, ...]:
        self.state, works = self.half.advance(results, self.state, self.context)
        return works

    def federated(self, **losses: float) -> Any:
        """The round up to what follows the federated pass."""
        self.state, (work,) = self.half.prepare({}, self.state, self.context)
        self.train(work)
        (follows,) = self.advance(federated=result(**losses))
        return follows

    def personal(self, work: Any, **losses: float) -> UpdateHeader:
        """The rest of the round."""
        self.train(work)
        assert self.advance(personal=result(**losses)) == ()
        header = UpdateHeader(client_id=0, round_idx=0, num_examples=4)
        update, self.state = self.half.finish(result(), self.state, self.context, header)
        return update.header

    def replaced(self, name: str) -> bool:
        first, second = (self.state.sets[f"{edition}.{name}"] for edition in "pf")
        return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("federated", "personal", "margin", "kind", "expected"),
    [
        (0.98, 1.0, 0.01, "relative", True),
        (0.99, 1.0, 0.01, "relative", False),  # strictly smaller
        (0.0099, 0.01, 0.02, "relative", False),
        (0.98, 1.0, 0.01, "absolute", True),
        (0.0099, 0.01, 0.02, "absolute", False),
        (2.0, 1.0, -1.5, "relative", True),
        (9.0, None, 0.01, "relative", True),  # never trained
        (None, None, 0.01, "absolute", True),
        (None, 1.0, 0.01, "absolute", False),
        (0.0, 9.0, INF, "relative", False),
        (0.0, None, INF, "absolute", False),
        (9.0, 0.0, -INF, "relative", True),
    ],
)
def test_margins(federated: Any, personal: Any, margin: float, kind: Any, expected: bool) -> None:
    assert replaces(federated, personal, margin, kind) is expected


@pytest.mark.parametrize(
    ("votes", "voters", "fraction", "expected"),
    [
        (0, 3, 0.0, False),
        (1, 3, 0.0, True),
        (1, 3, 0.5, False),
        (2, 3, 0.5, True),
        (1, 2, 0.5, True),
        (3, 10, 0.3, True),  # 0.3 * 10 is a little more than 3
        (2, 3, 1.0, False),
        (0, 0, 0.5, False),
    ],
)
def test_votes_for_the_shared_adapter(
    votes: int, voters: int, fraction: float, expected: bool
) -> None:
    assert shared_is_replaced(votes, voters, fraction) is expected


def test_weights_of_averages_and_distillation() -> None:
    assert average_weights({3: 1, 1: 3, 2: 0}) == {1: 0.75, 3: 0.25}
    assert average_weights({}) == {}
    assert distillation_weight(0.5, 3.0) == 4.5


def test_a_first_round_replaces_and_draws_anew_and_a_lost_comparison_does_not() -> None:
    client = Client({"code": 6, "vqa": 2}, test="train")
    work = client.federated(code=2.0, vqa=3.0)
    assert (work.name, work.samples, work.salt) == ("personal", Samples.REPLAY, "personal")
    assert all(client.replaced(name) for name in (CODE, VQA, "shared"))
    header = client.personal(work, code=1.0, vqa=1.0)
    assert header.notes["trained"] == [VQA, CODE]
    # The federated losses are above the personal ones of the last round: the same samples again.
    work = client.federated(code=2.0, vqa=1.5)
    assert (work.samples, work.salt) == (Samples.ROUND, "")
    assert not any(client.replaced(name) for name in (CODE, VQA, "shared"))
    header = client.personal(work, code=1.0, vqa=1.0)
    assert header.notes["report"][VQA] == {"federated": 1.5, "personal": 1.0, "replaced": False}
    assert header.notes["report"]["shared"] == {"votes": 0, "voters": 2, "replaced": False}
    assert client.state.extra["tap"] == {
        "keys": {"code": CODE, "vqa": VQA},
        "losses": {CODE: 1.0, VQA: 1.0},
        "log": {CODE: [2, 1], VQA: [2, 1], "shared": [2, 1]},
    }


@pytest.mark.parametrize(("vote", "shared"), [(0.0, True), (0.5, False)])
def test_one_of_three_keys_is_replaced_and_the_vote_decides_on_the_shared_set(
    vote: float, shared: bool
) -> None:
    client = Client({"code": 6, "vqa": 2, "sums": 2}, test="train", vote=vote)
    client.personal(client.federated(code=2.0, vqa=2.0, sums=2.0), code=1.0, vqa=1.0, sums=1.0)
    work = client.federated(code=0.5, vqa=2.0, sums=2.0)
    assert work.samples is Samples.REPLAY
    assert client.replaced(CODE)
    assert not client.replaced(VQA)
    assert client.replaced("shared") is shared


def test_margins_of_single_tasks() -> None:
    client = Client({"code": 6, "vqa": 2}, test="train", margins={"code": INF, "vqa": -INF})
    client.federated(code=0.1, vqa=9.0)
    assert not client.replaced(CODE)
    assert client.replaced(VQA)


def test_held_out_losses_decide_where_there_are_held_out_samples() -> None:
    client = Client({"code": 6, "vqa": 2})
    first = client.federated(code=2.0)
    assert isinstance(first, Pass), "nothing to compare with yet"
    client.personal(first, code=1.0)
    probe = client.federated(code=0.1, vqa=0.1)
    assert isinstance(probe, Probe)
    assert (probe.samples, probe.limit) == (Samples.HELD_OUT, 64)
    assert probe.tasks == {f"f.{CODE}": ("code",), f"p.{CODE}": ("code",)}
    assert probe.models[f"p.{CODE}"].overlay == ("p.shared", f"p.{CODE}")
    losses = {f"f.{CODE}": {"code": 2.0}, f"p.{CODE}": {"code": 1.0}}
    client.advance(compare=ProbeResult(losses=losses, counts={"code": 3}))
    assert not client.replaced(CODE)
    assert client.replaced(VQA)  # its first training
    # Without held-out samples of a key its losses in training are compared.
    client = Client({"code": 6, "vqa": 2})
    client.personal(client.federated(code=2.0), code=1.0)
    client.federated(code=0.1)
    client.advance(compare=ProbeResult(losses={}, counts={}))
    assert client.replaced(CODE)


def test_tasks_of_the_same_modalities_can_share_a_key() -> None:
    client = Client({"vqa": 6, "code": 1, "captions": 2}, key="modality")
    images = "image+text:"
    assert list(client.state.extra["tap"]["keys"].values()) == [images, "text:", images]
    client.personal(client.federated(vqa=2.0, captions=4.0), vqa=1.0, captions=2.0)
    assert client.state.extra["tap"]["losses"] == {images: 1.5}
    probe = client.federated(vqa=1.0)
    assert probe.tasks[f"f.{images}"] == ("vqa", "captions")
    losses = {  # weighted by samples: 1.2 against 1.4
        f"f.{images}": {"vqa": 1.0, "captions": 2.0},
        f"p.{images}": {"vqa": 1.5, "captions": 1.0},
    }
    work = client.advance(compare=ProbeResult(losses=losses, counts={"vqa": 4, "captions": 1}))
    assert client.replaced(images)
    assert work[0].route == {"vqa": f"p.{images}", "code": "p.text:", "captions": f"p.{images}"}


def test_the_final_stage_distils_each_key_from_its_own_teacher() -> None:
    client = Client(
        {"code": 6, "vqa": 2},
        distillation=0.5,
        distillations={"vqa": 0.25},
        temperatures={"vqa": 2.0},
        final_steps=7,
        final_lr_scale=0.3,
    )
    final = context(client.manifest, "finalize")
    state, (teacher, student) = client.half.prepare({}, client.state, final)
    assert [work.num_steps for work in (teacher, student)] == [7, 7]
    assert [work.lr_scale for work in (teacher, student)] == [0.3, 0.3]
    assert not teacher.distil
    terms = {term.tasks: term for term in student.distil}
    assert (terms["code",].weight, terms["code",].temperature) == (0.5, 1.0)
    assert (terms["vqa",].weight, terms["vqa",].temperature) == (1.0, 2.0)
    assert terms["vqa",].teachers[0].overlay == ("t.shared", f"t.{VQA}")
    assert student.route == {"code": f"s.{CODE}", "vqa": f"s.{VQA}"}
    assert {name.partition(".")[0] for name in state.sets} == set("fpts")
    update, _ = client.half.finish(
        result(), state, final, UpdateHeader(client_id=0, round_idx=3, num_examples=1)
    )
    assert not update.tensors


def test_a_client_never_replaced_keeps_its_own_sets_in_the_final_stage() -> None:
    client = Client({"code": 6}, margin=INF)
    before = client.state.sets["p.shared"]
    state, _ = client.half.prepare({}, client.state, context(client.manifest, "finalize"))
    assert state.sets["p.shared"] is before


def test_foreign_tasks_get_the_shared_set_and_views_their_edition() -> None:
    client = Client({"code": 6})
    served = client.half.serve("personal_post", "code", client.state).model
    assert (served.overlay, served.view) == (("p.shared", f"p.{CODE}"), View.SUM)
    assert client.half.serve("regular", "code", client.state).model.overlay[0] == "f.shared"
    foreign = client.half.serve("personal", "poems", client.state).model
    assert (foreign.overlay, foreign.view) == (("p.shared",), View.GLOBAL)
    assert client.half.serve("local", "code", client.state).model.view is View.LOCAL
    alone = Client({"code": 6}, sets="key")
    assert alone.half.serve("personal", "poems", alone.state).model.view is View.BASE
    with pytest.raises(PlanError, match="no view 'best'"):
        client.half.serve("best", "code", client.state)


def test_the_two_editions_begin_equal_and_the_shared_factor_differs_from_the_keys() -> None:
    client = Client({"code": 6})
    sets = client.state.sets
    for name in (CODE, "shared"):
        assert client.replaced(name)
        for first, second in zip(
            sets[f"p.{name}"].values(), sets[f"f.{name}"].values(), strict=True
        ):
            assert first.data_ptr() != second.data_ptr()
    factors = [next(v for k, v in sets[name].items() if k.part is Part.A) for name in sets]
    assert not torch.equal(factors[0], factors[1])
    assert all(factor.abs().max() <= 1 / math.sqrt(5) for factor in factors[1:2])


def notes(*trained: str) -> dict[str, Any]:
    return {"trained": list(trained)}


def header(client: int, *trained: str, round_idx: int = 0) -> UpdateHeader:
    return UpdateHeader(
        client_id=client, round_idx=round_idx, num_examples=9, notes=notes(*trained)
    )


def rows(plan: Any) -> dict[str, dict[int, dict[int, float]]]:
    return {
        channel: {row.target: dict(zip(row.sources, row.weights, strict=True)) for row in made}
        for channel, made in plan.rows.items()
    }


def test_a_key_is_averaged_over_who_trained_it_by_the_samples_of_that_key() -> None:
    strategy = Tap(TapOptions())
    manifests = [
        manifest(0, {"code": 30, "vqa": 10}),
        manifest(1, {"code": 10}),
        manifest(2, {"vqa": 50}),
        manifest(3, {"code": 7}, signature="M"),
    ]
    state, plan = strategy.plan(
        strategy.init(manifests, 0), [header(0, CODE, VQA), header(1, CODE)]
    )
    got = rows(plan)
    assert got[f"conv:{CODE}"] == {0: {0: 0.75, 1: 0.25}, 1: {0: 0.75, 1: 0.25}}
    assert got[f"conv:{VQA}"] == {0: {0: 1.0}, 2: {0: 1.0}}
    assert got["conv:shared"] == {client: {0: 0.8, 1: 0.2} for client in (0, 1, 2)}
    # Nobody trains vqa, but client 0 uploads what it received: that alone is the average now.
    state, plan = strategy.plan(state, [header(0, CODE, round_idx=1)])
    assert rows(plan)[f"conv:{VQA}"] == {0: {0: 1.0}, 2: {0: 1.0}}
    state, plan = strategy.plan(state, [header(2, VQA, round_idx=2)])
    assert rows(plan)[f"conv:{VQA}"] == {0: {2: 1.0}, 2: {2: 1.0}}
    assert rows(plan)[f"conv:{CODE}"] == {0: {0: 1.0}, 1: {0: 1.0}}
    assert plan.weights is not None


def test_an_average_that_nobody_trains_stays_bit_for_bit() -> None:
    """Client 0 comes back without samples of the key; the other source stays away."""
    strategy = Tap(TapOptions(sets="key"))
    manifests = [
        replace(manifest(client, {"code": 10}), layouts={"conv": "S-layout"}) for client in range(3)
    ]
    comm = LocalCommunicator()
    name = f"conv:{CODE}/0/q_proj/A"
    uploads: dict[int, Any] = {
        client: {name: torch.randn(3, generator=torch.Generator().manual_seed(client))}
        for client in range(2)
    }
    state, received = strategy.init(manifests, 0), []
    for sent in ([header(0, CODE), header(1, CODE)], [header(0, round_idx=1)]):
        comm.exchange_headers(sent)
        state, plan = strategy.plan(state, sent)
        downlinks = comm.execute(plan, uploads)
        received.append(downlinks[2][name])
        uploads[0] = dict(downlinks[0])
    assert torch.equal(received[0], received[1])
    assert rows(plan) == {f"conv:{CODE}": {client: {0: 1.0} for client in range(3)}}


def test_blocks_cross_architectures_only_with_colora() -> None:
    manifests = [manifest(0, {"code": 1}), manifest(1, {"code": 3}, signature="M")]
    sent = [header(0, CODE), header(1, CODE)]
    strategy = Tap(TapOptions(exchange="colora"))
    _, plan = strategy.plan(strategy.init(manifests, 0), sent)
    got = rows(plan)
    assert got[f"pq:{CODE}"] == {client: {0: 0.25, 1: 0.75} for client in (0, 1)}
    assert got[f"conv:{CODE}"] == {client: {client: 1.0} for client in (0, 1)}
    strategy = Tap(TapOptions())
    _, plan = strategy.plan(strategy.init(manifests, 0), sent)
    assert rows(plan)[f"pq:{CODE}"] == {client: {client: 1.0} for client in (0, 1)}
    strategy = Tap(TapOptions(exchange="none"))
    assert rows(strategy.plan(strategy.init(manifests, 0), sent)[1]) == {}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="a margin is a number"):
        TapOptions(margin=math.nan)
    with pytest.raises(ValidationError, match="vote"):
        TapOptions(vote=1.5)
    with pytest.raises(PlanError, match=r"options for \['cod'\]"):
        Tap(TapOptions(margins={"cod": 0.1})).init([manifest(0, {"code": 3})], 0)
    one = context(manifest(0, {"code": 3}))
    lora = {key: value for key, value in adapter().items() if key.branch is Branch.LOCAL}
    with pytest.raises(AdapterError, match="two equal branches, got 2 local and 0 global"):
        Tap(TapOptions()).client.init_state(lora, one)
    with pytest.raises(AdapterError, match="exchanges P and Q"):
        Tap(TapOptions(exchange="colora")).client.init_state(adapter(), one)
    strategy = Tap(TapOptions())
    state = strategy.init([manifest(0, {"code": 3})], 0)
    bare = UpdateHeader(client_id=0, round_idx=0, num_examples=1)
    with pytest.raises(PlanError, match="does not say which keys"):
        strategy.plan(state, [bare])


def test_two_passes_cost_half_the_steps_and_comparisons_some_more() -> None:
    assert Tap(TapOptions(test="train")).cost.share == 0.5
    assert Tap(TapOptions()).cost.share == Tap(TapOptions(test_samples=None)).cost.share == 0.45
    assert Tap(TapOptions(test_samples=8)).cost.share == 0.49


def test_fidelity_needs_no_held_out_samples() -> None:
    assert Tap(TapOptions()).needs_held_out
    assert not Tap(TapOptions(test="train")).needs_held_out
    assert Tap(TapOptions()).final_stages == ("finalize",)
