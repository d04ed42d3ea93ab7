"""Samplers on linear equations whose solutions are known, their orders, and what can be done from outside."""

import itertools
import math

import pytest
import torch

from diff2to3.flow.samplers import (
    SAMPLERS,
    adams_bashforth,
    euler,
    guided,
    heun,
    multistep_weights,
    timesteps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

#: dz/dt = A z + b t, with A skewed so that no coordinate solves alone.
A = torch.tensor([[-0.5, 2.0], [-1.5, 0.3]], dtype=torch.float64)
B = torch.tensor([0.7, -1.1], dtype=torch.float64)
START = torch.tensor([1.0, -0.5], dtype=torch.float64)


def linear(z, t):
    return A @ z + B * t


def solution(z1):
    """z(0) from z(1): dz/dt = A z + b t has the particular solution −A⁻¹ b t − A⁻² b."""
    inverse = torch.linalg.inv(A)

    def particular(t):
        return -inverse @ B * t - inverse @ inverse @ B

    return torch.linalg.matrix_exp(-A) @ (z1 - particular(1.0)) + particular(0.0)


ORDERS = [
    (euler, {}, 1),
    (heun, {}, 2),
    (adams_bashforth, {"order": 1}, 1),
    (adams_bashforth, {"order": 2}, 2),
]


@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize(("sampler", "options", "order"), ORDERS, ids=lambda x: str(x))
def test_errors_fall_with_the_sampler_s_order(sampler, options, order, shift):
    """Twice the steps, 2^order times less error, on even and on uneven steps."""
    truth = solution(START)
    errors = [
        float((sampler(linear, START, timesteps(steps, shift), **options) - truth).norm())
        for steps in (64, 128, 256)
    ]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.12)


def test_third_order_from_exact_history():
    """Order 3 loses an order to its first Euler step, so its rule is tested where no start is needed: it
    integrates any quadratic in t exactly."""

    def quadratic(z, t):
        return torch.tensor([3 * t**2 - 2 * t + 0.5], dtype=torch.float64)

    times = timesteps(20, 3.0)
    start = torch.zeros(1, dtype=torch.float64)
    first = adams_bashforth(quadratic, start, times[:3], order=3)
    rest = adams_bashforth(quadratic, start, times, order=3) - first
    assert float(rest) == pytest.approx(-(times[2] ** 3 - times[2] ** 2 + 0.5 * times[2]), abs=1e-12)


def test_even_steps_have_the_textbook_weights():
    assert multistep_weights([0.5], 0.5, 0.4) == [1.0]
    assert multistep_weights([0.5, 0.6], 0.5, 0.4) == pytest.approx([3 / 2, -1 / 2])
    assert multistep_weights([0.5, 0.6, 0.7], 0.5, 0.4) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    assert multistep_weights([0.5, 0.6, 0.7, 0.8], 0.5, 0.4) == pytest.approx(
        [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    )
    with pytest.raises(ValueError, match="order"):
        adams_bashforth(linear, START, timesteps(2), order=5)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_straight_path_is_followed_exactly_and_can_be_watched(name):
    data, noise = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    seen = []
    out = SAMPLERS[name](lambda z, t: noise - data, noise, timesteps(6, 3.0), seen.append)
    torch.testing.assert_close(out, data, rtol=0, atol=1e-6)
    assert [step.index for step in seen] == list(range(6))
    for step in seen:
        expected = (1 - step.t_next) * data + step.t_next * noise
        torch.testing.assert_close(step.latents, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(step.predicted_data, data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_an_edited_trajectory_is_one_started_from_the_edit(name):
    """What comes after an edit depends on the edited latents alone, not on what was before."""
    times = timesteps(8)
    edited = torch.tensor([0.3, 0.9], dtype=torch.float64)
    whole = SAMPLERS[name](linear, START, times, lambda step: edited if step.index == 3 else None)
    assert torch.equal(whole, SAMPLERS[name](linear, edited, times[4:]))


def test_guidance_works_with_every_sampler():
    velocity = guided(lambda z, t: torch.ones(1), lambda z, t: torch.zeros(1), 3.0, (0.5, 1.0))
    for sampler, value in ((euler, 2.0), (heun, 2.0)):
        z = sampler(velocity, torch.zeros(1), timesteps(4))
        # 3 at t = 1, 0.75, 0.5 and 1 at 0.25 (Euler); Heun averages the ends of the step that leaves 0.5.
        assert float(z) == pytest.approx(-(3 * 3 + 1) / 4 if sampler is euler else -(3 + 3 + value + 1) / 4)
