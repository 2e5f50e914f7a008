"""The adapter layer: PQ-LoRA at block ends, conventional dual LoRA elsewhere.

Two branches, local and global, are balanced by a gate w (weight of the global branch)::

    PQ layer      y = base(x) + s ((1-w)(z P_l + Q_l) + w (z P_g + Q_g)) B^T      z = x A^T
    conventional  y = base(x) + s ((1-w) x A_l^T B_l^T + w x A_g^T B_g^T)

In a PQ layer both branches share the frozen A (orthonormal rows) and B (orthonormal columns), so it
costs two large products, as one plain LoRA does. Source: FedMosaic (arXiv 2506.11024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from fedml_plugin_fedmosaic.adapters.initial import kaiming_rows, orthonormal_rows
from fedml_plugin_fedmosaic.adapters.pq_lora.config import PQLoraConfig
from fedml_plugin_fedmosaic.adapters.pq_lora.context import ForwardContext
from fedml_plugin_fedmosaic.adapters.pq_lora.functional import add_product, mix_branches
from fedml_plugin_fedmosaic.adapters.pq_lora.functional import affine as affine_rows
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, Part, View

Slot = tuple[Branch, Part]

_SLOTS: Mapping[Slot, str] = {
    (Branch.SHARED, Part.A): "pq_lora_A",
    (Branch.SHARED, Part.B): "pq_lora_B",
    (Branch.SHARED, Part.GATE): "pq_lora_gate",
    (Branch.LOCAL, Part.P): "pq_lora_P_local",
    (Branch.LOCAL, Part.Q): "pq_lora_Q_local",
    (Branch.GLOBAL, Part.P): "pq_lora_P_global",
    (Branch.GLOBAL, Part.Q): "pq_lora_Q_global",
    (Branch.LOCAL, Part.A): "pq_lora_A_local",
    (Branch.LOCAL, Part.B): "pq_lora_B_local",
    (Branch.GLOBAL, Part.A): "pq_lora_A_global",
    (Branch.GLOBAL, Part.B): "pq_lora_B_global",
}
_NEVER_TRAINED: frozenset[Slot] = frozenset({(Branch.SHARED, Part.A), (Branch.SHARED, Part.B)})
_SIDES = (Branch.LOCAL, Branch.GLOBAL)
# The released noise is softplus(x . w_noise) + 1e-5 with w_noise never leaving 0.
_NOISE_STD = math.log(2.0) + 1e-5


class PQLoraLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc, unused-ignore]
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

    adapter_layer_names = tuple(_SLOTS.values())
    other_param_names = ("pq_lora_dropout",)

    # PEFT carries no type information; these are its own, and the containers made below.
    get_base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    set_adapter: Any
    weight: Any
    _cast_input_dtype: Any
    pq_lora_gate: Any

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
        make = self._initial_pq if is_pq else self._initial_conventional
        gate = torch.zeros(() if config.gate == "scalar" else (self.in_features,))
        slots = {**make(config, block), (Branch.SHARED, Part.GATE): gate}
        for slot, value in slots.items():
            parameter = nn.Parameter(value.to(device=linear.weight.device, dtype=dtype))
            getattr(self, _SLOTS[slot])[adapter_name] = parameter
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.pq_lora_dropout[adapter_name] = dropout
        self.block[adapter_name] = block
        self.is_pq[adapter_name] = is_pq
        self.scaling[adapter_name] = config.scaling
        self.gate_noise[adapter_name] = config.gate_noise
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_pq(self, config: PQLoraConfig, block: int) -> dict[Slot, Tensor]:
        rank, seed = config.r, config.init_seed
        check_rank(rank, self.in_features, self.out_features, f"layer {self.layer}, {self.module}")
        values = {
            (Branch.SHARED, Part.A): orthonormal_rows(
                rank, self.in_features, seed, block, self.module, "A"
            ),
            (Branch.SHARED, Part.B): orthonormal_rows(
                rank, self.out_features, seed, block, self.module, "B"
            ).T.contiguous(),
        }
        for side in _SIDES:
            values[side, Part.P] = torch.zeros(rank, rank)
            values[side, Part.Q] = torch.zeros(rank)
        return values

    def _initial_conventional(self, config: PQLoraConfig, block: int) -> dict[Slot, Tensor]:
        del block  # conventional layers are named by layer: they are shared inside one signature
        values: dict[Slot, Tensor] = {}
        draw = kaiming_rows(config.r, self.in_features, config.init_seed, self.layer, self.module)
        for side in _SIDES:
            values[side, Part.A] = draw.clone()
            values[side, Part.B] = torch.zeros(self.out_features, config.r)
        return values

    def tensors(self, adapter_name: str) -> dict[Slot, nn.Parameter]:
        """The tensors of one adapter by branch and part."""
        return {
            slot: getattr(self, attribute)[adapter_name]
            for slot, attribute in _SLOTS.items()
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
                parameter.requires_grad_(slot[0] in branches and slot not in _NEVER_TRAINED)

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
                if slot in _NEVER_TRAINED or slot[0] not in self.trainable:
                    parameter.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As PEFT's, but adapters keep their dtype: a round trip through bfloat16 loses bits."""
        target = self.weight.device if device is None else device
        for slot, parameter in self.tensors(adapter_name).items():
            if parameter.device.type != "meta":
                getattr(self, _SLOTS[slot])[adapter_name] = parameter.to(target)

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
        tensors = self.tensors(name)
        x = self._cast_input_dtype(x, tensors[Branch.SHARED, Part.GATE].dtype)
        weight = self._gate(name, x) if self.view is View.GATED else None
        side = Branch.GLOBAL if self.view is View.GLOBAL else Branch.LOCAL
        x = self.pq_lora_dropout[name](x)
        scaling = self.scaling[name]
        if self.is_pq[name]:
            z = functional.linear(x, tensors[Branch.SHARED, Part.A])
            pairs = {s: (tensors[s, Part.P], tensors[s, Part.Q]) for s in _SIDES}
            if weight is None:
                v = affine_rows(z, *pairs[side])
            else:
                v = mix_branches(z, pairs[Branch.LOCAL], pairs[Branch.GLOBAL], weight)
            return add_product(result, v, tensors[Branch.SHARED, Part.B], scaling)
        if weight is None:
            z = functional.linear(x, tensors[side, Part.A])
            return add_product(result, z, tensors[side, Part.B], scaling)
        for s, share in ((Branch.LOCAL, 1 - weight), (Branch.GLOBAL, weight)):
            z = functional.linear(x, tensors[s, Part.A])
            result = add_product(result, z * share.to(z.dtype), tensors[s, Part.B], scaling)
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

    def mixed(self, adapter_name: str) -> dict[Part, Tensor]:
        """A PQ layer's A, B, P, Q, or a conventional layer's A, B, of the current view.

        Both conventional branches are stacked along the rank when the view is gated, with the gate
        inside B.

        Args:
            adapter_name: PEFT name.

        Returns:
            Detached tensors, enough to write the adapter as one plain LoRA.

        Raises:
            AdapterError: the view is off, or gated with a gate that depends on the input.
        """
        tensors = {slot: tensor.detach() for slot, tensor in self.tensors(adapter_name).items()}
        if self.view is View.BASE:
            raise AdapterError("the view 'base' has no adapter", hint="choose another view")
        gate = tensors[Branch.SHARED, Part.GATE]
        if self.view is View.GATED and gate.ndim:
            raise AdapterError(
                "the input gate depends on the input, so the gated view is no fixed weight and "
                "cannot be merged or exported",
                hint="choose the view local or global, or train with gate: scalar",
            )
        side = Branch.GLOBAL if self.view is View.GLOBAL else Branch.LOCAL
        parts = (Part.P, Part.Q) if self.is_pq[adapter_name] else (Part.A, Part.B)
        chosen = {part: tensors[side, part] for part in parts}
        if self.view is View.GATED:
            weight = gate.sigmoid()
            other = {part: tensors[Branch.GLOBAL, part] for part in parts}
            if self.is_pq[adapter_name]:
                chosen = {part: torch.lerp(chosen[part], other[part], weight) for part in parts}
            else:
                chosen = {
                    Part.A: torch.cat([chosen[Part.A], other[Part.A]]),
                    Part.B: torch.cat([(1 - weight) * chosen[Part.B], weight * other[Part.B]], 1),
                }
        if self.is_pq[adapter_name]:
            chosen[Part.A] = tensors[Branch.SHARED, Part.A]
            chosen[Part.B] = tensors[Branch.SHARED, Part.B]
        return chosen

    def get_delta(self, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """The current view as a change of the base weight and bias.

        Args:
            adapter_name: PEFT name.

        Returns:
            (d_out, d_in), and (d_out,) or None, in the adapter's dtype.

        Raises:
            AdapterError: see :meth:`mixed`.
        """
        mixed, scaling = self.mixed(adapter_name), self.scaling[adapter_name]
        if Part.P not in mixed:
            return scaling * (mixed[Part.B] @ mixed[Part.A]), None
        weight = scaling * (mixed[Part.B] @ (mixed[Part.P].t() @ mixed[Part.A]))
        return weight, scaling * (mixed[Part.B] @ mixed[Part.Q])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the current view to the base weights; a bias is created if there is none.

        Args:
            safe_merge: check that the result is finite first.
            adapter_names: adapters to merge; the active ones when omitted.

        Raises:
            AdapterError: see :meth:`mixed`; or the result is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        for name in names:
            if name not in self.is_pq:
                continue
            if self.view is not View.BASE:
                self._shift(*self.get_delta(name), safe=safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes merged adapters out again, up to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self.view is not View.BASE:
                weight, bias = self.get_delta(name)
                self._shift(-weight, None if bias is None else -bias, safe=False)
        if self._bias_created:
            linear: Any = self.get_base_layer()
            linear.bias = None
            self._bias_created = False

    def _shift(self, weight: Tensor, bias: Tensor | None, *, safe: bool) -> None:
        linear: Any = self.get_base_layer()
        dtype = linear.weight.dtype
        new_weight = (linear.weight.detach().to(weight.dtype) + weight).to(dtype)
        old_bias = linear.bias
        new_bias = bias if old_bias is None or bias is None else old_bias.detach().to(bias) + bias
        if safe and not all(
            torch.isfinite(tensor).all() for tensor in (new_weight, new_bias) if tensor is not None
        ):
            raise AdapterError(
                f"layer {self.layer}, {self.module}: merged weights are not finite",
                hint="the adapter is broken; nothing was merged into this layer",
            )
        linear.weight.data = new_weight
        if new_bias is None:
            return
        if old_bias is None:
            linear.bias = nn.Parameter(new_bias.to(dtype), requires_grad=False)
            self._bias_created = True
        else:
            linear.bias.data = new_bias.to(dtype)

    def __repr__(self) -> str:
        return "pq_lora." + super().__repr__()


def check_rank(rank: int, in_features: int, out_features: int, where: str) -> None:
    """Refuses a rank that orthonormal factors cannot have.

    Args:
        rank: rank.
        in_features: width that A's rows have.
        out_features: width that B's columns have.
        where: the linear, for the message.

    Raises:
        AdapterError: the rank is too large.
    """
    limit = min(in_features, out_features)
    if rank > limit:
        raise AdapterError(
            f"rank {rank} is too large for {where}: its linear is {in_features} -> "
            f"{out_features}, and orthonormal A and B need a rank of at most {limit}",
            hint=f"set adapter.rank to {limit} or less, or leave {where.rpartition(' ')[2]!r} out "
            "of adapter.target_modules",
        )
