"""PQ-LoRA behind the shelf's contract."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fedml_plugin_fedmosaic.adapters.handle import (
    AdapterHandle,
    PlainLayer,
    raise_problems,
    wrap,
)
from fedml_plugin_fedmosaic.adapters.pq_lora.config import PQLoraConfig
from fedml_plugin_fedmosaic.adapters.pq_lora.layer import PQLoraLayer
from fedml_plugin_fedmosaic.adapters.pq_lora.model import find_targets, pq_layers
from fedml_plugin_fedmosaic.config.sections import AdapterConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part, View
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers, block_of_layer

_NAME = "default"


class PQLoraHandle(AdapterHandle):
    """Handle on the PQ-LoRA adapter of one model; see ``adapters.base.InjectedAdapter``."""

    def parameters(self) -> dict[AdapterKey, nn.Parameter]:
        """All adapter tensors of the model."""
        return {
            AdapterKey(layer.block[_NAME], layer.layer, layer.module, branch, part): parameter
            for layer in pq_layers(self.model)
            for (branch, part), parameter in layer.tensors(_NAME).items()
        }

    def set_view(self, view: View) -> None:
        """Chooses the branches of the forward pass.

        Raises:
            AdapterError: the view adds logits, which is no matter of a layer.
        """
        if view is View.ENSEMBLE:
            raise AdapterError(f"PQ-LoRA has no view {view!r} in its layers")
        for layer in pq_layers(self.model):
            layer.set_view(view)

    def set_trainable(self, branches: Set[Branch]) -> None:
        """Switches gradients: LOCAL/GLOBAL their trainable parts, SHARED the gate only."""
        for layer in pq_layers(self.model):
            layer.set_trainable(branches)

    def plain(self, view: View) -> dict[str, PlainLayer]:
        """The adapter in one view as plain LoRA; a conventional layer's branches are stacked.

        Raises:
            AdapterError: the view is gated by the input, or is the base model.
        """
        base = self.model.get_base_model()
        named = [item for item in base.named_modules() if isinstance(item[1], PQLoraLayer)]
        layers: dict[str, PlainLayer] = {}
        for name, layer in named:
            before = layer.view
            layer.set_view(view)
            try:
                mixed = layer.mixed(_NAME)
            finally:
                layer.set_view(before)
            A, B = mixed[Part.A], mixed[Part.B]
            if Part.P in mixed:
                layers[name] = PlainLayer(A=A, B=B @ mixed[Part.P].t(), bias=B @ mixed[Part.Q])
            else:
                layers[name] = PlainLayer(A=A, B=B)
        return layers

    def shape(self) -> tuple[int, float]:
        """Rank and scaling."""
        peft_config: PQLoraConfig = self.model.peft_config[_NAME]
        return peft_config.r, peft_config.scaling


def inject_pq_lora(
    model: Any,
    config: AdapterConfig,
    num_layers: int,
    *,
    seed: int,
    alignment: Mapping[str, Tensor] | None = None,
) -> PQLoraHandle:
    """Puts PQ-LoRA into a model.

    Args:
        model: a frozen Hugging Face model without adapters; it is changed in place.
        config: rank, alpha, dropout, blocks, gate and target modules.
        num_layers: decoder layers of the text tower.
        seed: of the initial A and B. Equal seeds give equal A and B; those of PQ layers depend on
            block, module and width only, so equal widths share them across architectures.
        alignment: aligned A (r, d_in) and B (d_out, r) of all PQ layers by
            ``<block>/<module>/A|B``; random orthonormal ones when omitted.

    Returns:
        The handle, in the gated view, with the local branch and the gate trainable.

    Raises:
        AdapterError: the adapter or the alignment does not fit the model.
    """
    refuse_adapted(model)
    peft_config = PQLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        num_blocks=config.num_blocks,
        num_layers=num_layers,
        gate=config.gate,
        target_modules=list(config.target_modules),
        init_seed=seed,
    )
    if alignment is not None:
        _check_alignment(alignment, peft_config, model)
    handle = PQLoraHandle(wrap(model, peft_config, _NAME))
    if alignment is not None:
        with torch.no_grad():
            for key, parameter in handle.parameters().items():
                if key.branch is Branch.SHARED and key.part in (Part.A, Part.B):
                    parameter.copy_(alignment[f"{key.block}/{key.module}/{key.part}"])
    return handle


def refuse_adapted(model: nn.Module) -> None:
    """Refuses a model that already carries a PEFT adapter.

    Raises:
        AdapterError: it does.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__} already carries an adapter",
            hint="call unload() on the PEFT model first",
        )


def _check_alignment(
    alignment: Mapping[str, Tensor], config: PQLoraConfig, model: nn.Module
) -> None:
    tower = find_targets(config, model)
    ends = block_end_layers(tower.num_layers, config.num_blocks)
    expected: dict[str, tuple[int, int]] = {}
    for target in tower.targets:
        if target.layer in ends:
            block = block_of_layer(target.layer, tower.num_layers, config.num_blocks)
            expected[f"{block}/{target.module}/A"] = (config.r, target.in_features)
            expected[f"{block}/{target.module}/B"] = (target.out_features, config.r)
    problems = [f"missing {key}" for key in sorted(expected.keys() - alignment.keys())]
    problems += [f"unexpected {key}" for key in sorted(alignment.keys() - expected.keys())]
    problems += [
        f"{key}: expected shape {shape}, got {tuple(alignment[key].shape)}"
        for key, shape in sorted(expected.items())
        if key in alignment and tuple(alignment[key].shape) != shape
    ]
    raise_problems(
        "the alignment does not fit the model",
        problems,
        hint="make it again for this model, rank, blocks and target modules, or leave it out",
    )
