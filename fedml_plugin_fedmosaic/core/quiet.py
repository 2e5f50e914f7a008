"""Notes that libraries write to the screen about each other, and that no user can act on."""

from __future__ import annotations

import logging


def _is_news(record: logging.LogRecord) -> bool:
    # Transformers imports torchao wherever it is installed; torch then comments on how torchao
    # registers its enumerations.
    return "register_constant" not in record.getMessage()


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    # Bitsandbytes regrets that it cannot fetch a faster kernel from a hub; its own one does.
    return "gemm_4bit_forward from kernels-community" not in record.getMessage()


def hush_libraries() -> None:
    """Drops the known notes; to be called before transformers' models or peft are imported."""
    # Adding the same function again changes nothing.
    logging.getLogger("torch.utils._pytree").addFilter(_is_news)
    # PEFT imports bitsandbytes wherever it is installed, whatever the base models' weights are.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)
