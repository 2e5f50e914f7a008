"""A small network on the server that says, layer by layer, how much a client takes of whom.

Source: pFedLA (layer-wised model aggregation, CVPR 2022, arXiv 2205.03993): each client has a
hypernetwork with an embedding v and weights psi; its output alpha mixes the clients' layers, and
psi moves so that the mix follows what the client's training made of it.

Here: ``h = tanh(W1 v + b1) / sqrt(H)`` and, over the sources,
``alpha[l] = softmax(W2[l] h + b2[l])``. W2 starts at 0, so alpha starts as b2 says, equal for all
others; a network is plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import PlanError
from fedml_plugin_fedmosaic.core.rng import torch_generator

_NORM_FLOOR = 1e-12

Network = Mapping[str, Tensor]
"""``v`` (E,), ``w1`` (H, E), ``b1`` (H,), ``w2`` (L, S, H) and ``b2`` (L, S), float32."""


def new_network(
    *,
    layers: int,
    sources: int,
    own: int,
    embedding: int,
    hidden: int,
    self_weight: float,
    seed: int,
) -> dict[str, Tensor]:
    """The network of a client before its first round.

    Args:
        layers: decoder layers (L).
        sources: clients that may be mixed, this one included (S).
        own: this client's position among them.
        embedding: length of v (E).
        hidden: width of the hidden layer (H).
        self_weight: weight of the client's own layer at the start, in (0, 1); the others share the
            rest equally.
        seed: root seed; v and W1 are the same for every client, so that names do not matter.
    """
    generator = torch_generator(seed, "hypernetwork", embedding, hidden)
    bias = torch.zeros(layers, sources)
    if sources > 1:
        bias[:, own] = math.log(self_weight / (1 - self_weight) * (sources - 1))
    return {
        "v": torch.randn(embedding, generator=generator),
        "w1": torch.randn(hidden, embedding, generator=generator) / math.sqrt(embedding),
        "b1": torch.zeros(hidden),
        "w2": torch.zeros(layers, sources, hidden),
        "b2": bias,
    }


def layer_weights(network: Network, known: Tensor, own: int) -> Tensor:
    """The mixing weights.

    Args:
        network: of the client.
        known: (S,) bool, sources that have uploaded something.
        own: the client's position. While others are missing, those that are known share what all
            of them would have, so the own layer's weight does not depend on how many there are.

    Returns:
        (L, S) float64, exactly 0 for who is not known; rows sum to 1.

    Raises:
        PlanError: nobody is known.
    """
    if not bool(known.any()):
        raise PlanError("layer-wise mixing needs at least one source; nobody has uploaded yet")
    return _alpha({name: value.double() for name, value in network.items()}, known, own)


def follow(
    network: Network, known: Tensor, own: int, agreement: Tensor, learning_rate: float
) -> dict[str, Tensor]:
    """One gradient step that raises the sum of ``alpha * agreement``.

    By the chain rule this is the step of pFedLA along <mix, change>: ``agreement[l, j]`` is the
    inner product of source j's layer l with the change that training made to the mixed layer.

    Args:
        network: of the client.
        known: (S,) bool, sources of that mix.
        own: the client's position.
        agreement: (L, S); ignored for who is not known.
        learning_rate: step size.

    Returns:
        The network after the step.

    Raises:
        PlanError: nobody is known, or a value is not finite.
    """
    scores = agreement.double().masked_fill(~known, 0.0)
    if not bool(known.any()) or not bool(scores.isfinite().all()):
        raise PlanError("layer-wise mixing cannot learn from nobody, or from values not finite")
    with torch.enable_grad():
        leaves = {n: value.detach().double().requires_grad_() for n, value in network.items()}
        gain = (_alpha(leaves, known, own) * scores).sum()
        gradients = torch.autograd.grad(gain, list(leaves.values()))
    return {
        name: (leaf.detach() + learning_rate * gradient).to(torch.float32)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def agreement(values: Tensor, change: Tensor, *, normalise: bool) -> Tensor:
    """Inner products of the sources' layers with the change of the mixed layer.

    Args:
        values: (S, L, D) the sources' layers, or projections of them.
        change: (L, D) what training added to the mixed layer.
        normalise: divide each layer by |change| times the mean |value| of that layer, so that a
            step does not depend on the size of the weights.

    Returns:
        (L, S) float64.
    """
    wide, moved = values.double(), change.double()
    scores: Tensor = torch.einsum("sld,ld->ls", wide, moved)
    if not normalise:
        return scores
    present = wide.norm(dim=2)
    mean = present.sum(dim=0) / (present > 0).sum(dim=0).clamp_min(1)
    sizes: Tensor = (moved.norm(dim=1) * mean).clamp_min(_NORM_FLOOR)
    return scores / sizes[:, None]


def _alpha(network: Network, known: Tensor, own: int) -> Tensor:
    hidden = torch.tanh(network["w1"] @ network["v"] + network["b1"])
    hidden = hidden / math.sqrt(len(hidden))
    logits = network["w2"] @ hidden + network["b2"]
    there = int(known.sum()) - int(known[own])
    if there:
        others = torch.arange(len(known)) != own
        logits = logits + others * math.log((len(known) - 1) / there)
    weights: Tensor = logits.masked_fill(~known, -torch.inf).softmax(dim=1)
    return weights
