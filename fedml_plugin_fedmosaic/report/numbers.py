"""Numbers as text."""

from __future__ import annotations

MISSING = "-"
"""Shown where there is no value."""


def percent(value: float | None) -> str:
    """A share in [0, 1] as percent with one decimal; ``-`` for None."""
    return MISSING if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, signed, one decimal; ``-`` for None."""
    return MISSING if value is None else f"{100 * value:+.1f}"


def readable_bytes(value: float | None) -> str:
    """Bytes with a binary unit; ``-`` for None."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def seconds(value: float | None) -> str:
    """Seconds, or minutes and seconds from two minutes on; ``-`` for None."""
    if value is None:
        return MISSING
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def operations(value: float | None) -> str:
    """Floating-point operations with a decimal unit; ``-`` for None."""
    if value is None:
        return MISSING
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000:
            return f"{value:.1f} {unit}FLOP"
        value /= 1000
    return f"{value:.1f} EFLOP"
