"""AdamW's moments as plain data by adapter key: reading them out of an optimizer, and back in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, Moments, OptimizerState


def collect_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[AdapterKey, nn.Parameter]
) -> dict[AdapterKey, Moments]:
    """Copies of the moments of every parameter that the optimizer has stepped, by sorted key."""
    found: dict[AdapterKey, Moments] = {}
    for key in sorted(parameters):
        state = optimizer.state.get(parameters[key])
        if state:
            first, second = (
                state[name].detach().to(device="cpu", dtype=torch.float32, copy=True)
                for name in ("exp_avg", "exp_avg_sq")
            )
            found[key] = Moments(step=int(state["step"]), first=first, second=second)
    return found


def load_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[AdapterKey, nn.Parameter],
    moments: OptimizerState,
) -> None:
    """Gives a fresh AdamW the moments of the parameters it trains; the others are left out.

    Raises:
        AdapterError: a tensor's moments have another shape than the tensor.
    """
    trained = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in parameters.items():
        saved = moments.get(key)
        if saved is None or id(parameter) not in trained:
            continue
        if saved.first.shape != parameter.shape or saved.second.shape != parameter.shape:
            raise AdapterError(
                f"moments of {key}: shapes {tuple(saved.first.shape)} and "
                f"{tuple(saved.second.shape)}, expected {tuple(parameter.shape)}",
                hint="moments must come from the same adapter structure",
            )
        device = parameter.device
        optimizer.state[parameter] = {
            "step": torch.tensor(float(saved.step), dtype=torch.float32, device=device),
            "exp_avg": saved.first.to(device=device, dtype=parameter.dtype, copy=True),
            "exp_avg_sq": saved.second.to(device=device, dtype=parameter.dtype, copy=True),
        }
