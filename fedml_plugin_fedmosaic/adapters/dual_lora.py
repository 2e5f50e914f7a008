"""Two plain LoRA branches per linear, called local and global, behind the shelf's contract.

::

    local   y = base(x) + s B_l A_l x            sum    y = base(x) + s (B_l A_l x + B_g A_g x)
    global  y = base(x) + s B_g A_g x            gated  y = base(x) + s (B_l A_l x + B_g A_g x) / 2

Source: the two-branch layers of the baselines in FedMosaic (arXiv 2506.11024), whose gate is fixed
at one half. Both branches are PEFT's own LoRA; nothing is computed for a branch that is off. Three
branches need no layer of their own: a frozen third one is a set of global tensors that a pass lays
over the adapter.
"""

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
from fedml_plugin_fedmosaic.adapters.structure import find_text_tower
from fedml_plugin_fedmosaic.config.sections import AdapterConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Branch, Part, View
from fedml_plugin_fedmosaic.equations.blocks import block_of_layer

_BOTH = (Branch.LOCAL, Branch.GLOBAL)
_WEIGHTS: Mapping[View, Mapping[Branch, float]] = {
    View.LOCAL: {Branch.LOCAL: 1.0},
    View.GLOBAL: {Branch.GLOBAL: 1.0},
    View.SUM: dict.fromkeys(_BOTH, 1.0),
    View.GATED: dict.fromkeys(_BOTH, 0.5),
}


class DualLoraHandle(AdapterHandle):
    """Handle on dual LoRA; see ``adapters.base.InjectedAdapter``.

    Args:
        model: the PEFT model; it has the adapters ``local`` and ``global``.
        layers: LoRA layers by their keys' block, layer and module.
    """

    def __init__(self, model: Any, layers: Mapping[tuple[int, int, str], LoraLayer]) -> None:
        super().__init__(model)
        self._layers = dict(layers)
        self._factors: dict[AdapterKey, Any] = {
            AdapterKey(block, layer, module, branch, part): factor[branch.value]
            for (block, layer, module), lora in self._layers.items()
            for branch in _BOTH
            for part, factor in ((Part.A, lora.lora_A), (Part.B, lora.lora_B))
        }
        self._view: View | None = None
        self._trainable: Set[Branch] = frozenset({Branch.LOCAL})
        self._scaling = self.shape()[1]

    def parameters(self) -> dict[AdapterKey, nn.Parameter]:
        """All adapter tensors of the model."""
        return {key: factor.weight for key, factor in self._factors.items()}

    def set_view(self, view: View) -> None:
        """Chooses the branches of the forward pass.

        Raises:
            AdapterError: the view adds logits, which is no matter of a layer.
        """
        weights = _WEIGHTS.get(view)
        if weights is None and view is not View.BASE:
            raise AdapterError(f"dual LoRA has no view {view!r} in its layers")
        if view is self._view:
            return
        self._view = view
        for lora in self._layers.values():
            lora.enable_adapters(weights is not None)
            if weights is not None:
                lora.set_adapter([branch.value for branch in weights])
                for branch, weight in weights.items():
                    lora.scaling[branch.value] = self._scaling * weight
        # PEFT switches gradients with the branches; which are trained is not the view's business.
        self.set_trainable(self._trainable)

    def set_trainable(self, branches: Set[Branch]) -> None:
        """Switches gradients of the two branches; there is no gate."""
        self._trainable = frozenset(branches)
        for key, parameter in self.parameters().items():
            parameter.requires_grad_(key.branch in branches)

    def plain(self, view: View) -> dict[str, PlainLayer]:
        """The adapter in one view as plain LoRA; two branches are stacked to twice the rank.

        Raises:
            AdapterError: the view has no adapter, or adds logits.
        """
        weights = _WEIGHTS.get(view)
        if weights is None:
            raise AdapterError(
                f"dual LoRA in the view {view!r} is no plain LoRA",
                hint=f"use one of the views {', '.join(_WEIGHTS)}",
            )
        base = self.model.get_base_model()
        names = {id(module): name for name, module in base.named_modules()}
        return {
            names[id(lora)]: PlainLayer(
                A=torch.cat([lora.lora_A[branch.value].weight.detach() for branch in weights]),
                B=torch.cat(
                    [
                        lora.lora_B[branch.value].weight.detach() * weight
                        for branch, weight in weights.items()
                    ],
                    dim=1,
                ),
            )
            for lora in self._layers.values()
        }

    def shape(self) -> tuple[int, float]:
        """Rank and scaling of one branch."""
        peft_config = self.model.peft_config[Branch.LOCAL.value]
        return peft_config.r, peft_config.lora_alpha / peft_config.r


def inject_dual_lora(
    model: Any,
    config: AdapterConfig,
    num_layers: int,
    *,
    seed: int,
    alignment: Mapping[str, Tensor] | None = None,
) -> DualLoraHandle:
    """Puts two branches of plain LoRA into the decoder layers of a model.

    Args:
        model: a frozen Hugging Face model without adapters; it is changed in place.
        config: rank, alpha, dropout and target modules; blocks only name the keys.
        num_layers: decoder layers of the text tower.
        seed: of the initial A, the same in both branches; B is 0.
        alignment: must be None: plain LoRA has no aligned factors.

    Returns:
        The handle, in the local view, with the local branch trainable.

    Raises:
        AdapterError: a target module is missing, or an alignment is given.
    """
    if alignment is not None:
        raise AdapterError(
            "dual LoRA has no aligned A and B",
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
        peft_model = wrap(model, peft_config, Branch.LOCAL.value)
        peft_model.add_adapter(Branch.GLOBAL.value, peft_config)
    blocks = min(config.num_blocks, num_layers)
    layers = {
        (
            block_of_layer(target.layer, num_layers, blocks),
            target.layer,
            target.module,
        ): model.get_submodule(target.name)
        for target in tower.targets
    }
    handle = DualLoraHandle(peft_model, layers)
    with torch.no_grad():
        for key, parameter in handle.parameters().items():
            if key.part is Part.A:
                parameter.copy_(kaiming_rows(*parameter.shape, seed, key.layer, key.module))
    handle.set_view(View.LOCAL)
    handle.model.train(model.training)
    return handle
