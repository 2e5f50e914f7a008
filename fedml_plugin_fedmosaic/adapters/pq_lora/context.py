"""How an input gate learns which tokens are real, and what it said when the prompt was read.

A linear inside a decoder layer sees hidden states only. Hooks on the text tower put into one shared
:class:`ForwardContext` what the gate needs: the attention mask, and whether this forward pass reads
a prompt or continues one from a key-value cache.

The gate depends on the prompt alone while text is generated: with a cache, the gates of the pass
that filled it are kept beside it; without one, the tuner's ``_enable_peft_forward_hooks`` says how
long the prompt was. The released code averages over padding too, and takes the single new token's
gate when it continues from a cache, so that its tokens depend on the batch and on the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import AdapterError


class ForwardContext:
    """What the current forward pass of one model tells its input gates.

    Attributes:
        prompt_length: tokens that gates may look at, counted from the left; all when None.
    """

    def __init__(self) -> None:
        self.prompt_length: int | None = None
        self._mask: Tensor | None = None
        self._gates: dict[str, Tensor] = {}
        self._replay: dict[str, Tensor] | None = None
        # The same for all linears of a pass, so computed once per width of the batch and dtype.
        self._weights: dict[tuple[Any, ...], Tensor] = {}
        self._by_cache: MutableMapping[Any, dict[str, Tensor]] = WeakKeyDictionary()

    def begin(self, mask: Tensor | None, cache: Any) -> None:
        """A forward pass of the text tower starts.

        Args:
            mask: (batch, tokens) attention mask, or None.
            cache: the key-value cache that was passed in, or None.

        Raises:
            AdapterError: the mask is not two-dimensional, or the cache holds tokens that were read
                without this adapter.
        """
        self._gates, self._replay, self._mask, self._weights = {}, None, None, {}
        if cache is not None:
            if int(cache.get_seq_length()) > 0:
                self._replay = self._by_cache.get(cache)
                if self._replay is None:
                    raise AdapterError(
                        "this key-value cache was not filled through this adapter, so the input "
                        "gates of its prompt are unknown",
                        hint="start from an empty cache, or use the scalar gate",
                    )
                return
            self._by_cache[cache] = self._gates
        if mask is not None and mask.ndim != 2:
            raise AdapterError(
                "the input gate needs an attention mask (batch, tokens), got shape "
                f"{tuple(mask.shape)}",
                hint="use the default cache, or the scalar gate",
            )
        self._mask = mask

    def end(self, cache: Any) -> None:
        """The pass is over; ``cache`` is what it returned, which it may have made itself."""
        if cache is not None and self._replay is None:
            self._by_cache[cache] = self._gates

    def replayed(self, name: str) -> Tensor | None:
        """The gate that layer ``name`` had for the prompt, if this pass continues one."""
        return None if self._replay is None else self._replay.get(name)

    def remember(self, name: str, gate: Tensor) -> None:
        """Keeps a layer's gate for the passes that continue this prompt."""
        self._gates[name] = gate.detach()

    def token_weights(self, x: Tensor) -> Tensor:
        """Weights of the mean over real prompt tokens.

        Args:
            x: (batch, tokens, d_in).

        Returns:
            (batch, 1, tokens) in the dtype of ``x``; rows sum to 1, or to 0 without real tokens.

        Raises:
            AdapterError: the mask has another shape.
        """
        batch, tokens = x.shape[:2]
        key = (batch, tokens, x.dtype, x.device, self.prompt_length)
        if key in self._weights:
            return self._weights[key]
        if self._mask is not None and self._mask.shape != (batch, tokens):
            raise AdapterError(
                f"attention mask {tuple(self._mask.shape)} does not fit hidden states "
                f"{(batch, tokens)} (batch, tokens)"
            )
        mask = torch.ones(batch, tokens, device=x.device) if self._mask is None else self._mask
        real = mask.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        if self.prompt_length is not None and self.prompt_length < tokens:
            real = real.clone()
            real[:, self.prompt_length :] = 0
        weights = (real / real.sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)[:, None, :]
        self._weights[key] = weights
        return weights


class _Hook:
    """Callable instead of a closure, so that a deep copy of the model gets its own context."""

    def __init__(self, context: ForwardContext, names: tuple[str, ...]) -> None:
        self.context = context
        self.names = names


class BeforeForward(_Hook):
    """Forward pre-hook: reads mask and cache from the text tower's arguments."""

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See ``torch.nn.Module.register_forward_pre_hook``."""
        given = {**dict(zip(self.names[: len(args)], args, strict=True)), **kwargs}
        self.context.begin(given.get("attention_mask"), given.get("past_key_values"))


class AfterForward(_Hook):
    """Forward hook: finds a cache that the text tower made itself."""

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """See ``torch.nn.Module.register_forward_hook``."""
        self.context.end(getattr(output, "past_key_values", None))


def attach(context: ForwardContext, tower: nn.Module) -> list[Any]:
    """Registers both hooks on the text tower.

    Args:
        context: what the hooks fill.
        tower: the module that owns the decoder layers.

    Returns:
        Handles with a method ``remove``.
    """
    names = tuple(inspect.signature(tower.forward).parameters)
    return [
        tower.register_forward_pre_hook(BeforeForward(context, names), with_kwargs=True),
        tower.register_forward_hook(AfterForward(context, names)),
    ]
