"""Named sets of adapter tensors in a model: laid over the adapter by exchanging storage.

Nothing is copied when a set is laid on or taken off, so a teacher that shares the student's base
model costs its forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, AdapterState, Branch


class AdapterSets:
    """The sets of one pass, on the model's device.

    Args:
        parameters: all adapter tensors of the model.
        sets: named parts of an adapter state.
        trained: names of sets that are trained; their tensors must be of the local branch.

    Attributes:
        leaves: trained set -> its parameters.

    Raises:
        AdapterError: a set holds a key or a shape that the model does not have, or a trained set
            is missing or empty.
    """

    def __init__(
        self,
        parameters: Mapping[AdapterKey, nn.Parameter],
        sets: Mapping[str, AdapterState],
        trained: Sequence[str] = (),
    ) -> None:
        self._parameters = parameters
        for name, tensors in sets.items():
            wrong = [
                str(key)
                for key, value in sorted(tensors.items())
                if key not in parameters or parameters[key].shape != value.shape
            ]
            if wrong:
                raise AdapterError(
                    f"adapter set {name!r} does not fit the model: {len(wrong)} tensors, first "
                    f"{wrong[0]}",
                    hint="a set holds tensors of the client's own architecture",
                )
        self._sets: dict[str, dict[AdapterKey, Tensor]] = {
            name: {key: self._placed(key, value) for key, value in tensors.items()}
            for name, tensors in sets.items()
        }
        self.leaves: dict[str, dict[AdapterKey, nn.Parameter]] = {}
        for name in dict.fromkeys(trained):
            tensors = self._get(name)
            foreign = [key for key in tensors if key.branch is not Branch.LOCAL]
            if foreign or not tensors:
                raise AdapterError(
                    f"adapter set {name!r} cannot be trained by task: it has "
                    + (f"the tensor {foreign[0]}" if foreign else "no tensors")
                    + "; expected tensors of the local branch"
                )
            self.leaves[name] = {key: nn.Parameter(value) for key, value in tensors.items()}

    def _placed(self, key: AdapterKey, value: Tensor) -> Tensor:
        parameter = self._parameters[key]
        return value.detach().to(device=parameter.device, dtype=parameter.dtype, copy=True)

    def _get(self, name: str) -> Mapping[AdapterKey, Tensor]:
        if name not in self._sets:
            raise AdapterError(
                f"there is no adapter set {name!r}; known: {', '.join(self._sets) or 'none'}",
                hint="prepare() or advance() must put it into ClientState.sets",
            )
        return self._sets[name]

    def tensors(self, name: str) -> Mapping[AdapterKey, Tensor]:
        """A set's tensors on the device.

        Raises:
            AdapterError: there is no such set.
        """
        return self._get(name)

    @contextmanager
    def laid(self, names: Sequence[str]) -> Iterator[None]:
        """The model with sets laid over its adapter, later ones over earlier ones.

        Raises:
            AdapterError: there is no such set.
        """
        chosen: dict[AdapterKey, Tensor] = {}
        for name in names:
            chosen.update(self._get(name))
        before = {key: self._parameters[key].data for key in chosen}
        try:
            for key, value in chosen.items():
                self._parameters[key].data = value.data
            yield
        finally:
            for key, value in before.items():
                self._parameters[key].data = value

    @contextmanager
    def routed(self, name: str | None) -> Iterator[None]:
        """As :meth:`laid` for one trained set; gradients go to it. None: the adapter itself."""
        if name is None:
            yield
            return
        leaves = self.leaves[name]
        grads = {key: self._parameters[key].grad for key in leaves}
        with self.laid([name]):
            try:
                for key, leaf in leaves.items():
                    self._parameters[key].grad = leaf.grad
                yield
            finally:
                for key, leaf in leaves.items():
                    leaf.grad = self._parameters[key].grad
                    self._parameters[key].grad = grads[key]

    def collect(self) -> dict[str, dict[AdapterKey, Tensor]]:
        """Copies of the trained sets, float32 on the CPU."""
        return {
            name: {
                key: leaves[key].detach().to(device="cpu", dtype=torch.float32, copy=True)
                for key in sorted(leaves)
            }
            for name, leaves in self.leaves.items()
        }
