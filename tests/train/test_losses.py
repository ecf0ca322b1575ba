"""The distillation divergence against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.train.losses import kl_each


def by_definition(teacher, student, temperature):
    """T² Σ p log(p/q) in float64, term by term."""
    values = []
    for z, s in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        p = [math.exp(v / temperature) for v in z]
        q = [math.exp(v / temperature) for v in s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        values.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_closed_form(temperature):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 5, generator=generator) * 3
    student = torch.randn(6, 5, generator=generator) * 3
    got = kl_each(teacher, student, temperature)
    assert got.shape == (6,)
    assert got.tolist() == pytest.approx(by_definition(teacher, student, temperature), rel=1e-4)


def test_two_classes_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]])
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(kl_each(teacher, student)) == pytest.approx(wanted, abs=1e-6)
    # the other way round it is another number: teacher first
    other = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(kl_each(student, teacher)) == pytest.approx(other, abs=1e-6)


def test_it_is_zero_at_equality_and_blind_to_a_shift():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    assert kl_each(logits, logits).tolist() == [0.0] * 4
    assert kl_each(logits, logits + 5).tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert bool((kl_each(logits, -logits) > 0).all())


def test_the_temperature_scales_as_hinton_says():
    """T² KL at T·z is T² times KL at z; for large T it tends to the variance of the difference / 2."""
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    for t in (2.0, 5.0):
        torch.testing.assert_close(
            kl_each(t * teacher, t * student, t), t**2 * kl_each(teacher, student)
        )
    limit = (teacher - student).var(1, unbiased=False) / 2
    torch.testing.assert_close(kl_each(teacher, student, 1e4), limit, rtol=1e-3, atol=1e-4)


def test_saturated_logits_stay_finite():
    teacher = torch.tensor([[1e4, -1e4, 0.0]])
    student = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    value = kl_each(teacher, student)
    assert value.tolist() == pytest.approx([2e4])
    value.sum().backward()
    assert student.grad.tolist() == [[-1.0, 1.0, 0.0]]
    assert kl_each(teacher, teacher).tolist() == [0.0]
