from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.equations.distillation import divergence

ARRAYS = np.load(Path(__file__).parent / "baselines.npz", allow_pickle=False)
CASES = ("v17", "v3200")


def _logits(case: str) -> list[Tensor]:
    sides = ("student", "teacher")
    return [torch.from_numpy(ARRAYS[f"{case}/{side}"]).double() for side in sides]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "temperature", "factor"),
    [
        # T^2, where the reference has it, is the weight of the term here.
        ("feddat_T2", 2.0, 4.0),
        ("feddistill_T2", 2.0, 1.0),
        ("takfl_T3", 3.0, 9.0),
        ("takfl_T20", 20.0, 400.0),
    ],
)
def test_kl_on_supervised_tokens(case: str, name: str, temperature: float, factor: float) -> None:
    student, teacher = _logits(case)
    found = factor * float(divergence(student, teacher, temperature).mean())
    assert found == pytest.approx(float(ARRAYS[f"{case}/{name}"]), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_soft_cross_entropy(case: str) -> None:
    student, teacher = _logits(case)
    found = divergence(student, teacher, 1.0, "soft_ce").mean()
    assert float(found) == pytest.approx(float(ARRAYS[f"{case}/fedmkt_soft_ce"]), rel=1e-12)


def test_gradient_is_that_of_the_definition() -> None:
    student, teacher = (value.clone() for value in _logits("v17"))
    student.requires_grad_(True)
    divergence(student, teacher, 2.0).sum().backward()
    expected = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    torch.testing.assert_close(student.grad, expected.detach())


def test_a_token_that_the_teacher_rules_out_adds_nothing() -> None:
    student = torch.tensor([[0.3, -0.2, 1.0]])
    teacher = torch.tensor([[0.1, float("-inf"), 0.4]])
    rest = divergence(student, teacher, 1.0)
    p = torch.tensor([0.1, 0.4]).softmax(0)
    q = student[0].log_softmax(0)[[0, 2]]
    torch.testing.assert_close(rest[0], (p * (p.log() - q)).sum())
