"""Base models of a rank group: under ZeRO stage 3 no rank ever holds all of the weights.

The model is built layer by layer inside ``deepspeed.zero.Init``, which keeps a piece of every
tensor; then each rank reads its own pieces, and nothing else, out of the safetensors files. No
weight is sent from rank to rank. (transformers' own loader lets the first rank read everything.)
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig
from transformers.utils import cached_file

from fedml_plugin_fedmosaic.config.sections import EngineConfig, ModelSpec, OptimConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError, IntegrationError
from fedml_plugin_fedmosaic.core.types import ProcessWorld
from fedml_plugin_fedmosaic.engine.deepspeed import open_deepspeed
from fedml_plugin_fedmosaic.engine.deepspeed_config import read_deepspeed_json, resolve_deepspeed
from fedml_plugin_fedmosaic.engine.deepspeed_world import GroupWorld
from fedml_plugin_fedmosaic.engine.models import (
    ModelBundle,
    Sharding,
    build_bundle,
    errors_named,
    load_model,
    model_class,
)
from fedml_plugin_fedmosaic.engine.places import model_folder

_MMAP_THRESHOLD = -3  # glibc's name of the option
_LARGE_BYTES = 1 << 18
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def check_sharded(name: str, spec: ModelSpec, engine: EngineConfig, optim: OptimConfig) -> None:
    """Finds what is wrong with a sharded model's configuration before any rank waits for another.

    Args:
        name: the model's name in the configuration.
        spec: of the model.
        engine: names DeepSpeed's JSON configuration.
        optim: must agree with it.

    Raises:
        ConfigError: DeepSpeed is not installed, or its configuration is missing or does not fit.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"model {name!r} is trained with DeepSpeed, which is not installed",
            hint="pip install 'fedml-plugin-fedmosaic[deepspeed]'",
        )
    _resolve(name, spec, engine, optim, hidden_size=1, ranks=spec.ranks)


def _resolve(
    name: str,
    spec: ModelSpec,
    engine: EngineConfig,
    optim: OptimConfig,
    *,
    hidden_size: int,
    ranks: int,
) -> dict[str, Any]:
    if engine.deepspeed is None:
        raise ConfigError(
            f"model {name!r} is trained with DeepSpeed on {ranks} rank(s), but "
            "engine_args.deepspeed names no configuration",
            hint="start from configs/deepspeed/zero3.json",
        )
    return resolve_deepspeed(
        read_deepspeed_json(engine.deepspeed),
        optim=optim,
        spec=spec,
        hidden_size=hidden_size,
        ranks=ranks,
        path=engine.deepspeed,
    )


def load_sharded_model(
    name: str,
    spec: ModelSpec,
    device: torch.device,
    *,
    world: ProcessWorld,
    engine: EngineConfig,
    optim: OptimConfig,
) -> ModelBundle:
    """Loads a base model for the ranks of a group; all of them call it.

    Args:
        name: the model's name in the configuration.
        spec: as for ``load_model``; safetensors files only.
        device: of this rank.
        world: the group.
        engine: names DeepSpeed's JSON configuration.
        optim: fills its "auto" values.

    Returns:
        The bundle; its ``sharding`` is set. Under stages 1 and 2 the weights are whole.

    Raises:
        ConfigError: no such model, files are missing or damaged, DeepSpeed is not installed, or
            its configuration does not fit.
        CommError: the ranks cannot meet.
    """
    source = model_folder(name, spec)
    with errors_named(name, spec.path):
        loader, _ = model_class(source)
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    width = int(config.get_text_config().hidden_size)
    resolved = _resolve(name, spec, engine, optim, hidden_size=width, ranks=world.size)
    group = GroupWorld(world, device, engine.collective_timeout_s)
    deepspeed = open_deepspeed(group)
    if resolved["zero_optimization"]["stage"] < 3:
        bundle = load_model(name, spec, device)
    else:
        _give_memory_back()
        with errors_named(name, spec.path):
            model = _build(loader, config, spec, deepspeed, group, resolved)
            load_pieces(model, source, name, group.rank)
        model.requires_grad_(False)
        model.eval()
        bundle = build_bundle(name, spec, model, source, device)
    bundle.sharding = Sharding(group=group, config=resolved)
    return bundle


