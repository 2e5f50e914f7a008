"""Local training and evaluation in one process with PyTorch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.config.sections import AdapterConfig, EvalConfig, OptimConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.registry import ADAPTERS
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    AdapterState,
    Branch,
    Moments,
    OptimizerState,
    View,
)
from fedml_plugin_fedmosaic.core.work import (
    FitProgress,
    LocalResult,
    Pass,
)
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.base import FitStopped, ShouldStop, StepCallback
from fedml_plugin_fedmosaic.engine.digests import layout_digests
from fedml_plugin_fedmosaic.engine.looking import LookingEngine
from fedml_plugin_fedmosaic.engine.losses import LOSSES
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.moments import collect_moments, load_moments
from fedml_plugin_fedmosaic.engine.objectives import ObjectiveStep, leaf_groups
from fedml_plugin_fedmosaic.engine.sets import AdapterSets
from fedml_plugin_fedmosaic.engine.stepping import (
    NonFiniteLossError,
    own_generator,
    raise_unless_finite,
    rate_factor,
)
from fedml_plugin_fedmosaic.engine.tally import Tally, means
from fedml_plugin_fedmosaic.engine.translator import Translator


@dataclass(frozen=True, slots=True)
class _Steps:
    """Losses (on the device) and supervised tokens of the steps of one call."""

    losses: list[Tensor]
    num_tokens: int
    stopped: bool


class TorchEngine(LookingEngine):
    """Trains and evaluates one base model with one adapter structure.

    The adapter is put into the bundle's model and stays there until :meth:`close`; a bundle has
    room for one engine at a time.

    Args:
        bundle: frozen base model; must be plain.
        adapter_config: where adapters sit and how large they are.
        adapter_name: adapter shelf member.
        optim: local training.
        evaluation: how answers are found.
        seed: of the adapters' initial values.
        alignment: aligned A and B by ``<block>/<module>/A|B``; see the adapter shelf.

    Attributes:
        info: the base model.
        adapter: handle on the injected adapter.
        translator: for logits that were received in other vocabularies.

    Raises:
        AdapterError: the bundle is in use, or the adapter does not fit the model.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        adapter_config: AdapterConfig,
        adapter_name: str,
        optim: OptimConfig,
        evaluation: EvalConfig,
        seed: int,
        alignment: Mapping[str, Tensor] | None = None,
    ) -> None:
        if bundle.adapter is not None:
            raise AdapterError(
                f"model {bundle.info.name!r} already carries an adapter",
                hint="close() the other engine first; adapters take turns on a base model",
            )
        self.info = bundle.info
        inject = ADAPTERS[adapter_name]
        with warnings.catch_warnings():
            # PEFT 0.21 asks newer transformers for gradient checkpointing by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.adapter: InjectedAdapter = inject(
                bundle.model, adapter_config, bundle.num_layers, seed=seed, alignment=alignment
            )
        bundle.adapter = self.adapter
        self._bundle = bundle
        self._optim = optim
        self._evaluation = evaluation
        self._has_input_gate = adapter_config.gate == "input"
        self._initial = self.adapter.collect()
        self._loaded: AdapterState | None = None
        self._closed = False
        self._tally = Tally(0, ())
        self._sets = AdapterSets(self.adapter.parameters(), {})
        self._tensors: Mapping[str, Tensor] = {}
        self.translator = Translator(bundle.processor, bundle.vocabulary_size)

    def initial_adapter(self) -> AdapterState:
        """Freshly initialised adapter tensors (copies); the same for every client."""
        return {key: tensor.clone() for key, tensor in self._initial.items()}

    def layouts(self) -> Mapping[str, str]:
        """Channel -> digest of share keys and shapes of the local branch.

        The digest of layer-wise (``conv``) tensors also covers the signature: they only mean
        something inside one shape class.
        """
        return layout_digests(self._initial, self.info.signature)

    def fit(
        self,
        pass_: Pass,
        adapter: AdapterState,
        batches: Sequence[Sequence[Sample]],
        *,
        seed: int,
        on_step: StepCallback | None = None,
        moments: OptimizerState | None = None,
        progress: FitProgress | None = None,
        should_stop: ShouldStop | None = None,
        sets: Mapping[str, AdapterState] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> LocalResult:
        """Trains one optimizer step per item of ``batches``, at most ``pass_.num_steps``.

        The optimizer is a new AdamW in every call. With ``optim.moments: reset`` its moments are
        fresh; with ``keep`` it starts from ``moments``. Weights always come from ``adapter``: no
        copy of theirs can outlive what the server has replaced in the meantime. A batch is
        cut into micro-batches of the configured size; its loss is the mean over its samples of
        each sample's mean token loss, however it is cut. Dropout depends on ``seed`` and the step
        only; the global generators are left as they were.

        Args:
            pass_: view, trained branches, steps, learning-rate factor and loss.
            adapter: where to start.
            batches: samples of each optimizer step, none empty.
            seed: of the randomness in the model (dropout, gate noise).
            on_step: called after each step.
            moments: of the client's last round; ignored with ``optim.moments: reset``.
            progress: where an earlier call with the same arguments was stopped; the result is
                then bit for bit that of a call that was not.
            should_stop: asked after each step but the last.
            sets: the client's adapter sets that the pass names, but not those it lays over the
                adapter: they are in ``adapter`` already.
            tensors: received logits that the pass names.

        Returns:
            The trained adapter; without batches the adapter as it came.

        Raises:
            AdapterError: tensors do not fit, or the pass trains nothing.
            DataError: a sample cannot be encoded.
            FitStopped: ``should_stop`` said so.
            NonFiniteLossError: the loss is infinite or not a number.
        """
        started = time.perf_counter()
        batches = batches[: pass_.num_steps]
        self._tally = Tally(
            self.info.num_parameters,
            (sample.task for batch in batches for sample in batch),
            before=None if progress is None else progress.task_sums,
            flops=0.0 if progress is None else progress.flops,
        )
        self._sets = AdapterSets(
            self.adapter.parameters(),
            {**(sets or {}), **({} if progress is None else progress.sets)},
            tuple(pass_.route.values()),
        )
        self._tensors = tensors or {}
        optimizer = self._start(pass_, adapter, moments, progress)
        done = 0 if progress is None else len(progress.losses)
        self._prefetch(batches[done:])
        run = self._steps(
            pass_, batches, optimizer, done, seed=seed, on_step=on_step, should_stop=should_stop
        )
        return self._outcome(run, batches, optimizer, progress, started)

    def _outcome(
        self,
        run: _Steps,
        batches: Sequence[Sequence[Sample]],
        optimizer: torch.optim.Optimizer,
        progress: FitProgress | None,
        started: float,
    ) -> LocalResult:
        """What the steps of this call and of earlier ones have given.

        Raises:
            FitStopped: the pass is not over.
            NonFiniteLossError: a loss is infinite or not a number.
        """
        done = 0 if progress is None else len(progress.losses)
        optimizer.zero_grad(set_to_none=True)
        self.adapter.model.eval()
        values = torch.stack(run.losses).tolist() if run.losses else []
        for step, value in enumerate(values, start=done):
            raise_unless_finite(self.info.name, value, step, len(batches))
        duration_s = time.perf_counter() - started
        num_tokens = run.num_tokens
        if progress is not None:
            values = [*progress.losses, *values]
            num_tokens += progress.num_tokens
            duration_s += progress.duration_s
        kept = run.stopped or self._optim.moments == "keep"
        after = self._collect_moments(optimizer) if kept else {}
        outcome: dict[str, Any] = {
            "adapter": self._collect(),
            "moments": after,
            "losses": tuple(values),
            "num_tokens": num_tokens,
            "duration_s": duration_s,
            "sets": self._sets.collect(),
            "flops": self._tally.flops(self._total),
        }
        sums = self._tally.sums(self._total)
        if run.stopped:
            kept_by_set = {
                name: collect_moments(optimizer, leaves)
                for name, leaves in self._sets.leaves.items()
            }
            raise FitStopped(FitProgress(task_sums=sums, set_moments=kept_by_set, **outcome))
        num_examples = sum(len(batch) for batch in batches)
        return LocalResult(num_examples=num_examples, task_losses=means(sums), **outcome)

    def _steps(
        self,
        pass_: Pass,
        batches: Sequence[Sequence[Sample]],
        optimizer: torch.optim.Optimizer,
        done: int,
        *,
        seed: int,
        on_step: StepCallback | None,
        should_stop: ShouldStop | None,
    ) -> _Steps:
        """Trains the batches from number ``done`` on."""
        losses: list[Tensor] = []
        num_tokens = 0
        peak = [group["lr"] for group in optimizer.param_groups]
        one_step = self._stepper(pass_, optimizer)
        with own_generator(self._bundle.device) as reseed:
            for step, batch in enumerate(batches[done:], start=done):
                reseed(self._step_seed(seed, step))
                for group, rate in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = rate * rate_factor(self._optim.schedule, step, len(batches))
                loss, tokens = one_step(batch)
                self._check_finite(loss, step, len(batches))
                losses.append(loss)
                num_tokens += tokens
                if on_step is not None:
                    on_step(step + 1, len(batches))
                if should_stop is not None and step + 1 < len(batches) and should_stop():
                    return _Steps(losses, num_tokens, stopped=True)
        return _Steps(losses, num_tokens, stopped=False)

    def _start(
        self,
        pass_: Pass,
        adapter: AdapterState,
        moments: OptimizerState | None,
        progress: FitProgress | None,
    ) -> torch.optim.Optimizer:
        """Puts weights, trained branches and moments in place; returns the optimizer."""
        self._load(adapter if progress is None else progress.adapter)
        self._loaded = None
        if pass_.view is not View.ENSEMBLE:
            self.adapter.set_view(pass_.view)
        trained = frozenset[Branch]().union(*(item.train for item in pass_.objectives))
        self.adapter.set_trainable(trained)
        optimizer = self._optimizer(pass_)
        if progress is not None:
            moments = progress.moments
        elif self._optim.moments == "reset":
            moments = None
        if moments:
            load_moments(optimizer, self.adapter.parameters(), moments)
        if progress is not None:
            for name, leaves in self._sets.leaves.items():
                load_moments(optimizer, leaves, progress.set_moments.get(name, {}))
        self.adapter.model.train()
        return optimizer

    def close(self) -> None:
        """Takes the adapter out; the base model is as it was before. May be called twice."""
        if self._closed:
            return
        self._closed = True
        peft_model: Any = self.adapter.model
        peft_model.unload()
        self._bundle.adapter = None
        self._bundle.model.requires_grad_(False)
        self._bundle.model.eval()
        self._loaded = None

    # An engine of several ranks does these in its own way.

    def _prefetch(self, batches: Sequence[Sequence[Sample]]) -> None:
        self._bundle.processor.prefetch(sample for batch in batches for sample in batch)

    def _step_seed(self, seed: int, step: int) -> int:
        return derive_seed(seed, "step", step)

    def _collect(self) -> dict[AdapterKey, Tensor]:
        return self.adapter.collect()

    def _collect_moments(self, optimizer: torch.optim.Optimizer) -> dict[AdapterKey, Moments]:
        return collect_moments(optimizer, self.adapter.parameters())

    def _forward_model(self) -> Any:
        return self.adapter.model

    def _total(self, values: Sequence[float]) -> Sequence[float]:
        """Sums over the ranks that train together."""
        return values

    def _stepper(
        self, pass_: Pass, optimizer: torch.optim.Optimizer
    ) -> Callable[[Sequence[Sample]], tuple[Tensor, int]]:
        """One optimizer step of the pass, as a function of its batch."""
        if pass_.is_plain:
            return lambda batch: self._step(batch, optimizer, pass_.loss)
        work = ObjectiveStep(
            pass_,
            self.adapter,
            self._sets,
            self._tensors,
            self.translator,
            self._bundle.processor,
            self._optim.batch_size,
            self._tally,
        )

        def step(batch: Sequence[Sample]) -> tuple[Tensor, int]:
            optimizer.zero_grad(set_to_none=True)
            loss, tokens = work.backward(batch)
            self._apply(optimizer)
            return loss, tokens

        return step

    def _require_open(self) -> None:
        if self._closed:
            raise AdapterError(
                f"the engine of model {self.info.name!r} is closed", hint="make a new engine"
            )

    def _load(self, adapter: AdapterState) -> None:
        self._require_open()
        # Evaluation scores the same client on many tasks in a row.
        if self._loaded is not adapter:
            self.adapter.load(adapter)
            self._loaded = adapter

    def _optimizer(self, pass_: Pass) -> torch.optim.Optimizer:
        rates = {"ab": self._optim.learning_rate, "pq": self._optim.pq_learning_rate}
        groups = [
            {"params": parameters, "lr": rates[name] * pass_.lr_scale}
            for name, parameters in leaf_groups(self._sets, self.adapter.param_groups()).items()
            if parameters
        ]
        if not groups:
            trained = ", ".join(sorted(pass_.train)) or "none"
            raise AdapterError(
                f"pass {pass_.name!r} of model {self.info.name!r} trains nothing: "
                f"branches {trained} have no parameters in this adapter"
            )
        # Adapters are hundreds of small tensors: one fused kernel instead of a dozen per tensor.
        return torch.optim.AdamW(groups, weight_decay=self._optim.weight_decay, fused=True)

    def _step(
        self, batch: Sequence[Sample], optimizer: torch.optim.Optimizer, loss_name: str
    ) -> tuple[Tensor, int]:
        """One optimizer step; its loss stays on the device."""
        loss_function = LOSSES[loss_name]
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._bundle.device)
        num_tokens = 0
        size = self._optim.batch_size
        for start in range(0, len(batch), size):
            inputs, positions, tokens = self._bundle.processor.encode_supervised(
                batch[start : start + size]
            )
            losses = loss_function(self.adapter.model, inputs, positions)
            loss = losses.sum() / len(batch)
            loss.backward()
            total += loss.detach()
            num_tokens += tokens
            self._tally.losses(batch[start : start + size], losses)
            self._tally.passes(inputs, forwards=1, backwards=1)
        self._apply(optimizer)
        return total, num_tokens

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer step with the gradients that are there."""
        if self._optim.max_grad_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self._optim.max_grad_norm)
        optimizer.step()

    def _check_finite(self, loss: Tensor, step: int, num_steps: int) -> None:
        # Reading the value on an accelerator would wait for it; there it is read at the end.
        if loss.device.type == "cpu":
            raise_unless_finite(self.info.name, float(loss), step, num_steps)


__all__ = ["NonFiniteLossError", "TorchEngine"]
