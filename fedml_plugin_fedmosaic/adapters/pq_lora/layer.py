"""The adapter layer: PQ-LoRA at block ends, conventional dual LoRA elsewhere.

Two branches, local and global, are balanced by a gate w (weight of the global branch)::

    PQ layer      y = base(x) + s ((1-w)(z P_l + Q_l) + w (z P_g + Q_g)) B^T      z = x A^T
    conventional  y = base(x) + s ((1-w) x A_l^T B_l^T + w x A_g^T B_g^T)

In the view ``sum`` both weights are 1.

In a PQ layer both branches share the frozen A (orthonormal rows) and B (orthonormal columns), so it
costs two large products, as one plain LoRA does. Source: FedMosaic (arXiv 2506.11024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from fedml_plugin_fedmosaic.adapters.pq_lora.config import PQLoraConfig
from fedml_plugin_fedmosaic.adapters.pq_lora.context import ForwardContext
from fedml_plugin_fedmosaic.adapters.pq_lora.factors import (
    NEVER_TRAINED,
    SLOTS,
    Place,
    Slot,
    initial_values,
)
from fedml_plugin_fedmosaic.adapters.pq_lora.functional import add_product, affine, mix_branches
from fedml_plugin_fedmosaic.adapters.pq_lora.merging import MergingMixin
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, View

# The released noise is softplus(x . w_noise) + 1e-5 with w_noise never leaving 0.
_NOISE_STD = math.log(2.0) + 1e-5


class PQLoraLayer(MergingMixin, nn.Module, BaseTunerLayer):  # type: ignore[misc, unused-ignore]
    """A linear with PQ-LoRA or conventional dual LoRA around it.

    Args:
        base_layer: the linear.
        adapter_name: PEFT name of the first adapter.
        config: what the adapter looks like.
        block: 0-based block of the decoder layer.
        layer: 0-based decoder layer.
        module: short name of the linear.
        is_pq: PQ-LoRA (block-end layers) instead of conventional dual LoRA.
        context: shared by all layers of one model.

    Attributes:
        view: branches of the forward pass.
        trainable: branches whose trainable tensors receive gradients.
    """

    adapter_layer_names = tuple(SLOTS.values())
    other_param_names = ("pq_lora_dropout",)

    # PEFT carries no type information; these are its own, and the containers made below.
    get_base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    set_adapter: Any
    weight: Any
    _cast_input_dtype: Any
    pq_lora_A: Any
    pq_lora_B: Any
    pq_lora_gate: Any
    pq_lora_P_local: Any
    pq_lora_Q_local: Any
    pq_lora_P_global: Any
    pq_lora_Q_global: Any
    pq_lora_A_local: Any
    pq_lora_B_local: Any
    pq_lora_A_global: Any
    pq_lora_B_global: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PQLoraConfig,
        *,
        block: int,
        layer: int,
        module: str,
        is_pq: bool,
        context: ForwardContext,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear: Any = self.get_base_layer()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.layer = layer
        self.module = module
        self.context = context
        self.view = View.GATED
        self.trainable: Set[Branch] = frozenset({Branch.LOCAL, Branch.SHARED})
        self.block: dict[str, int] = {}
        self.is_pq: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.gate_noise: dict[str, bool] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.pq_lora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._bias_created = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, block=block, is_pq=is_pq)
        self.train(base_layer.training)

    def update_layer(
        self, adapter_name: str, config: PQLoraConfig, *, block: int, is_pq: bool
    ) -> None:
        """Adds an adapter with its initial values.

        Args:
            adapter_name: PEFT name.
            config: what the adapter looks like.
            block: 0-based block of this layer.
            is_pq: PQ-LoRA instead of conventional dual LoRA.

        Raises:
            AdapterError: the rank is larger than a width of a PQ layer's linear.
        """
        linear: Any = self.get_base_layer()
        # Adapters train in float32 under lower base precisions, as PEFT's own do.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        place = Place(
            block=block,
            layer=self.layer,
            module=self.module,
            in_features=self.in_features,
            out_features=self.out_features,
        )
        for slot, value in initial_values(config, place, is_pq=is_pq).items():
            parameter = nn.Parameter(value.to(device=linear.weight.device, dtype=dtype))
            getattr(self, SLOTS[slot])[adapter_name] = parameter
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.pq_lora_dropout[adapter_name] = dropout
        self.block[adapter_name] = block
        self.is_pq[adapter_name] = is_pq
        self.scaling[adapter_name] = config.scaling
        self.gate_noise[adapter_name] = config.gate_noise
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tensors(self, adapter_name: str) -> dict[Slot, nn.Parameter]:
        """The tensors of one adapter by branch and part."""
        return {
            slot: getattr(self, attribute)[adapter_name]
            for slot, attribute in SLOTS.items()
            if adapter_name in getattr(self, attribute)
        }

    def set_view(self, view: View) -> None:
        """Chooses the branches of the forward pass.

        Raises:
            AdapterError: another view is merged into the base weights.
        """
        if self.merged and view is not self.view:
            raise AdapterError(
                f"the view {self.view} is merged into the base weights",
                hint="call unmerge_adapter() first",
            )
        self.view = view

    def set_trainable(self, branches: Set[Branch]) -> None:
        """Switches gradients of the active adapters; A and B of a PQ layer never get any."""
        self.trainable = frozenset(branches)
        for name in self.active_adapters:
            for slot, parameter in self.tensors(name).items():
                parameter.requires_grad_(slot[0] in branches and slot not in NEVER_TRAINED)

    def _freeze_non_trainable_peft_weights(
        self, adapter_names: str | Sequence[str] | None = None
    ) -> None:
        """PEFT calls this after it has switched gradients on; it only switches off."""
        if adapter_names is None:
            adapter_names = list(self.is_pq)
        elif isinstance(adapter_names, str):
            adapter_names = [adapter_names]
        for name in adapter_names:
            for slot, parameter in self.tensors(name).items():
                if slot in NEVER_TRAINED or slot[0] not in self.trainable:
                    parameter.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As PEFT's, but adapters keep their dtype: a round trip through bfloat16 loses bits."""
        target = self.weight.device if device is None else device
        for slot, parameter in self.tensors(adapter_name).items():
            if parameter.device.type != "meta":
                getattr(self, SLOTS[slot])[adapter_name] = parameter.to(target)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base linear plus the branches of the current view.

        Args:
            x: (..., d_in); (batch, tokens, d_in) or (rows, d_in) for the input gate.
            args: for the base layer.
            kwargs: for the base layer.

        Returns:
            (..., d_out) in the base output's dtype.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged or self.view is View.BASE:
            return result
        for name in self.active_adapters:
            if name in self.is_pq:
                result = self._add(name, x, result)
        return result

    def _add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        # Looked up by attribute and not through tensors(): small models feel every dictionary.
        x = self._cast_input_dtype(x, self.pq_lora_gate[name].dtype)
        weight = self._gate(name, x) if self.view is View.GATED else None
        x = self.pq_lora_dropout[name](x)
        scaling = self.scaling[name]
        use_global, both = self.view is View.GLOBAL, self.view is View.SUM
        if self.is_pq[name]:
            z = functional.linear(x, self.pq_lora_A[name])
            local = (self.pq_lora_P_local[name], self.pq_lora_Q_local[name])
            global_ = (self.pq_lora_P_global[name], self.pq_lora_Q_global[name])
            if both:
                v = affine(z, local[0] + global_[0], local[1] + global_[1])
            elif weight is None:
                v = affine(z, *(global_ if use_global else local))
            else:
                v = mix_branches(z, local, global_, weight)
            return add_product(result, v, self.pq_lora_B[name], scaling)
        # Two products, not one over stacked factors: the backward pass then computes gradients
        # of the trained branch only, and no factor is copied.
        if not use_global:
            z = functional.linear(x, self.pq_lora_A_local[name])
            v = z if weight is None else z * (1 - weight).to(z.dtype)
            result = add_product(result, v, self.pq_lora_B_local[name], scaling)
        if use_global or both or weight is not None:
            z = functional.linear(x, self.pq_lora_A_global[name])
            v = z if weight is None else z * weight.to(z.dtype)
            result = add_product(result, v, self.pq_lora_B_global[name], scaling)
        return result

    def _gate(self, name: str, x: Tensor) -> Tensor:
        """Weight of the global branch: () or one per sequence, (batch, 1, 1) or (rows, 1)."""
        gate: Tensor = self.pq_lora_gate[name]
        if gate.ndim == 0:
            return gate.sigmoid()
        key = f"{self.layer}/{self.module}/{name}"
        replayed = self.context.replayed(key)
        if replayed is not None:
            return replayed
        if x.ndim == 3:
            # The mean first: then the backward pass keeps one vector per sequence, not x.
            means = torch.bmm(self.context.token_weights(x), x)
        elif x.ndim == 2:
            means = x
        else:
            raise AdapterError(
                "the input gate takes (batch, tokens, d_in) or (rows, d_in), got "
                f"{tuple(x.shape)} in layer {self.layer}, {self.module}"
            )
        logit = (means @ gate.to(means.dtype))[..., None]
        if self.training and self.gate_noise[name]:
            # One normal draw per token, averaged, is one draw per sequence of a smaller spread.
            # Drawn as dropout is, so that gradient checkpointing repeats it.
            spread = _NOISE_STD * self._noise_factor(x)
            logit = logit + spread * torch.randn_like(logit)
        weight: Tensor = logit.sigmoid()
        self.context.remember(key, weight)
        return weight

    def _noise_factor(self, x: Tensor) -> Tensor | float:
        if x.ndim == 2:
            return 1.0
        factor: Tensor = self.context.token_weights(x).norm(dim=2, keepdim=True)
        return factor

    def __repr__(self) -> str:
        return "pq_lora." + super().__repr__()
