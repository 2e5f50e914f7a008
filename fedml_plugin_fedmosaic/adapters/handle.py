"""What all adapter handles have in common: strict reading and writing of named tensors."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import AdapterKey, AdapterState, Part, View


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLayer:
    """One linear's adapter as plain LoRA: ``y = base(x) + scaling * (B A x + bias)``.

    Attributes:
        A: (rank, d_in).
        B: (d_out, rank).
        bias: (d_out,), or None.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None


class AdapterHandle(ABC):
    """Base of the handles that the shelf's functions return.

    Args:
        model: the PEFT model; run it for forward passes.

    Attributes:
        model: the same.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = model

    @abstractmethod
    def parameters(self) -> dict[AdapterKey, nn.Parameter]:
        """All adapter tensors of the model, in no particular order."""

    @abstractmethod
    def plain(self, view: View) -> dict[str, PlainLayer]:
        """The adapter in one view as plain LoRA, by dotted name of the linear in the base model.

        Raises:
            AdapterError: the view is no fixed weight, or has no adapter.
        """

    @abstractmethod
    def shape(self) -> tuple[int, float]:
        """Rank and scaling (alpha / rank)."""

    def keys(self) -> tuple[AdapterKey, ...]:
        """All adapter tensors' keys, sorted."""
        return tuple(sorted(self.parameters()))

    def collect(self) -> dict[AdapterKey, Tensor]:
        """Detached float32 CPU copies of all adapter tensors, by sorted key."""
        tensors = self.parameters()
        return {
            key: tensors[key].detach().to(device="cpu", dtype=torch.float32, copy=True)
            for key in sorted(tensors)
        }

    def load(self, state: AdapterState) -> None:
        """Overwrites all adapter tensors; changes nothing if anything does not fit.

        Raises:
            AdapterError: a key is missing or unexpected, or a shape differs (all are listed).
        """
        tensors = self.parameters()
        check_state({key: tensor.shape for key, tensor in tensors.items()}, state)
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(state[key])

    def param_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Parameters that require gradients: ``ab`` (A, B) and ``pq`` (P, Q, gate).

        The released code trains its gate at the rate of A and B because of a misspelt name; here
        the gate belongs to ``pq``.
        """
        groups: dict[str, list[nn.Parameter]] = {"ab": [], "pq": []}
        tensors = self.parameters()
        for key in sorted(tensors):
            if tensors[key].requires_grad:
                groups["ab" if key.part in (Part.A, Part.B) else "pq"].append(tensors[key])
        return groups


def check_state(shapes: Mapping[AdapterKey, torch.Size], state: AdapterState) -> None:
    """Compares an adapter state with the shapes that a model's adapter has.

    Args:
        shapes: of all adapter tensors of the model.
        state: what is to be loaded.

    Raises:
        AdapterError: a key is missing or unexpected, or a shape differs (all are listed).
    """
    problems = [f"missing {key}" for key in sorted(shapes.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - shapes.keys())]
    problems += [
        f"{key}: expected shape {tuple(shapes[key])}, got {tuple(state[key].shape)}"
        for key in sorted(shapes.keys() & state.keys())
        if shapes[key] != state[key].shape
    ]
    raise_problems("adapter state does not fit the model", problems)


def raise_problems(what: str, problems: list[str], hint: str | None = None) -> None:
    """Raises one error that lists every problem; does nothing without problems.

    Raises:
        AdapterError: there is a problem.
    """
    if not problems:
        return
    raise AdapterError(
        "\n  ".join([f"{what}: {len(problems)} problem(s)", *problems]),
        hint=hint
        or "tensors must come from the same architecture, rank, blocks, gate and target modules",
    )


def wrap(model: Any, config: PeftConfig, adapter_name: str) -> Any:
    """``peft.get_peft_model`` without a warning that is not about this package's users.

    Args:
        model: the model; changed in place.
        config: PEFT configuration.
        adapter_name: PEFT name of the adapter.

    Returns:
        The PEFT model.
    """
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config, adapter_name=adapter_name)
