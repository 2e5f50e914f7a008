"""Local training of one client by several ranks with DeepSpeed's ZeRO.

The ranks of a group run the same calls with the same samples; each computes its share of every
optimizer step. Loss, steps, learning rates and the adapter that comes out are those of
:class:`~fedml_plugin_fedmosaic.engine.torch.TorchEngine`, up to the order of float additions (and
other dropout masks). What crosses a call is plain data, so no optimizer state inside DeepSpeed can
outlive the weights that the server has sent: the released code reloads DeepSpeed's own optimizer
checkpoint, whose master weights then replace the received ones in the first step.

The only file that imports deepspeed.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml_plugin_fedmosaic.adapters.handle import check_state
from fedml_plugin_fedmosaic.config.sections import AdapterConfig, EvalConfig, OptimConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.rng import derive_seed
from fedml_plugin_fedmosaic.core.types import (
    AdapterKey,
    AdapterState,
    Moments,
    OptimizerState,
    View,
)
from fedml_plugin_fedmosaic.core.work import FitProgress, LocalResult, Pass, Probe, ProbeResult
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.engine.base import Score, ShouldStop, StepCallback
from fedml_plugin_fedmosaic.engine.deepspeed_shards import Shards, is_partitioned, write_weights
from fedml_plugin_fedmosaic.engine.deepspeed_world import (
    AllRanks,
    GroupWorld,
    nothing_to_broadcast,
    one_rank_only,
)
from fedml_plugin_fedmosaic.engine.losses import LOSSES
from fedml_plugin_fedmosaic.engine.mixers import ModelMixer
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.torch import TorchEngine

_SHM_OP = "deepspeed_shm_comm"


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, for one kind of device.

    Raises:
        ConfigError: it is not installed, or works on another kind of device in this process.
    """
    if device.type == "cpu":
        # DeepSpeed would take a GPU that it finds, whatever the run says.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"a model is sharded, but DeepSpeed cannot be imported: {error}",
            hint="pip install 'fedml-plugin-fedmosaic[deepspeed]'",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != device.type:
        raise ConfigError(
            f"DeepSpeed works on {found!r} in this process, but the run is on {device.type!r}",
            hint="set device_args.using_gpu accordingly, or the variable DS_ACCELERATOR",
        )
    return deepspeed


def open_deepspeed(group: GroupWorld) -> Any:
    """DeepSpeed inside the world of a rank group; it never looks for MPI itself."""
    deepspeed = import_deepspeed(group.device)
    if group.device.type == "cpu":
        # A C++ extension, compiled on first use for a minute, that gloo does not need.
        deepspeed.ops.__compatible_ops__[_SHM_OP] = False
    with group.environment():
        deepspeed.init_distributed(
            dist_backend=deepspeed.accelerator.get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
        )
    return deepspeed


