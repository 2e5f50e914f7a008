"""Contract of an adapter: put it into a model, read it, write it, choose branches.

A shelf member is a function ``inject(model, config, num_layers, *, seed, alignment=None) ->
InjectedAdapter`` where ``model`` is a frozen Hugging Face model, ``config`` an ``AdapterConfig``
and ``alignment`` optional aligned A, B (``{"<block>/<module>/A"|"B": tensor}``).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Protocol

from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.types import AdapterKey, AdapterState, Branch, View


class InjectedAdapter(Protocol):
    """Handle on the adapters of one model.

    Attributes:
        model: the PEFT model; run it for forward passes.
    """

    model: nn.Module

    def keys(self) -> tuple[AdapterKey, ...]:
        """All adapter tensors, sorted."""
        ...

    def parameters(self) -> Mapping[AdapterKey, nn.Parameter]:
        """All adapter tensors of the model, in no particular order."""
        ...

    def collect(self) -> dict[AdapterKey, Tensor]:
        """Detached float32 CPU copies of all adapter tensors."""
        ...

    def load(self, state: AdapterState) -> None:
        """Overwrites all adapter tensors.

        Raises:
            AdapterError: a key is missing or unexpected, or a shape differs (all are listed).
        """
        ...

    def set_view(self, view: View) -> None:
        """Chooses the branches of the forward pass."""
        ...

    def set_trainable(self, branches: Set[Branch]) -> None:
        """Switches gradients: LOCAL/GLOBAL their trainable parts, SHARED the gate only."""
        ...

    def param_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Parameters that require gradients: ``ab`` (A, B) and ``pq`` (P, Q, gate)."""
        ...
