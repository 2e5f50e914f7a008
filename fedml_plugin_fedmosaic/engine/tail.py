"""The end of a model: from the last feed-forward linear to the logits, whatever its family.

Behind the last ``down_proj`` lie a residual sum, perhaps a norm of its own (Gemma), the final
normalisation (RMSNorm with weight w or 1 + w, LayerNorm) and the head (bias, scale, soft cap). The
way back through the norms is taken by autograd over these few operations only; the head, where
nearly all the work is, has a closed form. Both are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.core.errors import IntegrationError
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.equations.head import HeadForm, head_gradient, head_logits

_PROBE_TOKENS = 5
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2


class ModelTail:
    """Gradients at the output of the last feed-forward linear.

    Args:
        bundle: a model with whole weights, in the view of the base model.

    Attributes:
        is_plain: whether that output is added to the residual stream as it is and the head has
            neither bias nor scale nor cap, as in Llama.

    Raises:
        IntegrationError: the model computes its logits in a way that is not known.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle
        head: Any = bundle.model.get_output_embeddings()
        self._bias: Tensor | None = getattr(head, "bias", None)
        self._form = HeadForm()
        with _frozen_probe(bundle) as probe:
            logits = bundle.model(**probe, use_cache=False).logits[0].float()
            _, written, normed, hidden = self._run(probe)
            self._form = self._find_form(logits, normed[0].detach())
            (ones,) = torch.autograd.grad(hidden, written, torch.ones_like(hidden))
            self.is_plain = (
                bool(torch.equal(ones, torch.ones_like(ones)))
                and self._bias is None
                and self._form == HeadForm()
            )

    def gradient(self, batch: Mapping[str, Tensor], labels: Tensor, supervised: Tensor) -> Tensor:
        """Gradient of the mean token loss w.r.t. the last feed-forward linear's weight.

        Args:
            batch: model inputs of ``(B, T)`` tokens.
            labels: ``(B, T - 1)``, the next token of each position but the last.
            supervised: ``(B, T - 1)`` bool, which of them count.

        Returns:
            float32 (float64 for a float64 model) ``(hidden size, intermediate size)``.
        """
        activations, written, normed, _ = self._run(batch)
        head = head_gradient(
            normed.detach()[:, :-1][supervised],
            self._bundle.lm_head,
            labels[supervised],
            self._bias,
            self._form,
        )
        incoming = torch.zeros_like(normed)
        incoming[:, :-1][supervised] = head.to(normed.dtype)
        (errors,) = torch.autograd.grad(normed, written, incoming)
        kept = activations[:, :-1][supervised].to(head.dtype)
        return errors[:, :-1][supervised].to(head.dtype).T @ kept

    def _run(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Activations into the linear, its output, and after and before the final norm.

        Only what follows the linear's output is recorded for autograd.
        """
        bundle = self._bundle
        seen: dict[str, Tensor] = {}

        def cut(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["in"], seen["out"] = args[0].detach(), output.detach().requires_grad_(True)
            return seen["out"]

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen["hidden"], seen["normed"] = args[0], output

        handles = [
            bundle.last_down_proj.register_forward_hook(cut),
            bundle.final_norm.register_forward_hook(keep),
        ]
        try:
            with torch.enable_grad():
                bundle.body(**batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen["in"], seen["out"], seen["normed"], seen["hidden"]

    def _find_form(self, expected: Tensor, normed: Tensor) -> HeadForm:
        """Scale and cap as the configuration names them, if the model really applies them."""
        config: Any = self._bundle.model.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divisor)
        cap = getattr(config, "final_logit_softcapping", None)
        named = HeadForm(scale=scale, cap=None if cap is None else float(cap))
        # Some image-text wrappers leave out what their text tower names.
        for form in (named, HeadForm()):
            got = head_logits(normed, self._bundle.lm_head, self._bias, form).to(expected.dtype)
            bound = _TOLERANCE.get(normed.dtype, _HALF_TOLERANCE)
            if float((got - expected).norm()) <= bound * float(expected.norm()):
                return form
        raise IntegrationError(
            f"model {self._bundle.info.name!r}: its logits are not its final "
            f"{type(self._bundle.final_norm).__name__} times its output embedding, with "
            f"{named}, so that the gradient of the sketches cannot be taken",
            hint="set sketch_args.sketch.proxy to another model",
        )


@contextmanager
def _frozen_probe(bundle: ModelBundle) -> Iterator[dict[str, Tensor]]:
    """A few tokens as model inputs, with the model in evaluation mode."""
    was_training = bundle.model.training
    bundle.model.eval()
    size = int(bundle.lm_head.shape[0])
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=bundle.device)[None] % max(size // 2, 1)
    try:
        with torch.no_grad():
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    finally:
        bundle.model.train(was_training)
