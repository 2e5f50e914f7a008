"""Memory that ran out: how it is recognised, and what is said about a model that does not fit."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import OutOfMemory

_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
)
"""In the plain RuntimeErrors of PyTorch's allocator on a processor, of cuBLAS and of cuDNN."""
_STATISTICS = " Of the allocated memory"
"""Where the message of PyTorch's allocator on a GPU turns to its own bookkeeping."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or in the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def in_short(error: BaseException) -> str:
    """Class and first line of an error, without the allocator's statistics."""
    text = str(error).strip().partition(_STATISTICS)[0]
    first = next(iter(text.splitlines()), "").strip()
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def smaller_model(name: str, spec: ModelSpec, *, using_gpu: bool) -> list[str]:
    """Options that make a base model smaller in memory, the largest gain first; perhaps none.

    Args:
        name: the model's name in the configuration.
        spec: of the model.
        using_gpu: whether it is on a GPU; 4-bit weights are slow elsewhere.
    """
    if spec.quantization != "none":
        return []
    ways = []
    if using_gpu and not spec.sharded:
        ways.append(f"models.{name}.quantization: bnb_nf4")
    if spec.dtype == "float32":
        ways.append(f"models.{name}.dtype: bfloat16")
    return ways


@contextmanager
def loading_memory(name: str, spec: ModelSpec, device: torch.device) -> Iterator[None]:
    """Turns memory that runs out while a model is loaded into an error that says so.

    Args:
        name: the model's name in the configuration.
        spec: of the model.
        device: where it is put.

    Raises:
        OutOfMemory: the memory of the device or of the machine is not enough.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        ways = smaller_model(name, spec, using_gpu=device.type == "cuda")
        text = f"set {', or '.join(ways)}; " if ways else ""
        raise OutOfMemory(
            f"model {name!r} ({spec.dtype}) does not fit into the memory of {device}: "
            f"{in_short(error)}",
            hint=f"{text}a rank holds the models of all its clients, so that more ranks (-np) "
            "leave fewer for each; 'fedmosaic run --estimate' says what fits",
        ) from error
