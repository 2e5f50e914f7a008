"""DeepSpeed's JSON configuration: read as it is, "auto" filled, contradictions refused.

What a run's own sections say (batch size, accumulation, clipping, learning rates, dtype) is the
truth for every client, sharded or not. A JSON file may leave these keys out, say ``"auto"``, or
repeat the same values; another value is an error, because the sharded client would then train
differently from all others without anyone noticing. Everything else in the file (stage, offload,
bucket sizes, communication) goes to DeepSpeed untouched.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.config.sections import ModelSpec, OptimConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError

AUTO = "auto"
STAGES = (1, 2, 3)

_BETAS = [0.9, 0.999]
_EPS = 1e-8
_ADAMW = ("adamw", "adam")
_QUIET = 2**31 - 1

# Ways of cutting weights or batches that this package's loading and dealing know nothing of.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "amp.enabled": (False,),
    "managed_gradient_accumulation": (True,),
    "sequence_parallel_size": (1,),
    "tensor_parallel.autotp_size": (0, 1),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_weights": (False,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
    "zero_optimization.mics_shard_size": (-1,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealing:
    """How the samples of one optimizer step are dealt over the ranks of a group.

    Attributes:
        total: samples of one optimizer step, as for an unsharded client.
        micro: samples of one micro-batch on one rank, at most.
        steps: micro-batches of one optimizer step on every rank.
    """

    total: int
    micro: int
    steps: int


def deal(optim: OptimConfig, ranks: int) -> Dealing:
    """The dealing of ``batch_size * grad_accumulation`` samples over the ranks.

    A micro-batch never holds more samples than ``batch_size``, so a rank needs no more memory for
    activations than an unsharded client.
    """
    total = optim.batch_size * optim.grad_accumulation
    share = math.ceil(total / ranks)
    micro = min(optim.batch_size, share)
    return Dealing(total=total, micro=micro, steps=math.ceil(share / micro))


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """Reads a DeepSpeed configuration.

    Raises:
        ConfigError: no such file, no JSON, a key twice, or not an object.
    """
    where = f"engine_args.deepspeed: {path}"
    hint = "ready files are in configs/deepspeed: zero2.json, zero3.json, zero3_offload.json"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{where}: expected a JSON file, got: {reason}", hint=hint) from error
    try:
        document = json.loads(text, object_pairs_hook=_no_key_twice)
    except (json.JSONDecodeError, ValueError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}", hint=hint) from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{where}: expected a JSON object, got {type(document).__name__}", hint=hint
        )
    return document


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def resolve_deepspeed(
    document: Mapping[str, Any],
    *,
    optim: OptimConfig,
    spec: ModelSpec,
    hidden_size: int,
    ranks: int,
    path: str,
) -> dict[str, Any]:
    """A complete configuration for ``deepspeed.initialize``.

    "auto" bucket sizes follow from the hidden size as in transformers' own integration
    (``transformers.integrations.deepspeed``): ``h^2``, ``0.9 h^2`` and ``10 h``.

    Args:
        document: what :func:`read_deepspeed_json` returned; it is not changed.
        optim: local training.
        spec: the model; its dtype decides between bf16, fp16 and fp32.
        hidden_size: width of the text tower.
        ranks: ranks of the group.
        path: the file, for messages.

    Returns:
        A new mapping without "auto", without the sections ``optimizer`` and ``scheduler``: AdamW
        with two learning rates and the schedule of ``optim`` take their place.

    Raises:
        ConfigError: a key contradicts the run's configuration, is not supported, or is "auto"
            and unknown; all problems of the file are listed.
    """
    filler = _Filler(copy.deepcopy(dict(document)))
    _fill_batches(filler, optim, ranks)
    _fill_precision(filler, spec)
    _check_optimizer(filler, optim)
    _check_scheduler(filler, optim)
    _fill_zero(filler, hidden_size)
    for key, allowed in _REFUSED.items():
        value = filler.get(key)
        if value is not None and value not in allowed:
            filler.problems.append(f"{key}: {value!r} is not supported here; leave it out")
    filler.default("steps_per_print", _QUIET)
    # Every group trains AdamW as torch computes it; DeepSpeed's own CPU kernel is compiled on use.
    filler.put("zero_force_ds_cpu_optimizer", False)
    filler.put("zero_allow_untested_optimizer", True)
    filler.problems += [
        f'{key}: "auto" cannot be filled in here; give a value or leave it out'
        for key in _autos(filler.document)
    ]
    if filler.problems:
        raise ConfigError(
            "\n  ".join([f"engine_args.deepspeed: {path}:", *filler.problems]),
            hint='write "auto" for what the run\'s own configuration decides',
        )
    return filler.document


class _Filler:
    """A JSON document by dotted keys, and what is wrong with it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        node: Any = self.document
        for part in key.split("."):
            if not isinstance(node, dict):
                return None
            node = node.get(part)
        return node

    def put(self, key: str, value: Any) -> None:
        *parents, last = key.split(".")
        node = self.document
        for part in parents:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                self.problems.append(f"{key.rpartition('.')[0]}: expected an object, got {child!r}")
                return
            node = child
        node[last] = value

    def default(self, key: str, value: Any) -> None:
        if self.get(key) in (None, AUTO):
            self.put(key, value)

    def agree(
        self,
        key: str,
        value: Any,
        ours: str,
        same: Callable[[Any, Any], bool] = lambda a, b: bool(a == b),
    ) -> None:
        """Fills a key; a value that is there must be the same."""
        found = self.get(key)
        if found not in (None, AUTO) and not same(found, value):
            self.problems.append(f"{key} is {found!r}, but {ours} is {value!r}")
        self.put(key, value)


