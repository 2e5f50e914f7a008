"""Notes that libraries write to the screen about each other, and that no user can act on."""

from __future__ import annotations

import logging


def _is_news(record: logging.LogRecord) -> bool:
    # Transformers imports torchao wherever it is installed; torch then comments on how torchao
    # registers its enumerations.
    return "register_constant" not in record.getMessage()


def hush_libraries() -> None:
    """Drops the known notes; to be called before transformers' models or peft are imported."""
    # Adding the same function again changes nothing.
    logging.getLogger("torch.utils._pytree").addFilter(_is_news)