class DeepSpeedEngine(TorchEngine):
    """Trains and evaluates one base model with one adapter structure on a rank group.

    All ranks of the group make every call together, with the same arguments, and get the same
    results.

    Args:
        bundle: frozen base model; under ZeRO stage 3 already sharded.
        adapter_config: where adapters sit and how large they are.
        adapter_name: adapter shelf member.
        optim: local training.
        evaluation: how answers are found.
        seed: of the adapters' initial values.
        alignment: aligned A and B by ``<block>/<module>/A|B``; see the adapter shelf.
        group: the ranks.
        config: complete DeepSpeed configuration; see ``engine.deepspeed_config``.

    Raises:
        AdapterError: the bundle is in use, or the adapter does not fit the model.
        ConfigError: DeepSpeed is not installed.
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
        *,
        group: GroupWorld,
        config: Mapping[str, Any],
    ) -> None:
        self._deepspeed = open_deepspeed(group)
        super().__init__(bundle, adapter_config, adapter_name, optim, evaluation, seed, alignment)
        self._group = group
        self._config = dict(config)
        self._stage = int(config["zero_optimization"]["stage"])
        self._engine: Any = None
        self._shards: Shards | None = None
        self._trained: frozenset[AdapterKey] = frozenset()
        self._given: AdapterState = {}

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
        """As :meth:`TorchEngine.fit`; each rank computes every ``size``-th sample of a step.

        The loss is the mean over the step's samples of each sample's mean token loss, however
        they are dealt; a rank without a sample takes part with weight 0. Dropout depends on
        ``seed``, step and rank. The ranks agree on ``should_stop``: one yes is enough.

        Raises:
            AdapterError: also if the pass is more than the task loss on one view.
        """
        del sets, tensors  # only other losses than the task's need them
        if not pass_.is_plain:
            raise one_rank_only(f"the losses of pass {pass_.name!r}")

        def agreed() -> bool:
            return self._group.sum([float(should_stop is not None and should_stop())])[0] > 0

        with self._active():
            return super().fit(
                pass_,
                adapter,
                batches,
                seed=seed,
                on_step=on_step,
                moments=moments,
                progress=progress,
                should_stop=None if should_stop is None else agreed,
            )

    def evaluate(
        self,
        adapter: AdapterState | None,
        view: View,
        samples: Sequence[Sample],
        task: TaskSpec,
        *,
        mixer: ModelMixer | None = None,
    ) -> Score:
        """As :meth:`TorchEngine.evaluate`; all ranks run the same batches and get one score."""
        if view is View.ENSEMBLE or mixer is not None:
            raise one_rank_only("a model that puts logits together")
        self._require_open()
        if self._engine is None:
            self._initialise()
        self._agree_on_data([samples], whole=False)
        with self._active():
            score = super().evaluate(adapter, view, samples, task)
        value = torch.tensor([score.value], dtype=torch.float64, device=self._group.device)
        return replace(score, value=float(self._group.lead(value)[0]))

    def close(self) -> None:
        """Takes the adapter out; the base model stays as it was loaded, sharded or not."""
        if not self._closed:
            self._destroy()
        super().close()

    # What TorchEngine.fit and evaluate are made of.

    def _load(self, adapter: AdapterState) -> None:
        self._require_open()
        if self._loaded is adapter:
            return
        check_state({key: value.shape for key, value in self._initial.items()}, adapter)
        write_weights(self.adapter.parameters(), adapter, self._group.rank)
        if self._shards is not None:
            self._shards.write_masters(self._trained_parameters(), adapter)
        self._loaded = adapter

    def _start(
        self,
        pass_: Pass,
        adapter: AdapterState,
        moments: OptimizerState | None,
        progress: FitProgress | None,
    ) -> Any:
        self._require_open()
        self.adapter.set_view(pass_.view)
        self.adapter.set_trainable(pass_.train)
        rates = [group["lr"] for group in self._optimizer(pass_).param_groups]
        if self._trainable() != self._trained:
            self._initialise()
        self._loaded = None
        self._given = adapter if progress is None else progress.adapter
        self._load(self._given)
        self._loaded = None
        if progress is not None:
            moments = progress.moments
        elif self._optim.moments == "reset":
            moments = None
        shards = self._ready()
        shards.reset()
        if moments:
            shards.write_moments(self._trained_parameters(), moments)
        zero = self._engine.optimizer
        for group, rate in zip(zero.param_groups, rates, strict=True):
            group["lr"] = rate
        self.adapter.model.train()
        return zero

    def _prefetch(self, batches: Sequence[Sequence[Sample]]) -> None:
        super()._prefetch(batches)
        self._agree_on_data([self._mine(batch) for batch in batches], whole=True)

    def _step_seed(self, seed: int, step: int) -> int:
        if self._group.size == 1:
            return super()._step_seed(seed, step)
        return derive_seed(seed, "step", step, "rank", self._group.rank)

    def _step(
        self, batch: Sequence[Sample], optimizer: torch.optim.Optimizer, loss_name: str
    ) -> tuple[Tensor, int]:
        del optimizer  # the engine's own
        loss_function, engine = LOSSES[loss_name], self._engine
        mine, size = self._mine(batch), self._group.size
        share = math.ceil(len(batch) / size)
        # Never more micro-batches than the configuration says: DeepSpeed sizes buffers by it.
        micro = max(
            int(self._config["train_micro_batch_size_per_gpu"]),
            math.ceil(share / int(self._config["gradient_accumulation_steps"])),
        )
        starts = range(0, share, micro)
        total = torch.zeros((), device=self._bundle.device)
        num_tokens = 0
        for start in starts:
            samples = mine[start : start + micro]
            # Gathering and reducing need every rank, also one that has run out of samples.
            inputs, positions, tokens = self._bundle.processor.encode_supervised(
                samples or batch[:1]
            )
            engine.set_gradient_accumulation_boundary(start == starts[-1])
            losses = loss_function(engine, inputs, positions)
            loss = losses.sum() / len(batch)
            # DeepSpeed averages over the ranks; here they each hold a part of one sum.
            engine.backward(loss * (size if samples else 0), scale_wrt_gas=False)
            if samples:
                total += loss.detach()
                num_tokens += tokens
                self._tally.losses(samples, losses)
                self._tally.passes(inputs, forwards=1, backwards=1)
        engine.step()
        loss_sum, token_sum = self._group.sum([float(total), float(num_tokens)])
        return torch.tensor(loss_sum, dtype=torch.float32), int(token_sum)

    def _collect(self) -> dict[AdapterKey, Tensor]:
        """Only trained tensors are gathered; the others are as they came."""
        trained = self._ready().read(self._trained_parameters())
        return {key: trained.get(key, self._given[key]) for key in sorted(self._given)}

    def _collect_moments(self, optimizer: torch.optim.Optimizer) -> dict[AdapterKey, Moments]:
        del optimizer  # the engine's own
        return self._ready().read_moments(self._trained_parameters())

    def probe(
        self,
        probe: Probe,
        adapter: AdapterState,
        sets: Mapping[str, AdapterState],
        samples: Sequence[Sample],
    ) -> ProbeResult:
        """Refuses: the sets of sharded models cannot be exchanged.

        Raises:
            AdapterError: always.
        """
        del adapter, sets, samples
        raise one_rank_only(f"probe {probe.name!r}")

    def _total(self, values: Sequence[float]) -> Sequence[float]:
        return self._group.sum(list(values))

    def _forward_model(self) -> Any:
        return AllRanks(self._engine, self._group) if self._stage == 3 else self.adapter.model

    # DeepSpeed's engine.

    def _ready(self) -> Shards:
        if self._shards is None:
            raise RuntimeError("DeepSpeed's engine is not initialised")
        return self._shards

    def _trainable(self) -> frozenset[AdapterKey]:
        parameters = self.adapter.parameters()
        return frozenset(key for key, value in parameters.items() if value.requires_grad)

    def _trained_parameters(self) -> dict[AdapterKey, nn.Parameter]:
        return {
            key: parameter
            for key, parameter in self.adapter.parameters().items()
            if key in self._trained
        }

    def _mine(self, batch: Sequence[Sample]) -> Sequence[Sample]:
        return batch[self._group.rank :: self._group.size]

    def _initialise(self) -> None:
        """Makes DeepSpeed's engine for the tensors that are trainable now."""
        self._destroy()
        rates = {"ab": self._optim.learning_rate, "pq": self._optim.pq_learning_rate}
        groups = [
            {"params": parameters, "lr": rates[name]}
            for name, parameters in self.adapter.param_groups().items()
            if parameters
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self._optim.weight_decay, fused=True)
        with self._active(), nothing_to_broadcast(self._deepspeed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._stage == 3:
                self._partition()
            self._engine, zero, _, _ = self._deepspeed.initialize(
                model=self.adapter.model,
                optimizer=optimizer,
                config=copy.deepcopy(self._config),
                dist_init_required=False,
            )
        self._trained = self._trainable()
        self._shards = Shards(zero, self._stage, self._group)
        if self._stage == 3:
            # An adapter's tensors sit in dictionaries that are never called, so that nothing
            # would gather them; the layer that uses them must name them.
            for module in self.adapter.model.modules():
                for child in module.children():
                    if isinstance(child, nn.ParameterDict):
                        for parameter in child.parameters(recurse=False):
                            self._deepspeed.zero.register_external_parameter(module, parameter)
        self._loaded = None

    def _destroy(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        self._engine, self._shards, self._trained = None, None, frozenset()

    def _partition(self) -> None:
        """Cuts what is not cut yet: the adapter, which was made after the base model."""
        whole: list[Any] = [p for p in self.adapter.model.parameters() if not is_partitioned(p)]
        if not whole:
            return
        scalars = [parameter for parameter in whole if parameter.ndim == 0]
        for parameter in scalars:  # DeepSpeed cannot broadcast a tensor without axes
            parameter.data = parameter.data.reshape(1)
        self._deepspeed.zero.Init(
            module=self.adapter.model, config_dict_or_path=copy.deepcopy(self._config)
        )
        for parameter in scalars:
            parameter.ds_shape = torch.Size([])

    @contextmanager
    def _active(self) -> Iterator[None]:
        """DeepSpeed's surroundings, while it works.

        Under stage 3 linears must not keep gathered weights until the backward pass. DeepSpeed
        puts its own function in torch's place for good; other models of this process (the proxy)
        must keep torch's.
        """
        wanted = self._config["zero_optimization"].get("memory_efficient_linear", True)
        before = functional.linear
        with self._group.environment():
            if self._stage == 3 and wanted:
                from deepspeed.runtime.zero.linear import zero3_linear_wrap

                functional.linear = zero3_linear_wrap
            try:
                yield
            finally:
                functional.linear = before

    def _agree_on_data(self, batches: Sequence[Sequence[Sample]], *, whole: bool) -> None:
        """Finds broken samples before any rank waits for another one.

        Raises:
            DataError: a rank cannot encode a sample; the same on every rank.
        """
        problem = ""
        processor = self._bundle.processor
        try:
            for batch in batches:
                for sample in batch:
                    if whole:
                        processor.encode_supervised([sample])
                    else:
                        processor.encode_prompt([sample])
        except DataError as error:
            problem = str(error)
        for rank, text in enumerate(self._group.texts(problem)):
            if text:
                raise DataError(f"rank {rank} of the group: {text}")


__all__ = ["DeepSpeedEngine", "import_deepspeed", "is_partitioned", "open_deepspeed"]
