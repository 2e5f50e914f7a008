"""One optimizer step of a pass with more than the task loss on one view.

Every micro-batch runs the pass's objectives one after the other; their gradients add up in
different branches, and one optimizer step serves them all. A teacher's logits are computed before
the student's graph is built, without dropout; logits of a model that was a student of the same
micro-batch are used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, View
from fedml_plugin_fedmosaic.core.work import Distillation, ModelRef, Objective, Pass, Proximal
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.losses import LOSSES, supervised, supervised_logits
from fedml_plugin_fedmosaic.engine.processor import Batch, Processor
from fedml_plugin_fedmosaic.engine.sets import AdapterSets
from fedml_plugin_fedmosaic.engine.tally import Tally
from fedml_plugin_fedmosaic.engine.translator import Translator
from fedml_plugin_fedmosaic.equations.distillation import divergence

_BOTH = (View.LOCAL, View.GLOBAL)

Seen = dict[tuple[tuple[str, ...], View], Tensor]
"""Logits of the models that this micro-batch has run, detached."""


def view_logits(adapter: InjectedAdapter, view: View, inputs: Batch, positions: Tensor) -> Tensor:
    """Logits of a view; the ensemble's are the sum of the local and the global model's.

    Returns:
        float32 ``(n, k, vocabulary)``.
    """
    total: Tensor | None = None
    for one in _BOTH if view is View.ENSEMBLE else (view,):
        adapter.set_view(one)
        logits = supervised_logits(adapter.model, inputs, positions)
        total = logits if total is None else total + logits
    if total is None:
        raise RuntimeError("a view without models")
    return total


def num_models(view: View) -> int:
    """Forward passes that a view takes."""
    return 2 if view is View.ENSEMBLE else 1


class ObjectiveStep:
    """Computes the gradients of a pass's objectives.

    Args:
        pass_: with its objectives.
        adapter: in the model.
        sets: of the client, on the device.
        tensors: received logits by ``<prefix>/<sample key>``.
        translator: for received logits in other vocabularies.
        processor: of the model.
        batch_size: samples per micro-batch.
        tally: takes costs and the tasks' losses.

    Raises:
        AdapterError: two objectives train the same branch, or gradients cannot be computed so.
    """

    def __init__(
        self,
        pass_: Pass,
        adapter: InjectedAdapter,
        sets: AdapterSets,
        tensors: Mapping[str, Tensor],
        translator: Translator,
        processor: Processor,
        batch_size: int,
        tally: Tally,
    ) -> None:
        self._pass = pass_
        self._adapter = adapter
        self._sets = sets
        self._tensors = tensors
        self._translator = translator
        self._processor = processor
        self._batch_size = batch_size
        self._tally = tally
        branches = [branch for item in pass_.objectives for branch in item.train]
        if len(set(branches)) != len(branches):
            raise AdapterError(f"pass {pass_.name!r}: two objectives train the same branch")
        views = {item.view for item in pass_.objectives}
        model: Any = adapter.model
        recomputed = any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        )
        self._has_dropout = any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
        )
        if View.ENSEMBLE in views and recomputed:
            raise AdapterError(
                f"pass {pass_.name!r} runs two models whose activations cannot be recomputed",
                hint="set engine_args.gradient_checkpointing: false for this strategy",
            )

    @property
    def trained(self) -> frozenset[Branch]:
        """All branches that receive gradients."""
        return frozenset().union(*(item.train for item in self._pass.objectives))

    def backward(self, batch: Sequence[Sample]) -> tuple[Tensor, int]:
        """Adds the gradients of one step.

        Returns:
            The step's loss (on the device) and its supervised tokens.
        """
        total: Tensor | None = None
        num_tokens = 0
        for name, samples in self._parts(batch):
            inputs, positions, tokens = self._processor.encode_supervised(samples)
            seen: Seen = {}
            with self._sets.routed(name):
                for index, item in enumerate(self._pass.objectives):
                    terms = [t for t in item.distil if not t.tasks or samples[0].task in t.tasks]
                    # A teacher's sets are laid over the pass's model, not over the student's.
                    teachers = [
                        (term, self._teacher(term, samples, inputs, positions, seen))
                        for term in terms
                    ]
                    with self._sets.laid(item.overlay):
                        loss, task = self._objective(item, teachers, inputs, positions, seen)
                        loss = loss / len(batch)
                        loss.backward()  # type: ignore[no-untyped-call]
                    if index == 0:
                        self._tally.losses(samples, task)
                    total = loss.detach() if total is None else total + loss.detach()
            num_tokens += tokens
        if total is None:
            raise AdapterError(f"pass {self._pass.name!r}: an optimizer step without samples")
        for item in self._pass.objectives:
            for term in item.proximal:
                total = total + self._pull(term)
        self._adapter.set_trainable(self.trained)
        return total, num_tokens

    def _parts(self, batch: Sequence[Sample]) -> Iterator[tuple[str | None, Sequence[Sample]]]:
        """Micro-batches; samples of one part go to the same set and have the same terms."""
        terms = [term for item in self._pass.objectives for term in item.distil if term.tasks]
        parts: dict[tuple[str | None, tuple[bool, ...]], list[Sample]] = {}
        for sample in batch:
            has = tuple(sample.task in term.tasks for term in terms)
            parts.setdefault((self._pass.route.get(sample.task), has), []).append(sample)
        for (name, _), samples in parts.items():
            for start in range(0, len(samples), self._batch_size):
                yield name, samples[start : start + self._batch_size]

    def _objective(
        self,
        item: Objective,
        teachers: Sequence[tuple[Distillation, SimpleNamespace]],
        inputs: Batch,
        positions: Tensor,
        seen: Seen,
    ) -> tuple[Tensor, Tensor]:
        """Sum over the samples of their losses, and their task losses."""
        self._adapter.set_trainable(item.train)
        logits = view_logits(self._adapter, item.view, inputs, positions)
        seen[item.overlay, item.view] = logits.detach()
        models = num_models(item.view)
        self._tally.passes(inputs, forwards=models, backwards=models)
        task = LOSSES[self._pass.loss](_Computed(logits), inputs, positions)
        total: Tensor = (item.task_weight * task).sum()
        mask = supervised(inputs, positions)
        for term, teacher in teachers:
            known = mask if teacher.mask is None else mask & teacher.mask
            gaps = divergence(logits, teacher.logits, term.temperature, term.kind)
            # Each sample is the mean over its own tokens, as the task loss is.
            shares = gaps.masked_fill(~known, 0.0).sum(1) / mask.sum(1)
            total = total + term.weight * shares.sum()
        return total, task

    def _teacher(
        self,
        term: Distillation,
        samples: Sequence[Sample],
        inputs: Batch,
        positions: Tensor,
        seen: Seen,
    ) -> SimpleNamespace:
        """Logits, and the positions where they are known (None: everywhere)."""
        if term.targets:
            return self._received(term, samples, supervised(inputs, positions))
        if not term.teachers:
            raise AdapterError(
                f"pass {self._pass.name!r}: a distillation term has neither teachers nor targets"
            )
        mean: Tensor | None = None
        for teacher in term.teachers:
            logits = self._run(teacher, inputs, positions, seen)
            mean = logits if mean is None else mean + logits
        if mean is None:
            raise RuntimeError("no teacher")
        return SimpleNamespace(logits=mean / len(term.teachers), mask=None)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """A teacher answers without dropout."""
        model: Any = self._adapter.model
        if not self._has_dropout:
            yield
            return
        model.eval()
        try:
            yield
        finally:
            model.train()

    def _run(self, teacher: ModelRef, inputs: Batch, positions: Tensor, seen: Seen) -> Tensor:
        key = (teacher.overlay, teacher.view)
        if key not in seen:
            with torch.no_grad(), self._quiet(), self._sets.laid(teacher.overlay):
                seen[key] = view_logits(self._adapter, teacher.view, inputs, positions)
            self._tally.passes(inputs, forwards=num_models(teacher.view))
        return seen[key]

    def _answer(self, term: Distillation, sample: Sample) -> Tensor | None:
        """Received logits of a sample in the model's own vocabulary."""
        value = self._tensors.get(f"{term.targets}/{sample.key}")
        vocabulary = term.vocabularies.get(sample.key)
        if value is None or vocabulary is None:
            return value
        return self._translator(value, vocabulary, sample, term.top_k)

    def _received(
        self, term: Distillation, samples: Sequence[Sample], mask: Tensor
    ) -> SimpleNamespace:
        """Received logits in the places of the batch's supervised positions."""
        prefix = term.targets
        found = [self._answer(term, sample) for sample in samples]
        width = next((int(value.shape[1]) for value in found if value is not None), None)
        if width is None:
            raise AdapterError(
                f"pass {self._pass.name!r}: no logits {prefix}/{samples[0].key} were received",
                hint="only samples with received logits can be distilled",
            )
        logits = torch.zeros(*mask.shape, width, device=mask.device)
        known = torch.zeros_like(mask)
        for row, value in enumerate(found):
            if value is None:
                continue
            if len(value) != int(mask[row].sum()):
                raise AdapterError(
                    f"received logits {prefix}/{samples[row].key} are for {len(value)} "
                    f"tokens; this model supervises {int(mask[row].sum())} there",
                    hint="only clients with the same tokenizer and prompt can exchange logits",
                )
            logits[row, mask[row]] = value.to(logits)
            known[row] = mask[row]
            if samples[row].key in term.vocabularies:
                silent = logits[row].isneginf().all(1)
                logits[row, silent] = 0.0
                known[row] &= ~silent
        return SimpleNamespace(logits=logits, mask=known)

    def _pull(self, term: Proximal) -> Tensor:
        """Adds the gradient of a proximal term; returns its value."""
        anchor = self._sets.tensors(term.anchor)
        value: Tensor | None = None
        for key, parameter in self._adapter.parameters().items():
            if key.branch is not term.branch:
                continue
            gap = parameter.detach() - _anchored(anchor, key, term)
            square = term.weight * gap.square().sum()
            value = square if value is None else value + square
            slope = 2.0 * term.weight * gap
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope
        if value is None:
            raise AdapterError(f"pass {self._pass.name!r}: no tensor of branch {term.branch}")
        return value


def _anchored(anchor: Mapping[AdapterKey, Tensor], key: AdapterKey, term: Proximal) -> Tensor:
    twin = AdapterKey(key.block, key.layer, key.module, term.anchor_branch, key.part)
    if twin not in anchor:
        raise AdapterError(f"adapter set {term.anchor!r} has no tensor {twin} to pull {key} to")
    return anchor[twin]


class _Computed:
    """Stands for a model whose logits are known already."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits)


def leaf_groups(
    sets: AdapterSets, groups: Mapping[str, list[nn.Parameter]]
) -> dict[str, list[nn.Parameter]]:
    """Parameter groups of the adapter with those of the routed sets."""
    merged = {name: list(parameters) for name, parameters in groups.items()}
    for leaves in sets.leaves.values():
        for key in sorted(leaves):
            merged["ab" if key.part in ("A", "B") else "pq"].append(leaves[key])
    return merged
