"""The alignment of the bundled models: closed forms for models whose tokens correspond.

See ``equations.alignment``. It keeps ``(d, d)`` moments, so it is for small models only; others are
aligned by ``runtime.aligner``. One safetensors file per model; keys ``<block>/<module>/A``
(r, d_in) and ``<block>/<module>/B`` (d_out, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.equations.alignment import (
    explained_fraction,
    leading_directions,
    nearest_row_orthonormal,
    ridge,
)
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers
from fedml_plugin_fedmosaic.runtime.alignment_files import Alignment

FILE_NAME = "alignment.safetensors"


class _Observer:
    """Keeps inputs and outputs of the linears at block ends for one forward pass."""

    def __init__(self, bundle: ModelBundle, modules: Sequence[str], num_blocks: int) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        ends = block_end_layers(bundle.num_layers, num_blocks)
        for block, layer in enumerate(ends):
            found = dict(bundle.decoder_layers[layer].named_modules())
            by_short_name = {
                name.rpartition(".")[2]: module
                for name, module in found.items()
                if isinstance(module, nn.Linear)
            }
            for name in modules:
                if name not in by_short_name:
                    raise AdapterError(
                        f"model {bundle.info.name!r}: layer {layer} has no linear {name!r}; "
                        f"it has {', '.join(sorted(by_short_name))}"
                    )
                self._watch(f"{block}/{name}", by_short_name[name])

    def _watch(self, key: str, linear: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[key] = args[0].detach()
            self.outputs[key] = output.detach()

        self._handles.append(linear.register_forward_hook(hook))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _add(store: dict[str, Tensor], key: str, value: Tensor) -> None:
    store[key] = store[key] + value if key in store else value


def align_models(
    anchor: ModelBundle,
    others: Sequence[ModelBundle],
    batches: Sequence[Sequence[Sample]],
    *,
    rank: int,
    num_blocks: int,
    modules: Sequence[str],
) -> tuple[dict[str, Alignment], dict[str, dict[str, float]]]:
    """Aligned factors for an anchor and other models that share its tokenizer.

    Args:
        anchor: the model whose coordinates all others take.
        others: models to align; their token positions must correspond to the anchor's.
        batches: public samples.
        rank: adapter rank r.
        num_blocks: blocks N_B.
        modules: short names of the adapted linears.

    Returns:
        Model name -> factors, and model name -> explained fraction per ``<block>/<module>/A|B``.

    Raises:
        AdapterError: a model lacks a module, or token positions do not correspond.
    """
    bundles = [anchor, *others]
    observers = [_Observer(bundle, modules, num_blocks) for bundle in bundles]
    moments: dict[str, Tensor] = {}
    try:
        for batch in batches:
            masks = []
            for bundle in bundles:
                inputs = bundle.processor.encode_train(batch)
                masks.append(inputs["attention_mask"].bool())
                with torch.no_grad():
                    bundle.model(**{k: v for k, v in inputs.items() if k != "labels"})
            if any(mask.shape != masks[0].shape or (mask != masks[0]).any() for mask in masks):
                raise AdapterError(
                    "the models to align do not cut the samples into the same tokens",
                    hint="this closed form needs models with one tokenizer",
                )
            for bundle, observer in zip(bundles, observers, strict=True):
                _accumulate(moments, bundle, observer, anchor, observers[0], masks[0])
    finally:
        for observer in observers:
            observer.close()
    return _solve(moments, anchor, others, rank)


def _accumulate(
    moments: dict[str, Tensor],
    bundle: ModelBundle,
    observer: _Observer,
    anchor: ModelBundle,
    anchor_observer: _Observer,
    mask: Tensor,
) -> None:
    name = bundle.info.name
    for key in observer.inputs:
        x, y = observer.inputs[key][mask].double(), observer.outputs[key][mask].double()
        _add(moments, f"{name}|xx|{key}", x.T @ x)
        _add(moments, f"{name}|yy|{key}", y.T @ y)
        if bundle is not anchor:
            x_s = anchor_observer.inputs[key][mask].double()
            y_s = anchor_observer.outputs[key][mask].double()
            _add(moments, f"{name}|xs|{key}", x.T @ x_s)
            _add(moments, f"{name}|sy|{key}", y_s.T @ y)


def _solve(
    moments: Mapping[str, Tensor], anchor: ModelBundle, others: Sequence[ModelBundle], rank: int
) -> tuple[dict[str, Alignment], dict[str, dict[str, float]]]:
    source = anchor.info.name
    keys = [key.split("|")[2] for key in moments if key.startswith(f"{source}|xx|")]
    factors: dict[str, Alignment] = {source: {}}
    quality: dict[str, dict[str, float]] = {source: {}}
    for key in keys:
        for part, moment in (("A", "xx"), ("B", "yy")):
            second = moments[f"{source}|{moment}|{key}"]
            rows = leading_directions(second, rank)
            quality[source][f"{key}/{part}"] = float(
                ((rows @ second) * rows).sum() / second.diagonal().sum()
            )
            factors[source][f"{key}/{part}"] = rows if part == "A" else rows.T
    for bundle in others:
        name = bundle.info.name
        factors[name], quality[name] = {}, {}
        for key in keys:
            a_s, b_s = factors[source][f"{key}/A"], factors[source][f"{key}/B"]
            second, cross = moments[f"{name}|xx|{key}"], moments[f"{name}|xs|{key}"] @ a_s.T
            power = ((a_s @ moments[f"{source}|xx|{key}"]) * a_s).sum()
            rows = ridge(second, cross)
            quality[name][f"{key}/A"] = explained_fraction(rows, second, cross, power)
            factors[name][f"{key}/A"] = nearest_row_orthonormal(rows)
            # y_g regressed on y_s (d_g, d_s); its images of B_s's columns, made orthonormal.
            second, cross = moments[f"{source}|yy|{key}"], moments[f"{name}|sy|{key}"]
            mapped = ridge(second, cross)
            power = moments[f"{name}|yy|{key}"].diagonal().sum()
            quality[name][f"{key}/B"] = explained_fraction(mapped, second, cross, power)
            factors[name][f"{key}/B"] = nearest_row_orthonormal((mapped @ b_s).T).T
    single = {
        name: {key: value.float().contiguous() for key, value in entries.items()}
        for name, entries in factors.items()
    }
    return single, quality


def save_alignment(folder: Path, factors: Alignment) -> Path:
    """Writes one model's factors into its folder."""
    path = folder / FILE_NAME
    save_file(factors, path)
    return path
