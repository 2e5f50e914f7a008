"""Which engine trains a model: PyTorch in this process, or DeepSpeed on a rank group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EngineConfig,
    EvalConfig,
    OptimConfig,
)
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.torch import TorchEngine


def make_engine(
    bundle: ModelBundle,
    adapter_config: AdapterConfig,
    adapter_name: str,
    optim: OptimConfig,
    evaluation: EvalConfig,
    engine: EngineConfig,
    *,
    seed: int,
    alignment: Mapping[str, Tensor] | None = None,
) -> TorchEngine:
    """Puts an adapter into a base model and trains it as the bundle was loaded.

    Args:
        bundle: frozen base model; its ``sharding`` decides.
        adapter_config: where adapters sit and how large they are.
        adapter_name: adapter shelf member.
        optim: local training.
        evaluation: how answers are found.
        engine: gradient checkpointing.
        seed: of the adapters' initial values.
        alignment: aligned A and B by ``<block>/<module>/A|B``; see the adapter shelf.

    Raises:
        AdapterError: the bundle is in use, or the adapter does not fit the model.
        ConfigError: DeepSpeed is needed and not installed.
    """
    sharding = bundle.sharding
    if engine.gradient_checkpointing:
        _checkpoint_gradients(
            bundle.model, reentrant=sharding is not None and sharding.cuts_weights
        )
    if sharding is None:
        return TorchEngine(bundle, adapter_config, adapter_name, optim, evaluation, seed, alignment)
    from fedml_plugin_fedmosaic.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        bundle,
        adapter_config,
        adapter_name,
        optim,
        evaluation,
        seed,
        alignment,
        group=sharding.group,
        config=sharding.config,
    )


def _checkpoint_gradients(model: Any, *, reentrant: bool) -> None:
    """Recomputes activations in the backward pass; only while the model is in training mode.

    The variant that saves tensors by their shape fails on weights that are gathered and let go
    (ZeRO stage 3); the older, re-entrant one needs an input with gradients.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
