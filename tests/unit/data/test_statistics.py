from __future__ import annotations

import pytest

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.statistics import (
    effective_number,
    holm,
    mean_interval,
    paired_p_value,
    significance_marks,
)


@pytest.mark.parametrize(
    ("count", "confidence", "quantile"),
    [
        (2, 0.95, 12.7062),
        (3, 0.95, 4.3027),
        (5, 0.95, 2.7764),
        (10, 0.99, 3.2498),
        (31, 0.9, 1.6973),
    ],
)
def test_interval_uses_the_student_quantile(count: int, confidence: float, quantile: float) -> None:
    values = [float(value) for value in range(count)]
    variance = sum((value - (count - 1) / 2) ** 2 for value in values) / (count - 1)
    estimate = mean_interval(values, confidence)
    assert estimate.mean == pytest.approx((count - 1) / 2)
    assert estimate.half_width == pytest.approx(quantile * (variance / count) ** 0.5, rel=1e-4)


def test_interval_of_one_value_is_unknown() -> None:
    assert mean_interval([0.5]).half_width is None
    with pytest.raises(DataError, match="no values"):
        mean_interval([])
    with pytest.raises(ConfigError, match="confidence"):
        mean_interval([1.0, 2.0], 1.0)


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    # Mean 2, standard deviation 1, three pairs: t = 2 sqrt(3) with 2 degrees of freedom, where
    # P(|T| <= t) = t / sqrt(t^2 + 2) in closed form.
    assert paired_p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - (12 / 14) ** 0.5)
    assert paired_p_value([-1.0, -2.0, -3.0]) == paired_p_value([1.0, 2.0, 3.0])
    # Two pairs: the Cauchy distribution; t = 1 is its upper quartile.
    assert paired_p_value([0.0, 1.0]) == pytest.approx(0.5)
    # The 97.5 % quantile of 9 degrees of freedom.
    values = [*range(10)]
    centred = [value - 4.5 for value in values]
    spread = (sum(value**2 for value in centred) / 9) ** 0.5
    shifted = [value + 2.262157 * spread / 10**0.5 for value in centred]
    assert paired_p_value(shifted) == pytest.approx(0.05, abs=1e-6)


def test_one_pair_and_equal_differences_need_no_distribution() -> None:
    assert paired_p_value([0.3]) is None
    assert paired_p_value([0.0, 0.0, 0.0]) == 1.0
    assert paired_p_value([0.1, 0.1, 0.1]) == 0.0


def test_holm_multiplies_by_the_tests_that_are_left() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"x": 0.7, "y": 0.8}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}


def test_marks_say_whether_a_difference_survives_the_correction() -> None:
    marks = significance_marks({"a": 0.01, "b": 0.04, "c": 0.2, "d": None})
    assert marks == {"a": "**", "b": "*", "c": "", "d": ""}


def test_the_effective_number_counts_sources_of_equal_weight() -> None:
    assert effective_number([0.25, 0.25, 0.0, 0.25, 0.25]) == pytest.approx(4)
    assert effective_number([0.0, 3.0]) == 1.0
    # Entropy of (1/2, 1/4, 1/4) is 1.5 bits; the sum of the weights does not matter.
    assert effective_number([2.0, 1.0, 1.0]) == pytest.approx(2**1.5)
    assert effective_number([0.0, 0.0]) is None
    assert effective_number([]) is None
