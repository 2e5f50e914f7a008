"""What the linears of a frozen model receive at its block ends.

The forward pass ends as soon as everything wanted was seen: no output head is run, and no final
normalisation. The models stay as they are: no adapter, evaluation mode (dropout off), no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedml_plugin_fedmosaic.adapters.structure import Target, find_text_tower
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.processor import Batch
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers, block_of_layer


class _SeenEnough(Exception):
    """Ends a forward pass whose rest nobody needs."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Activations of one batch of n sequences of T positions, in the model's dtype.

    Attributes:
        inputs: ``<block>/<module>`` -> input of that linear, ``(n, T, d_in)``. Linears that read
            the same tensor share it.
        layers: output of every decoder layer, ``(n, T, d)``; empty unless asked for.
    """

    inputs: dict[str, Tensor]
    layers: tuple[Tensor, ...]


class ActivationObserver:
    """Watches the adapted linears of the block-end layers of one model.

    Args:
        bundle: a model without an adapter, whole on this device.
        modules: last names of the linears.
        num_blocks: blocks N_B.

    Attributes:
        targets: the watched linears by ``<block>/<module>``, in the order of the model.

    Raises:
        AdapterError: the model carries an adapter, is sharded, has fewer layers than blocks, or
            lacks a linear.
    """

    def __init__(self, bundle: ModelBundle, modules: Sequence[str], num_blocks: int) -> None:
        name = bundle.info.name
        if bundle.adapter is not None:
            raise AdapterError(
                f"model {name!r} carries an adapter; alignment observes untouched models",
                hint="close the engine that uses the model first",
            )
        if bundle.sharding is not None and bundle.sharding.cuts_weights:
            raise AdapterError(
                f"model {name!r} is cut over several ranks; alignment needs it whole",
                hint="load it with ranks: 1; the aligned files then fit the sharded run too",
            )
        self._bundle = bundle
        ends = block_end_layers(bundle.num_layers, num_blocks)
        try:
            tower = find_text_tower(bundle.model, modules, bundle.num_layers)
        except AdapterError as error:
            raise AdapterError(f"model {name!r}: {error.message}", hint=error.hint) from error
        self.targets: dict[str, Target] = {}
        for target in tower.targets:
            if target.layer in ends:
                block = block_of_layer(target.layer, bundle.num_layers, num_blocks)
                self.targets[f"{block}/{target.module}"] = target

    @torch.no_grad()
    def observe(self, batch: Batch, *, layers: bool = False) -> Observed:
        """Runs one batch as far as needed.

        Args:
            batch: what ``Processor.encode_train`` returns; labels are ignored.
            layers: also keep the output of every decoder layer.
        """
        bundle = self._bundle
        bundle.model.eval()
        inputs: dict[str, Tensor] = {}
        outputs: list[Tensor] = []
        handles: list[RemovableHandle] = []
        try:
            for key, target in self.targets.items():
                linear = bundle.model.get_submodule(target.name)
                enough = None if layers else len(self.targets)
                handles.append(linear.register_forward_pre_hook(_keep_input(inputs, key, enough)))
            if layers:
                for index, layer in enumerate(bundle.decoder_layers):
                    last = index + 1 == bundle.num_layers
                    handles.append(layer.register_forward_hook(_keep_output(outputs, last)))
            arguments = {key: value for key, value in batch.items() if key != "labels"}
            with suppress(_SeenEnough):
                bundle.body(**arguments, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        missing = [key for key in self.targets if key not in inputs]
        if missing:
            raise AdapterError(
                f"model {bundle.info.name!r}: no input of {', '.join(missing[:3])} was seen in a "
                "forward pass",
                hint="leave linears that the model does not use out of adapter.target_modules",
            )
        return Observed({key: inputs[key] for key in self.targets}, tuple(outputs))


def _keep_input(
    store: dict[str, Tensor], key: str, enough: int | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        store[key] = args[0].detach()
        if len(store) == enough:
            raise _SeenEnough

    return hook


def _keep_output(store: list[Tensor], last: bool) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
        store.append((output[0] if isinstance(output, tuple) else output).detach())
        if last:
            raise _SeenEnough

    return hook
