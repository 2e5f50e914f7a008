"""Numbers as text, and confidence intervals of few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "-"
"""Shown where there is no value."""

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def percent(value: float | None) -> str:
    """A share in [0, 1] as percent with one decimal; ``-`` for None."""
    return MISSING if value is None else f"{100 * value:.1f}"


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


def t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to three decimals.

    Args:
        degrees: degrees of freedom, at least 1.
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = 1.959964
    # Cornish-Fisher expansion around the normal quantile; error below 1e-4 from 31 on.
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return z + first + second


def mean_ci(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval (Student t).

    Args:
        values: at least one.

    Returns:
        The mean; the half width, or None for a single value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean_ci of no values")
    centre = sum(values) / len(values)
    if len(values) == 1:
        return centre, None
    variance = sum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return centre, t_975(len(values) - 1) * math.sqrt(variance / len(values))
