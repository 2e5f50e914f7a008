from __future__ import annotations

import pytest

from fedml_plugin_fedmosaic.data.continual import forgetting, forward_transfer

CURVE = {0: 0.5, 1: 0.9, 2: 0.7, 3: 0.6}


def test_forgetting_is_the_fall_from_the_best_score() -> None:
    assert forgetting(CURVE, first=0, last=1) == pytest.approx(0.3)
    # What came before the task's own samples is not learnt and cannot be forgotten.
    assert forgetting(CURVE, first=2, last=2) == pytest.approx(0.1)
    assert forgetting({0: 0.4, 3: 0.6}, first=0, last=0) == pytest.approx(-0.2)


def test_a_task_that_still_arrives_is_not_forgotten() -> None:
    assert forgetting(CURVE, first=0, last=3) is None
    assert forgetting({3: 0.6}, first=0, last=1) is None
    assert forgetting({}, first=0, last=1) is None


def test_forward_transfer_is_the_gain_before_the_first_sample() -> None:
    assert forward_transfer(CURVE, first=2, untrained=0.4) == pytest.approx(0.5)
    assert forward_transfer(CURVE, first=3, untrained=0.8) == pytest.approx(-0.1)
    # Round -1 is the base model itself.
    assert forward_transfer({-1: 0.3, 0: 0.5}, first=0, untrained=0.3) is None
