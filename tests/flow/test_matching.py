"""The path, the times and the loss against values worked out by hand, and gradients through the objective."""

import math

import pytest
import torch

from diff2to3.flow.matching import (
    PathConfig,
    draw_times,
    noised,
    precondition,
    squared_error,
    target_velocity,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_path_runs_from_data_to_noise():
    data, noise = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 3.0])
    assert noised(data, noise, torch.tensor(0.0)).tolist() == [2.0, -1.0]
    assert noised(data, noise, torch.tensor(1.0)).tolist() == [0.0, 3.0]
    assert noised(data, noise, torch.tensor(0.25)).tolist() == [1.5, 0.0]
    assert target_velocity(data, noise).tolist() == [-2.0, 4.0]


def test_the_velocity_is_the_path_s_derivative(generator):
    data, noise = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor(0.3, dtype=torch.float64)
    _, slope = torch.autograd.functional.jvp(lambda t: noised(data, noise, t), t, torch.ones_like(t))
    torch.testing.assert_close(slope, target_velocity(data, noise))


def test_the_loss_is_a_mean_an_item():
    velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    target = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
    # packed items of two rows and one: (1 + 4 + 1 + 1)/4 and (4 + 0)/2
    by_item = squared_error(velocity, target, torch.tensor([0, 2, 3], dtype=torch.int32))
    assert by_item.tolist() == [1.75, 2.0]
    assert squared_error(velocity, target).tolist() == [2.5, 1.0, 2.0]
    assert squared_error(velocity.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_times_follow_the_distribution_asked_for(generator):
    uniform = draw_times(PathConfig(), 4000, generator)
    assert 0 <= float(uniform.min()) and float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.005)
    logit = draw_times(PathConfig("logit_normal", 1.0, 0.5), 4000, generator).double()
    assert 0 < float(logit.min()) and float(logit.max()) < 1
    z = torch.log(logit / (1 - logit))
    assert float(z.mean()) == pytest.approx(1.0, abs=0.04)
    assert float(z.std()) == pytest.approx(0.5, abs=0.03)
    for values, message in (({"times": "cosine"}, "times"), ({"time_std": 0.0}, "time_std")):
        with pytest.raises(ValueError, match=message):
            PathConfig(**values)


def test_the_best_constant_velocity_of_a_gaussian_is_learnt(generator):
    """For data N(m, s²), E[ε − z_0 | z_t] is linear in z_t; least squares over drawn triples finds its slope."""
    m, s, t = 0.7, 0.5, 0.6
    data = m + s * torch.randn(200000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200000, generator=generator, dtype=torch.float64)
    z, u = noised(data, noise, torch.tensor(t)), target_velocity(data, noise)
    slope = float(((z - z.mean()) * (u - u.mean())).mean() / z.var())
    expected = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    assert slope == pytest.approx(expected, abs=0.02)
    assert math.isclose(float(u.mean()), -m, abs_tol=0.01)


def test_preconditioning_is_the_best_linear_guess_and_leaves_unit_variance() -> None:
    """Of independent z_0 and ε of unit variance: no other multiple of z_t comes closer to u, and the rest / c_out has
    variance 1."""
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        z, u = noised(z0, noise, torch.tensor(t)), target_velocity(z0, noise)
        best = (z @ u) / (z @ z)
        guess = precondition(torch.zeros_like(z), z, torch.tensor(t, dtype=torch.float64))
        assert torch.allclose(guess, best * z, atol=0.02)
        c_out = precondition(torch.ones_like(z), torch.zeros_like(z), torch.tensor(t, dtype=torch.float64))[0]
        assert float(((u - guess) / c_out).var()) == pytest.approx(1, abs=0.01)