def _fill_batches(filler: _Filler, optim: OptimConfig, ranks: int) -> None:
    dealing = deal(optim, ranks)
    found = filler.get("train_batch_size")
    if found not in (None, AUTO, dealing.total):
        filler.problems.append(
            f"train_batch_size is {found!r}, but optim.batch_size * optim.grad_accumulation is "
            f"{dealing.total}"
        )
    dealt = f"of optim.batch_size {optim.batch_size} and grad_accumulation "
    dealt += f"{optim.grad_accumulation} dealt over {ranks} rank(s)"
    filler.agree("train_micro_batch_size_per_gpu", dealing.micro, f"the micro-batch {dealt}")
    filler.agree("gradient_accumulation_steps", dealing.steps, f"the number {dealt}")
    # DeepSpeed insists on the product; an uneven deal pads with work of weight 0.
    filler.put("train_batch_size", dealing.micro * dealing.steps * ranks)
    filler.agree("gradient_clipping", optim.max_grad_norm or 0.0, "optim.max_grad_norm", _close)


def _fill_precision(filler: _Filler, spec: ModelSpec) -> None:
    for key, dtype in (("bf16.enabled", "bfloat16"), ("fp16.enabled", "float16")):
        wanted = spec.dtype == dtype
        found = filler.get(key)
        if found not in (None, AUTO, wanted):
            filler.problems.append(
                f"{key} is {found!r}, but the model's dtype is {spec.dtype!r} "
                "(model_args.models.<name>.dtype)"
            )
        section = key.partition(".")[0]
        if wanted or filler.get(section) is not None:
            filler.put(key, wanted)


def _check_optimizer(filler: _Filler, optim: OptimConfig) -> None:
    section = filler.document.pop("optimizer", None)
    if section is None:
        return
    found = _Filler({"optimizer": section})
    name = found.get("optimizer.type")
    if name != AUTO and str(name).lower() not in _ADAMW:
        filler.problems.append(f"optimizer.type is {name!r}, but local training uses 'AdamW'")
    found.agree("optimizer.params.lr", optim.learning_rate, "optim.learning_rate", _close)
    found.agree("optimizer.params.weight_decay", optim.weight_decay, "optim.weight_decay", _close)
    found.agree("optimizer.params.betas", _BETAS, "AdamW's betas here", lambda a, b: list(a) == b)
    found.agree("optimizer.params.eps", _EPS, "AdamW's eps here", _close)
    found.agree("optimizer.params.adam_w_mode", True, "decoupled weight decay here")
    filler.problems += found.problems


def _check_scheduler(filler: _Filler, optim: OptimConfig) -> None:
    section = filler.document.pop("scheduler", None)
    if section is None:
        return
    params = section.get("params", {}) if isinstance(section, dict) else {}
    fixed = sorted(key for key, value in params.items() if value != AUTO)
    if not isinstance(section, dict) or fixed or not params:
        what = f"scheduler.params.{fixed[0]} is {params[fixed[0]]!r}" if fixed else "scheduler"
        filler.problems.append(
            f"{what}, but optim.schedule is {optim.schedule!r}; leave the scheduler out"
        )


def _fill_zero(filler: _Filler, hidden_size: int) -> None:
    stage = filler.get("zero_optimization.stage")
    if stage not in STAGES:
        filler.problems.append(f"zero_optimization.stage: expected 1, 2 or 3, got {stage!r}")
        return
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in sizes.items():
        if filler.get(f"zero_optimization.{key}") == AUTO:
            filler.put(f"zero_optimization.{key}", size)
    for key in ("offload_optimizer", "offload_param"):
        device = filler.get(f"zero_optimization.{key}.device")
        if device not in (None, "none", "cpu"):
            filler.problems.append(
                f"zero_optimization.{key}.device: expected 'cpu' or 'none', got {device!r}"
            )
    if stage < 3 and filler.get("zero_optimization.offload_param.device") == "cpu":
        filler.problems.append(
            f"zero_optimization.offload_param needs stage 3, but the stage is {stage}"
        )


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and math.isclose(float(a), float(b), rel_tol=1e-9)


def _autos(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        return [
            found
            for key, value in node.items()
            for found in _autos(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [prefix] if node == AUTO else []
