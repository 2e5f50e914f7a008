"""Depth cuts: a smaller model from a larger one, by leaving decoder layers out.

A run of consecutive layers is taken out where the residual stream turns least: the one whose input
and output have the largest mean cosine over the tokens of some sample texts. The first and the
last layer stay.

Source: Gromov et al. 2024 (arXiv 2403.17887), who measure the angle; the order is the same.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine.derived import MANIFEST, derived_folder, no_progress_bars
from fedml_plugin_fedmosaic.engine.parts import decoder_layers

LOG = logging.getLogger(__name__)

SAMPLE_TEXTS: tuple[str, ...] = (
    "The river rises in the hills above the town and reaches the sea after forty kilometres.",
    "She opened the window, listened to the rain for a while, and went back to her letters.",
    "Shares of the company fell by six per cent after it lowered its forecast for the year.",
    "To make the dough, mix flour, salt and yeast, add warm water, and knead it for ten minutes.",
    "The home side scored twice in the last five minutes and won the match by three goals to two.",
    "A triangle with sides of three, four and five units has a right angle.",
    "Scientists found that the new material carries electricity without loss at low temperature.",
    "The film is far too long, the jokes are old, and nobody in it seems to enjoy being there.",
    "If the train is late again tomorrow, I will take the bus and walk the rest of the way.",
    "The council met on Tuesday to discuss the bridge, but put off its decision until spring.",
    "def add(a, b):\n    return a + b",
    "What a wonderful little restaurant: friendly people, fair prices, and the best soup in town.",
)
"""What the choice of layers and the report's loss are measured on, unless a text is given."""
_MAX_TOKENS = 256
_LEFT_OUT = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "align*", MANIFEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutReport:
    """What a depth cut costs.

    Attributes:
        kept: 0-based layers that stay.
        layers: before the cut.
        parameters: before and after.
        loss: mean token loss on the texts in nats, before and after.
        tokens: how many tokens that is.
    """

    kept: tuple[int, ...]
    layers: int
    parameters: tuple[int, int]
    loss: tuple[float, float]
    tokens: int


@no_progress_bars()
def cut_model(
    name: str, source: Path, keep: int, out: Path, texts: Sequence[str] = SAMPLE_TEXTS
) -> CutReport:
    """Writes a model with fewer decoder layers, in the source's dtype.

    Args:
        name: for errors.
        source: model folder.
        keep: decoder layers that stay, at least 2 unless the model keeps all.
        out: folder to write; made if needed.
        texts: decide which layers go.

    Raises:
        ConfigError: the model has fewer layers, or its layers cannot be found.
    """
    from fedml_plugin_fedmosaic.engine.models import model_class
    from fedml_plugin_fedmosaic.engine.places import errors_named

    with errors_named(name, str(source)):
        loader, _ = model_class(str(source))
        model = loader.from_pretrained(source, local_files_only=True, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    count = int(config.get_text_config().num_hidden_layers)
    check_keep(name, keep, count)
    rows = _rows(tokenizer, texts)
    layers = decoder_layers(model.get_decoder(), count, name)
    before, states = _observe(model, layers, rows)
    kept = kept_layers(states, keep)
    prefix = next(key for key, module in model.named_modules() if module is layers)
    _shorten(config, kept)
    small = loader.from_config(config, dtype=model.dtype).eval()
    small.load_state_dict(_renumbered(model.state_dict(), prefix, kept), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    small.save_pretrained(out)
    short = decoder_layers(small.get_decoder(), keep, name)
    return CutReport(
        kept=kept,
        layers=count,
        parameters=(_size(model), _size(small)),
        loss=(before, _observe(small, short, rows)[0]),
        tokens=sum(row.shape[1] - 1 for row in rows),
    )


def cut_folder(name: str, source: Path, keep: int) -> Path:
    """The cached depth cut of a model folder; made on first use from :data:`SAMPLE_TEXTS`.

    Raises:
        ConfigError: the model has fewer layers, or its layers cannot be found.
    """
    weights = sorted(path for path in source.iterdir() if path.suffix == ".safetensors")
    stats = [path.stat() for path in weights]
    content: dict[str, Any] = {
        "cut_of": str(source.resolve()),
        "keep": keep,
        "weights": [
            [path.name, stat.st_size, stat.st_mtime_ns]
            for path, stat in zip(weights, stats, strict=True)
        ],
        "texts": hashlib.blake2b("\n".join(SAMPLE_TEXTS).encode(), digest_size=5).hexdigest(),
    }

    def build(folder: Path) -> Mapping[str, Any]:
        LOG.info("model %s: cutting %s to %d layers once, into the cache", name, source.name, keep)
        return {"report": asdict(cut_model(name, source, keep, folder))}

    return derived_folder(f"{source.name}-{keep}layers", content, build)


def check_keep(name: str, keep: int, count: int) -> None:
    """Checks that so many layers can be kept.

    Raises:
        ConfigError: the model has fewer, or only the first or the last would stay.
    """
    if keep > count or (keep < 2 and keep != count):
        raise ConfigError(
            f"model {name!r} has {count} decoder layers; expected to keep 2 to {count} of them, "
            f"got {keep}",
            hint="correct the number of layers",
        )


def kept_layers(states: Sequence[Tensor], keep: int) -> tuple[int, ...]:
    """Layers that stay when the run that turns the residual stream least is taken out.

    Args:
        states: the residual stream before each layer and after the last, each ``(n, d)``.
        keep: how many layers stay; at least 2, or all.

    Returns:
        Ascending 0-based layers; the first run wins a tie.
    """
    count = len(states) - 1
    gone = count - keep
    if gone == 0:
        return tuple(range(count))
    cosines = [
        float(torch.cosine_similarity(states[at].double(), states[at + gone].double(), -1).mean())
        for at in range(1, count - gone)
    ]
    start = 1 + max(range(len(cosines)), key=cosines.__getitem__)
    return tuple(index for index in range(count) if not start <= index < start + gone)


def _rows(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    rows = [torch.tensor([tokenizer.encode(text)[:_MAX_TOKENS]]) for text in texts]
    rows = [row for row in rows if row.shape[1] > 1]
    if not rows:
        raise ConfigError("the texts of a depth cut hold no token", hint="give a longer text")
    return rows


@torch.inference_mode()
def _observe(
    model: Any, layers: nn.ModuleList, rows: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """Mean token loss in nats, and the residual stream around every layer."""
    seen: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def keep_input(slot: int) -> Any:
        return lambda _module, args: seen[slot].append(args[0][0])

    def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
        seen[-1].append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.register_forward_pre_hook(keep_input(k)) for k, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(keep_output))
    total, tokens = 0.0, 0
    try:
        for row in rows:
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
            total, tokens = total + float(loss), tokens + row.shape[1] - 1
    finally:
        for handle in handles:
            handle.remove()
    return total / tokens, [torch.cat(states) for states in seen]


def _shorten(config: Any, kept: Sequence[int]) -> None:
    """Sets the depth, and cuts every per-layer list of the text configuration alike."""
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    for field, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, field, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)


def _renumbered(state: Mapping[str, Tensor], prefix: str, kept: Sequence[int]) -> dict[str, Tensor]:
    new = {str(old): str(index) for index, old in enumerate(kept)}
    result = {}
    for key, tensor in state.items():
        if not key.startswith(f"{prefix}."):
            result[key] = tensor
            continue
        layer, _, rest = key.removeprefix(f"{prefix}.").partition(".")
        if layer in new:
            result[f"{prefix}.{new[layer]}.{rest}"] = tensor
    return result


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