def _give_memory_back() -> None:
    """Lets the C library return large blocks as soon as they are freed, from now on.

    Whole tensors come and go while pieces and activations stay. From one heap, each small block
    in the hole of a whole tensor keeps that hole open, and the process grows to the whole model.
    glibc serves large blocks one by one if it is told to; other C libraries are left alone.
    """
    libc: Any = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def _build(
    loader: Any,
    config: Any,
    spec: ModelSpec,
    deepspeed: Any,
    group: GroupWorld,
    resolved: Mapping[str, Any],
) -> Any:
    """A model whose parameters are cut as soon as each of its layers is made."""
    try:
        from transformers.initialization import no_init_weights
        from transformers.integrations.deepspeed import prevent_arange_dtype_change
    except ImportError as error:
        raise IntegrationError(
            f"the installed transformers cannot build a sharded model: {error}",
            hint="pip install --upgrade 'transformers>=5.0,<6'",
        ) from error
    before = functional.linear
    with ExitStack() as stack:
        stack.enter_context(group.environment())
        stack.enter_context(no_init_weights())
        stack.enter_context(prevent_arange_dtype_change())
        # DeepSpeed replaces torch's linear for good; other models of this process keep theirs.
        stack.callback(setattr, functional, "linear", before)
        stack.enter_context(deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(dict(resolved))))
        return loader.from_config(config, dtype=getattr(torch, spec.dtype))


def load_pieces(model: Any, source: str, name: str, rank: int) -> None:
    """Fills this rank's piece of every parameter from the checkpoint's files.

    Args:
        model: built inside ``deepspeed.zero.Init``.
        source: folder, or hub id in the local cache.
        name: the model's name, for messages.
        rank: this process inside its group.

    Raises:
        ConfigError: weights are missing, have another shape, or are stored in a form that must be
            computed while loading.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    known = dict.fromkeys((*parameters, *buffers), True)
    filled: set[int] = set()
    problems: list[str] = []
    for file in _files(source):
        with safe_open(file, framework="pt", device="cpu") as handle:
            for key, target in _renamed(model, handle.keys(), known, name):
                if target in parameters:
                    stored = handle.get_slice(key)
                    problem = _fill_piece(parameters[target], stored, rank)
                    filled.add(id(parameters[target]))
                    if problem:
                        problems.append(f"{target}: {problem}")
                elif target in buffers:
                    buffers[target].copy_(handle.get_tensor(key))
    missing = [key for key, value in parameters.items() if id(value) not in filled]
    if missing or problems:
        problems += [f"{key}: missing" for key in missing]
        raise ConfigError(
            f"model {name!r}: expected all weights of its configuration, {len(problems)} are "
            f"missing or of another shape, e.g. {problems[0]}",
            hint="the checkpoint is incomplete or belongs to another config.json",
        )


def _files(source: str) -> list[str]:
    """The safetensors files of a checkpoint."""

    def path(file: str, *, required: bool) -> str | None:
        folder = Path(source)
        if folder.is_dir():
            found = folder / file
            if found.is_file() or required:
                return str(found)
            return None
        cached: str | None = cached_file(
            source,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=required,
        )
        return cached

    index = path(_INDEX, required=False)
    if index is None:
        return [str(path(_SINGLE, required=True))]
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return [str(path(file, required=True)) for file in sorted(set(names))]


def _renamed(
    model: Any, keys: list[str], known: Mapping[str, bool], name: str
) -> Iterator[tuple[str, str]]:
    """Checkpoint keys with the names that the model's own tensors have.

    Raises:
        ConfigError: a tensor is made of several stored ones.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for key in keys:
        target, converted = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if target not in known and key in known:
            target = key
        elif converted is not None:
            raise ConfigError(
                f"model {name!r}: {key} is stored in a form that transformers converts while "
                "loading, which a rank cannot do with its piece alone",
                hint="load the model once and save it with save_pretrained, or use ZeRO stage 2",
            )
        yield key, target


def _fill_piece(parameter: nn.Parameter, stored: Any, rank: int) -> str | None:
    """Reads this rank's elements only; returns what is wrong."""
    partitioned: Any = parameter
    shape = tuple(int(size) for size in stored.get_shape())
    if shape != tuple(partitioned.ds_shape):
        return f"expected shape {tuple(partitioned.ds_shape)}, got {shape}"
    piece = partitioned.ds_tensor
    start = rank * piece.ds_numel
    stop = min(start + piece.ds_numel, math.prod(shape))
    if start < stop:
        piece.view(-1)[: stop - start].copy_(read_elements(stored, start, stop))
    return None


def read_elements(stored: Any, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of a flattened tensor in a file, reading whole rows only.

    Args:
        stored: a safetensors slice.
        start: first element.
        stop: end, more than ``start``.

    Returns:
        ``(stop - start,)`` in the file's dtype.
    """
    shape = stored.get_shape()
    if not shape:
        whole: Tensor = stored[...]
        return whole.reshape(1)
    row = math.prod(shape[1:])
    first, last = start // row, -(-stop // row)
    rows: Tensor = stored[first:last]
    return rows.reshape(-1)[start - first * row : stop - first * row]


__all__ = ["load_pieces", "load_sharded_model", "read_elements"]
