"""Adapter layers as a change of the base weights: merging, and the way to plain LoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, Part, View


class MergingMixin:
    """Merging of a PQ-LoRA layer, in its current view."""

    # Of the layer and of PEFT's base class.
    get_base_layer: Any
    tensors: Any
    view: View
    layer: int
    module: str
    is_pq: dict[str, bool]
    scaling: dict[str, float]
    merged_adapters: list[str]
    _bias_created: bool

    def mixed(self, adapter_name: str) -> dict[Part, Tensor]:
        """A PQ layer's A, B, P, Q, or a conventional layer's A, B, of the current view.

        Both conventional branches are stacked along the rank when the view is gated, with the gate
        inside B, or is their sum.

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
        if self.view is View.SUM:
            other = {part: tensors[Branch.GLOBAL, part] for part in parts}
            if self.is_pq[adapter_name]:
                chosen = {part: chosen[part] + other[part] for part in parts}
            else:
                chosen = {
                    Part.A: torch.cat([chosen[Part.A], other[Part.A]]),
                    Part.B: torch.cat([chosen[Part.B], other[Part.B]], 1),
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
