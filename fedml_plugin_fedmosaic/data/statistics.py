"""Means of repeated runs with confidence intervals, tests of paired differences, diversity.

Runs with equal seeds see the same data and the same base models, so two strategies are compared
seed by seed: what a seed does to both cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError

LEVEL = 0.05
"""Level of the tests behind significance marks."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: arithmetic mean.
        half_width: half the width of the confidence interval; None for a single value.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of independent runs with a Student t confidence interval.

    Args:
        values: one number per run (seed).
        confidence: probability that the interval covers the mean, in (0, 1).

    Raises:
        DataError: no value.
        ConfigError: ``confidence`` outside (0, 1).
    """
    if not values:
        raise DataError("mean of no values")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a number in (0, 1)")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = _student_quantile(confidence, count - 1)
    return Estimate(mean, quantile * math.sqrt(variance / count), count)


def _student_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection on atan(t / sqrt(freedom))."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_central(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(freedom)


def _student_central(angle: float, freedom: int) -> float:
    """P(|T| <= t) at t = sqrt(freedom) tan(angle): the finite series for whole degrees."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for index in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= (index + 1) / (index + 2) * cosine**2
    if odd:
        return 2 / math.pi * (angle + sine * total)
    return sine * total


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's paired t-test: is the mean difference zero?

    Args:
        differences: one per pair (seed).

    Returns:
        A number in [0, 1]; None for fewer than two pairs. Equal differences give 0, or 1 if all of
        them are zero.
    """
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    spread = math.sqrt(math.fsum((item - mean) ** 2 for item in differences) / (count - 1))
    if spread <= 1e-12 * max(1.0, abs(mean)):
        return 1.0 if abs(mean) <= 1e-12 else 0.0
    statistic = abs(mean) / (spread / math.sqrt(count))
    angle = math.atan(statistic / math.sqrt(count - 1))
    return min(1.0, max(0.0, 1.0 - _student_central(angle, count - 1)))


def effective_number(weights: Iterable[float]) -> float | None:
    """How many sources of equal weight would be as diverse as these.

    The exponential of the Shannon entropy of the normalised weights: the diversity of order one
    of Hill, "Diversity and evenness", Ecology 54, 1973. One source alone gives 1, equal weights
    give their number; weights of 0 do not count.

    Args:
        weights: 0 or more each, of any sum.

    Returns:
        At least 1; None if no weight is above 0.
    """
    positive = [weight for weight in weights if weight > 0]
    if not positive:
        return None
    total = math.fsum(positive)
    shares = [weight / total for weight in positive]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for testing several hypotheses at once.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 1979. With m tests the k-th smallest p-value is multiplied by m - k + 1; a larger
    p-value never gets a smaller adjusted one.

    Args:
        p_values: by name.

    Returns:
        Adjusted p-values by the same names, at most 1.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered = sorted(p_values.items(), key=lambda item: (item[1], item[0]))
    for rank, (name, value) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def significance_marks(
    p_values: Mapping[str, float | None], level: float = LEVEL
) -> dict[str, str]:
    """Marks for a table: ``*`` at the level of one test, ``**`` at that of all tests together.

    Args:
        p_values: by name; None where there were too few pairs for a test.
        level: of the tests.

    Returns:
        A mark per name, empty where the difference may be chance; ``**`` is Holm's correction.
    """
    known = {name: value for name, value in p_values.items() if value is not None}
    corrected = holm(known)
    marks = dict.fromkeys(p_values, "")
    for name, value in known.items():
        if value < level:
            marks[name] = "**" if corrected[name] < level else "*"
    return marks
