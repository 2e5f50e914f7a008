"""kNN-Per: every client mixes its model with a store of what its own data look like inside.

After the last round, and without any further training, client i keeps for some of its samples the
last hidden state h before each answer token y. When it answers, with d the width of h::

    p_knn(y | h) ~ sum over the k nearest keys h_j with value y of exp(-|h - h_j|^2 / (d scale))
    p(y | h)     = lam p_knn(y | h) + (1 - lam) p_model(y | h)

Each client chooses lam and k itself, by the log-probability of answers that it kept away from
training. ``lam = 0`` is among the choices, so a store that does not help is not used.

``knn_fedavg`` and ``knn_fedmosaic`` do this on top of FedAvg and of FedMosaic, whose options they
have, too. Clients that were never selected get a store as well, on top of what the server has for
them.

Source: kNN-Per (Marfoq et al., ICML 2022, arXiv 2111.09360); its form for language models is
kNN-LM (arXiv 1911.00172).
Differences to it: the store is asked for every token of an answer, so generated answers and ranked
choices are served alike; the model under it is each client's own as its strategy reports it
(``under: received``: what the server last made for it, the published way); k is chosen, too; the
search is exact.
Across signatures: nothing is exchanged for the stores, so clients need have nothing in common;
below them the strategy shares as it does. Tasks of others are answered with the client's own store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.types import (
    AdapterState,
    ClientContext,
    ClientState,
    ClientUpdate,
    SharedTensors,
    UpdateHeader,
)
from fedml_plugin_fedmosaic.core.work import (
    LocalResult,
    ModelRef,
    Probe,
    ProbeResult,
    Result,
    Samples,
    Served,
    Work,
)
from fedml_plugin_fedmosaic.equations.knn import choose_mixture, neighbour_shares
from fedml_plugin_fedmosaic.strategies.base import TRAIN, ClientHalf
from fedml_plugin_fedmosaic.strategies.fedavg import FedAvg, FedAvgOptions
from fedml_plugin_fedmosaic.strategies.fedmosaic import FedMosaic, FedMosaicOptions

FINAL = "store"
KEYS, VALUES, EXTRA = "knn/keys", "knn/values", "knn"
_MODEL = "model"
_STORE, _HIDDEN, _LOGITS = "store", "held-out hidden states", "held-out logits"

_Share = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KnnFedAvgOptions(FedAvgOptions):
    """Options of kNN-Per on FedAvg: FedAvg's and those of the store."""

    neighbours: tuple[_Count, ...] = (4, 16)
    """Numbers of neighbours (k) to choose from."""
    mixing: tuple[_Share, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Weights of the store (lam) to choose from."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Distances are divided by this and by the width of the model."""
    store_samples: _Count = 2000
    """Samples in a client's store, drawn from all that arrived."""
    store_tokens: _Count = 20_000
    """Answer tokens in a client's store; further ones are left out."""
    held_out_samples: _Count = 64
    """Held-out samples by which k and lam are chosen."""
    under: Literal["trained", "received"] = "trained"
    """The model under the store: the client's own, or what the server last made for it."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KnnFedMosaicOptions(FedMosaicOptions):
    """Options of kNN-Per on FedMosaic: FedMosaic's and those of the store."""

    neighbours: tuple[_Count, ...] = (4, 16)
    """Numbers of neighbours (k) to choose from."""
    mixing: tuple[_Share, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Weights of the store (lam) to choose from."""
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Distances are divided by this and by the width of the model."""
    store_samples: _Count = 2000
    """Samples in a client's store, drawn from all that arrived."""
    store_tokens: _Count = 20_000
    """Answer tokens in a client's store; further ones are left out."""
    held_out_samples: _Count = 64
    """Held-out samples by which k and lam are chosen."""
    under: Literal["trained", "received"] = "trained"
    """The model under the store: the client's own, or what the server last made for it."""


NeighbourOptions = KnnFedAvgOptions | KnnFedMosaicOptions


class NeighbourClient:
    """Another client half with a store added after the last round.

    Args:
        base: does everything before that.
        options: of the store.
        view: the reported view, which the store belongs to.
    """

    def __init__(self, base: ClientHalf, options: NeighbourOptions, view: str) -> None:
        self._base = base
        self._options = options
        self._view = view

    def init_state(self, adapter: AdapterState, context: ClientContext) -> ClientState:
        """The base strategy's."""
        return self._base.init_state(adapter, context)

    def prepare(
        self, downlink: SharedTensors, state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """The base strategy's; after the last round, a look at the client's own samples.

        Raises:
            PlanError: the downlink does not fit the client's adapter.
        """
        if context.stage != FINAL:
            return self._base.prepare(downlink, state, context)
        if self._options.under == "received" or state.participations == 0:
            state, _ = self._base.prepare(downlink, state, replace(context, stage=TRAIN))
        model = {_MODEL: self._base.serve(self._view, "", state).model}
        held_out = self._options.held_out_samples
        return state, (
            self._look(_STORE, model, Samples.REPLAY, self._options.store_samples, "hidden"),
            self._look(_HIDDEN, model, Samples.HELD_OUT, held_out, "hidden"),
            self._look(_LOGITS, model, Samples.HELD_OUT, held_out, "logits"),
        )

    def advance(
        self, results: Mapping[str, Result], state: ClientState, context: ClientContext
    ) -> tuple[ClientState, tuple[Work, ...]]:
        """Makes the store and chooses k and lam."""
        if context.stage != FINAL:
            return self._base.advance(results, state, context)
        store, hidden, logits = (_seen(results, name) for name in (_STORE, _HIDDEN, _LOGITS))
        keys, values = _joined(store)
        keys, values = keys[: self._options.store_tokens], values[: self._options.store_tokens]
        k, lam, mean = self._choose(keys, values, hidden, logits)
        chosen = {"k": k, "lam": lam, "held_out_log_probability": mean, "tokens": len(values)}
        tensors = {**state.tensors, KEYS: keys.to(torch.float16), VALUES: values}
        extra = {**state.extra, EXTRA: chosen}
        return replace(state, tensors=tensors, extra=extra), ()

    def finish(
        self,
        result: LocalResult,
        state: ClientState,
        context: ClientContext,
        header: UpdateHeader,
    ) -> tuple[ClientUpdate, ClientState]:
        """The base strategy's; a store is not sent."""
        if context.stage != FINAL:
            return self._base.finish(result, state, context, header)
        return ClientUpdate(header=header, tensors={}), state

    def serve(self, view: str, task: str, state: ClientState) -> Served:
        """The base strategy's model, with the store in the reported view."""
        served = self._base.serve(view, task, state)
        chosen = state.extra.get(EXTRA)
        if chosen is None or view != self._view or chosen["lam"] == 0:
            return served
        return replace(
            served,
            mixer="knn",
            tensors={"keys": state.tensors[KEYS], "values": state.tensors[VALUES]},
            options={
                "lam": float(chosen["lam"]),
                "k": float(chosen["k"]),
                "scale": self._options.scale,
            },
        )

    def _choose(
        self, keys: Tensor, values: Tensor, hidden: ProbeResult, logits: ProbeResult
    ) -> tuple[int, float, float]:
        """k, lam and the mean log-probability of the held-out answers."""
        queries, golds = _joined(hidden)
        known = torch.cat(
            [
                logits.tensors[f"{_MODEL}/{name}"]
                .float()
                .softmax(dim=1)
                .gather(1, torch.tensor(labels, dtype=torch.int64)[:, None])[:, 0]
                for name, labels in sorted(logits.labels.items())
            ]
        )
        stores = {}
        for k in self._options.neighbours:
            places, shares = neighbour_shares(queries, keys, k, self._options.scale)
            stores[k] = (shares * (values[places] == golds[:, None])).sum(dim=1)
        return choose_mixture(known, stores, self._options.mixing)

    def _look(
        self,
        name: str,
        models: Mapping[str, ModelRef],
        samples: Samples,
        limit: int,
        what: Literal["hidden", "logits"],
    ) -> Probe:
        return Probe(name=name, models=models, samples=samples, limit=limit, what=what)


class KnnFedAvg(FedAvg):
    """kNN-Per on FedAvg."""

    name: ClassVar[str] = "knn_fedavg"
    Options: ClassVar[type] = KnnFedAvgOptions

    def __init__(self, options: KnnFedAvgOptions) -> None:
        super().__init__(options)
        self._client = NeighbourClient(self._client, options, self.eval_view)

    @property
    def needs_held_out(self) -> bool:
        """True: k and lam are chosen by held-out samples."""
        return True

    @property
    def final_stages(self) -> tuple[str, ...]:
        """The store."""
        return (FINAL,)


class KnnFedMosaic(FedMosaic):
    """kNN-Per on FedMosaic."""

    name: ClassVar[str] = "knn_fedmosaic"
    Options: ClassVar[type] = KnnFedMosaicOptions

    def __init__(self, options: KnnFedMosaicOptions) -> None:
        super().__init__(options)
        self._client = NeighbourClient(self._client, options, self.eval_view)

    @property
    def needs_held_out(self) -> bool:
        """True: k and lam are chosen by held-out samples."""
        return True

    @property
    def final_stages(self) -> tuple[str, ...]:
        """The store."""
        return (FINAL,)


def _seen(results: Mapping[str, Result], name: str) -> ProbeResult:
    found = results.get(name)
    if not isinstance(found, ProbeResult) or not found.labels:
        raise PlanError(f"kNN-Per: nothing was seen of {name!r}")
    return found


def _joined(seen: ProbeResult) -> tuple[Tensor, Tensor]:
    """Hidden states (tokens, d) and the tokens that follow (tokens,), by sample in order."""
    names: Sequence[str] = sorted(seen.labels)
    states = [seen.tensors[f"{_MODEL}/{name}"] for name in names]
    labels = [torch.tensor(seen.labels[name], dtype=torch.int64) for name in names]
    return torch.cat(states), torch.cat(labels)
