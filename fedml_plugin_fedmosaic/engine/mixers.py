"""Models whose logits are put together: ensembles of views, and the shelf of mixers.

Evaluation calls a model as Hugging Face's are called and reads ``logits`` and ``past_key_values``
of its output; whatever answers like that can be evaluated.

A member of the shelf is a function ``(model, processor, tensors, options) -> model`` with the
tensors and numbers of ``core.work.Served``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fedml_plugin_fedmosaic.adapters.base import InjectedAdapter
from fedml_plugin_fedmosaic.core.registry import Registry
from fedml_plugin_fedmosaic.core.types import View
from fedml_plugin_fedmosaic.engine.processor import Processor

MIXERS = Registry("mixers", {"knn": "fedml_plugin_fedmosaic.engine.knn:mix_neighbours"})

ModelMixer = Callable[[Any, Processor], Any]


def make_mixer(
    name: str, tensors: Mapping[str, Tensor], options: Mapping[str, float]
) -> ModelMixer | None:
    """The mixer that a client is served with; None for none.

    Raises:
        RegistryError: there is no such mixer.
    """
    if not name:
        return None
    build = MIXERS[name]
    return lambda model, processor: build(model, processor, tensors, options)


class Ensemble:
    """Adds the logits of the local and the global model; each has its own key-value cache.

    Args:
        model: runs the view that the adapter is in.
        adapter: chooses the view.
    """

    _VIEWS = (View.LOCAL, View.GLOBAL)

    def __init__(self, model: Any, adapter: InjectedAdapter) -> None:
        self._model = model
        self._adapter = adapter

    def __call__(self, *, past_key_values: Any = None, **inputs: Any) -> SimpleNamespace:
        """Logits and caches of both models."""
        caches = [None, None] if past_key_values is None else past_key_values.caches
        outputs = []
        for view, cache in zip(self._VIEWS, caches, strict=True):
            self._adapter.set_view(view)
            known = {} if cache is None else {"past_key_values": cache}
            outputs.append(self._model(**inputs, **known))
        return SimpleNamespace(
            logits=outputs[0].logits + outputs[1].logits,
            past_key_values=_Caches([output.past_key_values for output in outputs]),
        )


class _Caches:
    """The key-value caches of several models that see the same tokens."""

    def __init__(self, caches: list[Any]) -> None:
        self.caches = caches

    def reorder_cache(self, rows: Tensor) -> None:
        """Chooses rows of all caches."""
        for cache in self.caches:
            cache.reorder_cache(rows)
