"""Shelf of losses: ``(model, inputs, positions) -> loss of each sample``.

A member takes a model, the inputs of ``Processor.encode_supervised`` and the positions whose next
token is supervised somewhere in the batch, and returns float32 ``(n,)``. The engine averages over
the samples of an optimizer step, however they are cut into micro-batches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from fedml_plugin_fedmosaic.core.registry import Registry
from fedml_plugin_fedmosaic.data.prompt import IGNORE
from fedml_plugin_fedmosaic.engine.processor import Batch

LOSSES = Registry("losses", {"cross_entropy": "fedml_plugin_fedmosaic.engine.losses:cross_entropy"})


def cross_entropy(model: Any, batch: Batch, positions: Tensor) -> Tensor:
    """Mean cross entropy over the supervised tokens of each sample, in nats.

    Args:
        model: causal language model or image-text model.
        batch: ``input_ids``, ``attention_mask``, ``labels`` and maybe ``pixel_values``.
        positions: int64 ``(k,)``, where logits are needed; the head runs on these only, because
            answers are short and vocabularies large.

    Returns:
        float32 ``(n,)`` with gradients.
    """
    logits = supervised_logits(model, batch, positions)
    targets = batch["labels"].index_select(1, positions + 1)
    token_losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return token_losses.view_as(targets).sum(1) / (targets != IGNORE).sum(1)


def supervised_logits(model: Any, batch: Batch, positions: Tensor) -> Tensor:
    """Logits at the given positions.

    Returns:
        float32 ``(n, k, vocabulary)``.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=positions).logits.float()
    return logits


def supervised(batch: Batch, positions: Tensor) -> Tensor:
    """Which of the positions are supervised in which sample: bool ``(n, k)``."""
    return batch["labels"].index_select(1, positions + 1) != IGNORE
