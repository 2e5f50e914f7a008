"""Plain LoRA, PEFT's own, behind the shelf's contract; the one branch is called local."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedml_plugin_fedmosaic.adapters.handle import AdapterHandle, PlainLayer, wrap
from fedml_plugin_fedmosaic.adapters.initial import kaiming_rows
from fedml_plugin_fedmosaic.adapters.pq_lora.inject import refuse_adapted
from fedml_plugin_fedmosaic.adapters.structure import Target, find_text_tower
from fedml_plugin_fedmosaic.config.sections import AdapterConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part, View
from fedml_plugin_fedmosaic.equations.blocks import block_of_layer

_NAME = "default"


class LoraHandle(AdapterHandle):
    """Handle on plain LoRA; see ``adapters.base.InjectedAdapter``.

    Args:
        model: the PEFT model.
        layers: LoRA layers by their keys' block, layer and module.
    """

    def __init__(self, model: Any, layers: Mapping[tuple[int, int, str], LoraLayer]) -> None:
        super().__init__(model)
        self._layers = dict(layers)
        self._trainable: Set[Branch] = frozenset({Branch.LOCAL})

    def parameters(self) -> dict[AdapterKey, nn.Parameter]:
        """All adapter tensors of the model."""
        return {
            AdapterKey(block, layer, module, Branch.LOCAL, part): factor[_NAME].weight
            for (block, layer, module), lora in self._layers.items()
            for part, factor in ((Part.A, lora.lora_A), (Part.B, lora.lora_B))
        }

    def set_view(self, view: View) -> None:
        """``local`` runs the adapter, ``base`` does not.

        Raises:
            AdapterError: the view needs a second branch.
        """
        if view not in (View.LOCAL, View.BASE):
            raise AdapterError(
                f"plain LoRA has one branch and no view {view!r}",
                hint="use the views local and base, or the adapters dual_lora and pq_lora",
            )
        for lora in self._layers.values():
            lora.enable_adapters(view is View.LOCAL)
        self.set_trainable(self._trainable)

    def set_trainable(self, branches: Set[Branch]) -> None:
        """Switches gradients: LOCAL is the adapter; there is nothing else."""
        self._trainable = frozenset(branches)
        for parameter in self.parameters().values():
            parameter.requires_grad_(Branch.LOCAL in branches)

    def plain(self, view: View) -> dict[str, PlainLayer]:
        """The adapter by name of the linear in the base model.

        Raises:
            AdapterError: the view is not local.
        """
        if view is not View.LOCAL:
            raise AdapterError(
                f"plain LoRA has no adapter in the view {view!r}", hint="use the view local"
            )
        base = self.model.get_base_model()
        names = {id(module): name for name, module in base.named_modules()}
        return {
            names[id(lora)]: PlainLayer(
                A=lora.lora_A[_NAME].weight.detach(), B=lora.lora_B[_NAME].weight.detach()
            )
            for lora in self._layers.values()
        }

    def shape(self) -> tuple[int, float]:
        """Rank and scaling."""
        peft_config = self.model.peft_config[_NAME]
        return peft_config.r, peft_config.lora_alpha / peft_config.r


def inject_lora(
    model: Any,
    config: AdapterConfig,
    num_layers: int,
    *,
    seed: int,
    alignment: Mapping[str, Tensor] | None = None,
) -> LoraHandle:
    """Puts plain LoRA into the decoder layers of a model.

    Args:
        model: a frozen Hugging Face model without adapters; it is changed in place.
        config: rank, alpha, dropout and target modules; blocks only name the keys.
        num_layers: decoder layers of the text tower.
        seed: of the initial A; B is 0.
        alignment: must be None: plain LoRA has no aligned factors.

    Returns:
        The handle, in the local view, trainable.

    Raises:
        AdapterError: a target module is missing, or an alignment is given.
    """
    if alignment is not None:
        raise AdapterError(
            "plain LoRA has no aligned A and B",
            hint="leave adapter.alignment out, or use the adapter pq_lora",
        )
    refuse_adapted(model)
    tower = find_text_tower(model, config.target_modules, num_layers)
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=[target.name for target in tower.targets],
    )
    # PEFT draws A from the global generator; our own draws replace it.
    with torch.random.fork_rng(devices=[]):
        peft_model = wrap(model, peft_config, _NAME)
    blocks = min(config.num_blocks, num_layers)

    def place(target: Target) -> tuple[int, int, str]:
        return block_of_layer(target.layer, num_layers, blocks), target.layer, target.module

    handle = LoraHandle(
        peft_model, {place(target): model.get_submodule(target.name) for target in tower.targets}
    )
    with torch.no_grad():
        for key, parameter in handle.parameters().items():
            if key.part is Part.A:
                parameter.copy_(kaiming_rows(*parameter.shape, seed, key.layer, key.module))
    handle.model.train(model.training)
    return handle
