"""A model whose next-token probabilities are mixed with those of a store of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fedml_plugin_fedmosaic.engine.processor import Processor
from fedml_plugin_fedmosaic.equations.knn import mixed_log_probabilities


class NeighbourMixture:
    """Answers like a Hugging Face model; ``logits`` are log-probabilities of the mixture.

    Args:
        model: returns ``hidden_states`` when asked; its last ones are the keys of the store.
        tensors: ``keys`` (n, d) and ``values`` (n,).
        options: ``lam``, ``k`` and ``scale``.
    """

    def __init__(
        self, model: Any, tensors: Mapping[str, Tensor], options: Mapping[str, float]
    ) -> None:
        self._model = model
        self._keys = tensors["keys"]
        self._values = tensors["values"]
        self._options = options

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        """Logits and cache of the model, the logits mixed."""
        output = self._model(**inputs, output_hidden_states=True)
        logits: Tensor = output.logits
        # With logits_to_keep there are fewer logits than positions: those of the last ones.
        hidden: Tensor = output.hidden_states[-1][:, -logits.shape[1] :]
        self._keys = self._keys.to(hidden.device)
        self._values = self._values.to(hidden.device)
        mixed = mixed_log_probabilities(
            logits.flatten(0, 1),
            hidden.flatten(0, 1),
            self._keys,
            self._values,
            lam=self._options["lam"],
            k=int(self._options["k"]),
            scale=self._options["scale"],
        )
        return SimpleNamespace(
            logits=mixed.view(logits.shape), past_key_values=output.past_key_values
        )


def mix_neighbours(
    model: Any,
    processor: Processor,  # noqa: ARG001 - what every mixer gets
    tensors: Mapping[str, Tensor],
    options: Mapping[str, float],
) -> NeighbourMixture:
    """The mixer ``knn``."""
    return NeighbourMixture(model, tensors, options)
