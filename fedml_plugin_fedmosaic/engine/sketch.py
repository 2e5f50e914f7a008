"""What a client tells about its data: the sanitised gradient of a frozen proxy model.

Source: FedMosaic (arXiv 2506.11024), relevance-guided aggregation. The gradient depends on the
samples only, never on the client's own weights. The released code takes it inside the training
loop, from one sample at an irregular schedule; here it is one forward pass per scheduled update,
and both the schedule and the choice of samples can be set to the released ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedml_plugin_fedmosaic.config.sections import SketchConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.rng import torch_generator
from fedml_plugin_fedmosaic.core.types import View
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.prompt import IGNORE
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.tail import ModelTail
from fedml_plugin_fedmosaic.equations.gradient import (
    ColumnProjection,
    column_projection,
    compress,
    kept_rows,
    last_down_proj_gradient,
    sanitise,
    sketch_updates,
)
from fedml_plugin_fedmosaic.equations.relevance import Similarity, unit_columns


class SketchEngine:
    """Computes sketches with one proxy model that all clients share.

    The proxy may be a model that clients train at the same time: its adapter is then switched off
    for the computation (engines choose their view anew whenever they run).

    Args:
        bundle: proxy model.
        config: schedule, samples, sanitisation.
        seed: root seed of the run; rows and column projection follow from it, so that the
            sketches of all clients can be compared.
        grad_accumulation: micro-batches per update; matters for the ``official`` schedule only.

    Attributes:
        shape: rows and columns of a sketch, before it is compressed to ``config.floats``.

    Raises:
        ConfigError: an option does not fit the proxy model.
        IntegrationError: the proxy's logits cannot be explained by its output embedding.
    """

    def __init__(
        self, bundle: ModelBundle, config: SketchConfig, seed: int, *, grad_accumulation: int = 1
    ) -> None:
        self._bundle = bundle
        self._config = config
        self._seed = seed
        self._grad_accumulation = grad_accumulation
        width, inner = _shape(bundle.last_down_proj)
        self._rows = kept_rows(width, config.row_fraction, config.rows, seed)
        self._projection = (
            None if config.columns is None else column_projection(inner, config.columns, seed)
        )
        self.shape = (len(self._rows), config.columns or inner)
        self._vector = self._vector_projection()
        if bundle.adapter is not None:
            bundle.adapter.set_view(View.BASE)
        self._tail = ModelTail(bundle)
        self._is_plain = self._tail.is_plain and self._has_plain_norm(width)
        if config.jacobian == "diagonal" and not self._is_plain:
            raise ConfigError(
                f"sketch.jacobian is diagonal, which is for models that end like Llama; model "
                f"{bundle.info.name!r} ends with a {type(bundle.final_norm).__name__}",
                hint="set sketch_args.sketch.jacobian: exact",
            )

    def compute(
        self, batches: Sequence[Sequence[Sample]], *, client_id: int, round_idx: int
    ) -> Tensor:
        """The mean of the sanitised gradients of a round.

        Args:
            batches: samples of each optimizer step of the round.
            client_id: for the noise.
            round_idx: for the noise.

        Returns:
            float32 ``(rows, columns)`` on the CPU; zeros without batches.

        Raises:
            DataError: a sample cannot be encoded or has no answer.
        """
        total = torch.zeros(self.shape)
        if not batches:
            return total
        config = self._config
        updates = sketch_updates(
            len(batches), config.frequency, config.schedule, self._grad_accumulation
        )
        for update in updates:
            batch = batches[update - 1]
            gradient = self.gradient(batch if config.samples == "update" else batch[-1:])
            total += sanitise(
                gradient,
                rows=self._rows,
                clip_norm=config.clip_norm,
                noise=config.noise,
                noise_std=config.noise_std,
                generator=torch_generator(self._seed, "sketch_noise", client_id, round_idx, update),
                projection=self._projection,
            ).to("cpu", torch.float32)
        return total / len(updates)

    def share(self, average: Tensor, similarity: Similarity = "columns") -> Tensor:
        """What of a running average leaves the client.

        With ``config.floats`` it is one column, a random projection of the flattened sketch with a
        seed that all clients share. The cosine of two of these, which is their column similarity
        as well as their flat similarity, estimates the similarity of the two sketches, with an
        error of about ``floats ** -0.5``. Columns that are 0, which there are none of with noise,
        are divided out instead of counting as cosine 0.

        Args:
            average: float32 ``(rows, columns)`` as of :meth:`compute`, smoothed over rounds.
            similarity: the similarity to be estimated.

        Returns:
            ``average`` itself, or float32 ``(config.floats, 1)``.
        """
        if self._vector is None:
            return average
        flat = unit_columns(average) if similarity == "columns" else average.reshape(1, -1)
        return compress(flat, self._vector).reshape(-1, 1)

    def _vector_projection(self) -> ColumnProjection | None:
        rows, columns = self.shape
        floats = self._config.floats
        if floats is None:
            return None
        if floats > rows * columns:
            raise ConfigError(
                f"sketch.floats is {floats}, but a sketch of model {self._bundle.info.name!r} has "
                f"only {rows} x {columns} entries",
                hint=f"set sketch_args.sketch.floats to at most {rows * columns}, or leave it out",
            )
        return column_projection(rows * columns, floats, self._seed)

    @torch.no_grad()
    def gradient(self, samples: Sequence[Sample]) -> Tensor:
        """Gradient of the samples' mean token loss w.r.t. the last ``down_proj`` weight.

        Returns:
            float32 ``(hidden size, intermediate size)`` on the model's device.
        """
        bundle = self._bundle
        if bundle.adapter is not None:
            bundle.adapter.set_view(View.BASE)
        bundle.model.eval()
        batch, _, _ = bundle.processor.encode_supervised(samples)
        labels = batch.pop("labels")[:, 1:]
        supervised = labels != IGNORE
        if not self._is_plain:
            return self._tail.gradient(batch, labels, supervised)
        with _inputs_of(bundle.last_down_proj, bundle.final_norm) as seen:
            bundle.body(**batch, use_cache=False)
        activations, hidden = (value[:, :-1][supervised] for value in seen)
        return last_down_proj_gradient(
            activations,
            hidden,
            _weight(bundle.final_norm),
            bundle.norm_eps or 0.0,
            bundle.lm_head,
            labels[supervised],
            self._config.jacobian,
        )

    @torch.inference_mode()
    def _has_plain_norm(self, width: int) -> bool:
        """Whether the final norm is ``x * rsqrt(mean(x^2) + eps) * weight``, without autograd."""
        norm, weight = self._bundle.final_norm, _weight(self._bundle.final_norm)
        eps = self._bundle.norm_eps
        if eps is None:
            return False
        x = torch.linspace(-1.0, 2.0, width, device=weight.device)[None, None].to(weight.dtype)
        expected = x.float() * torch.rsqrt(x.float().square().mean() + eps) * weight.float()
        return bool(torch.allclose(norm(x).float(), expected, rtol=2e-2, atol=1e-3))


def _shape(module: nn.Module) -> tuple[int, int]:
    """Output and input width of a linear, also if it is wrapped or its weight is packed."""
    linear: Any = module if isinstance(module, nn.Linear) else module.get_submodule("base_layer")
    return int(linear.out_features), int(linear.in_features)


def _weight(module: nn.Module) -> Tensor:
    """Weight of a layer, also while an adapter wraps it."""
    weight = module.get_parameter("weight") if "weight" in module._parameters else None
    return _weight(module.get_submodule("base_layer")) if weight is None else weight


@contextmanager
def _inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Records the first input of each module during one forward pass, in the given order."""
    seen: list[Tensor] = [torch.empty(0)] * len(modules)

    def recorder(slot: int) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[slot] = args[0].detach()

        return hook

    handles = [
        module.register_forward_pre_hook(recorder(slot))  # type: ignore[arg-type]
        for slot, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
