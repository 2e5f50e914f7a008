"""What a client can be asked to do with its model: train passes and probes, as plain data.

A client half returns such work; the runtime carries it out. Everything here is frozen and made of
plain values, so that unfinished work is part of a checkpoint.

A client's model is its adapter with *named sets* laid over it. A set is a part of an adapter state
(say, all tensors of the global branch) that the client keeps under a name in ``ClientState.sets``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from torch import Tensor

from fedml_plugin_fedmosaic.core.types import AdapterState, Branch, OptimizerState, View


class Samples(StrEnum):
    """Which of a client's samples a piece of work uses."""

    ROUND = "round"  # the batches of this round, drawn once per round
    REPLAY = "replay"  # drawn anew from everything that has arrived; ``salt`` varies the draw
    HELD_OUT = "held_out"  # kept away from training; the strategy declares ``needs_held_out``
    PUBLIC = "public"  # the run's public samples; the strategy declares ``needs_public``


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """One of the models that a client's tensors can form.

    Attributes:
        overlay: names of sets that are laid over the adapter, later ones over earlier ones.
        view: branches of the forward pass.
    """

    overlay: tuple[str, ...] = ()
    view: View = View.LOCAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Proximal:
    """``weight * sum of ||theta_branch - anchor||^2``, once per optimizer step.

    Attributes:
        weight: lambda, not halved.
        branch: the trained branch that is pulled.
        anchor: name of the set that it is pulled to.
        anchor_branch: branch of the anchor's tensors.
    """

    weight: float
    anchor: str
    branch: Branch = Branch.LOCAL
    anchor_branch: Branch = Branch.GLOBAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """``weight * divergence(teacher || student)`` on the supervised positions.

    The teacher's logits are the mean over ``teachers``, without gradients; or, for samples whose
    logits were received, the tensors ``<targets>/<sample key>`` of ``ClientState.tensors``
    (``data.base.Sample.key``).

    Attributes:
        weight: factor of the term; holds T^2 where an algorithm has it.
        temperature: T, on both sides.
        teachers: models whose logits are averaged.
        targets: prefix of received logits, float32 ``(supervised tokens, vocabulary)`` per sample.
        vocabularies: sample key -> digest of the vocabulary in which its received logits are; not
            for those in the client's own. The engine translates them
            (:mod:`equations.translation`); positions where they say nothing are left out.
        top_k: most probable tokens per position that are translated.
        kind: ``kl``: KL(softmax(teacher/T) || softmax(student/T)); ``soft_ce``: cross entropy
            against softmax(teacher/T).
        tasks: the term is for samples of these tasks only; for all when empty.
    """

    weight: float
    temperature: float = 1.0
    teachers: tuple[ModelRef, ...] = ()
    targets: str = ""
    vocabularies: Mapping[str, str] = field(default_factory=dict)
    top_k: int = 128
    kind: Literal["kl", "soft_ce"] = "kl"
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss with the branches that it trains.

    Attributes:
        view: branches of the student's forward pass. ``ensemble`` adds the logits of the local and
            the global model.
        train: branches that receive its gradients.
        overlay: sets under the student, not trained by this objective.
        task_weight: factor of the task loss; 0 leaves it out.
        proximal: further terms on the weights.
        distil: further terms on the logits.
    """

    view: View
    train: frozenset[Branch]
    overlay: tuple[str, ...] = ()
    task_weight: float = 1.0
    proximal: tuple[Proximal, ...] = ()
    distil: tuple[Distillation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One local training pass.

    Attributes:
        name: shown in logs and metrics; unique in a round, because it seeds dropout.
        view: branches used in the forward pass.
        train: branches that receive gradients (SHARED means the gate; A, B of PQ layers never).
        num_steps: optimizer steps.
        lr_scale: factor on the configured learning rates (round schedule).
        loss: name of the loss plug-in.
        task_weight: factor of the task loss; 0 leaves it out.
        proximal: further terms on the weights.
        distil: further terms on the logits.
        overlay: sets laid over the adapter before training.
        into: the set that takes the trained tensors; empty: the adapter itself.
        also: further objectives, computed on every micro-batch before the one optimizer step that
            serves all: passes that alternate. Their trained branches must differ from the pass's.
        route: task -> name of a set of LOCAL tensors. Samples of that task run with, and train,
            that set; samples of other tasks run with the adapter's own local branch.
        samples: which samples.
        salt: varies the draw of ``Samples.REPLAY``.
        first_step: batches of the round that are skipped (``Samples.ROUND``).
    """

    name: str
    view: View
    train: frozenset[Branch]
    num_steps: int
    lr_scale: float = 1.0
    loss: str = "cross_entropy"
    task_weight: float = 1.0
    proximal: tuple[Proximal, ...] = ()
    distil: tuple[Distillation, ...] = ()
    overlay: tuple[str, ...] = ()
    into: str = ""
    also: tuple[Objective, ...] = ()
    route: Mapping[str, str] = field(default_factory=dict)
    samples: Samples = Samples.ROUND
    salt: str = ""
    first_step: int = 0

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The pass's own objective, then the further ones."""
        own = Objective(
            view=self.view,
            train=self.train,
            task_weight=self.task_weight,
            proximal=self.proximal,
            distil=self.distil,
        )
        return (own, *self.also)

    @property
    def set_names(self) -> frozenset[str]:
        """The sets that it needs, beside those laid over the adapter before it begins."""
        names = set(self.route.values())
        for item in self.objectives:
            names.update(item.overlay, (term.anchor for term in item.proximal))
            for term in item.distil:
                names.update(name for teacher in term.teachers for name in teacher.overlay)
        return frozenset(names)

    @property
    def is_plain(self) -> bool:
        """Whether it is task loss on one view and nothing else, which every engine can train."""
        return (
            self.task_weight == 1.0
            and self.view is not View.ENSEMBLE
            and not (self.proximal or self.distil or self.also or self.route)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Looks at models without training.

    Attributes:
        name: unique among the pieces of work of one turn.
        models: label -> model to look at.
        samples: which samples.
        limit: at most so many samples; all when omitted. With ``ROUND`` and ``REPLAY`` the first
            different ones of the draw.
        salt: varies the draw of ``Samples.REPLAY``.
        what: ``loss``: mean task loss per task. ``logits``, ``hidden``: also the logits, or the
            last hidden states, at the supervised positions of every sample.
        tasks: label -> the only tasks whose samples the model is shown; all for other labels.
    """

    name: str
    models: Mapping[str, ModelRef]
    samples: Samples = Samples.ROUND
    limit: int | None = None
    salt: str = ""
    what: Literal["loss", "logits", "hidden"] = "loss"
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def set_names(self) -> frozenset[str]:
        """The sets that its models need."""
        return frozenset(name for model in self.models.values() for name in model.overlay)


Work = Pass | Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalResult:
    """What one pass produced.

    Attributes:
        adapter: all adapter tensors after the pass (the overlay included), float32 on the CPU.
        losses: loss of each optimizer step.
        num_examples: samples seen (repetitions counted).
        num_tokens: supervised tokens seen.
        duration_s: wall-clock seconds.
        moments: of the trained tensors after the pass; empty unless ``optim.moments`` is "keep".
        sets: the sets that ``Pass.route`` trained.
        task_losses: task -> mean unweighted task loss of the pass's own objective over its samples.
        flops: floating-point operations of all forward and backward passes, estimated as
            2 and 4 per parameter and token.
    """

    adapter: AdapterState
    losses: tuple[float, ...]
    num_examples: int
    num_tokens: int
    duration_s: float
    moments: OptimizerState = field(default_factory=dict)
    sets: Mapping[str, AdapterState] = field(default_factory=dict)
    task_losses: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a probe saw.

    Attributes:
        losses: label -> task -> mean over the task's samples of each sample's mean token loss.
        counts: task -> samples.
        tensors: ``<label>/<sample key>`` -> float32 ``(supervised tokens, vocabulary or width)`` on
            the CPU, for ``logits`` and ``hidden``.
        labels: sample key -> ids of the supervised tokens, for ``logits`` and ``hidden``.
        flops: as for a pass.
    """

    losses: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    flops: float = 0.0


Result = LocalResult | ProbeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProgress:
    """A pass that was stopped between two optimizer steps; enough to go on bit for bit.

    Attributes:
        adapter: all adapter tensors, float32 on the CPU.
        moments: of the trained tensors, whatever ``optim.moments`` says.
        losses: loss of each finished step; their number is the number of finished steps.
        num_tokens: supervised tokens seen so far.
        duration_s: wall-clock seconds spent so far.
        sets: the sets that ``Pass.route`` trains.
        set_moments: their moments.
        task_sums: task -> (sum of the samples' losses, samples).
        flops: so far.
    """

    adapter: AdapterState
    moments: OptimizerState
    losses: tuple[float, ...]
    num_tokens: int
    duration_s: float
    sets: Mapping[str, AdapterState] = field(default_factory=dict)
    set_moments: Mapping[str, OptimizerState] = field(default_factory=dict)
    task_sums: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model that a client answers a task with.

    Attributes:
        model: sets and view.
        mixer: member of the mixer shelf that changes the logits; none when empty.
        tensors: what the mixer needs, e.g. a store of hidden states.
        options: numbers for the mixer.
    """

    model: ModelRef
    mixer: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)
