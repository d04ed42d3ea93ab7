"""Samplers and guidance against a few lines of independent code, written out step by step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.flow.samplers import alternating, averaged, euler, guided, timesteps

pytestmark = pytest.mark.usefixtures("one_thread")


def trellis_euler(model, noise, cond, neg_cond, steps, rescale_t, cfg_strength, cfg_interval):
    """The released sampler's arithmetic, in its own terms, in float64."""
    times = np.linspace(1, 0, steps + 1)
    times = rescale_t * times / (1 + (rescale_t - 1) * times)
    x = noise
    for i in range(steps):
        t = times[i]
        v = model(x, 1000 * t, cond)
        if cfg_interval[0] <= t and t <= cfg_interval[1]:
            v = (1 + cfg_strength) * v - cfg_strength * model(x, 1000 * t, neg_cond)
        x = x - (times[i] - times[i + 1]) * v
    return x


def toy_model(x, t1000, cond):
    return torch.tanh(x * cond) + torch.cos(torch.tensor(t1000 / 300.0)) * cond - 0.3 * x


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.floats(0.5, 6),
    st.floats(0, 8),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_euler_with_guidance_interval_and_shift(steps, shift, strength, interval):
    generator = torch.Generator().manual_seed(steps)
    noise, cond = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    zero = torch.zeros_like(cond)
    expected = trellis_euler(toy_model, noise, cond, zero, steps, shift, strength, interval)
    velocity = guided(
        lambda z, t: toy_model(z, 1000 * t, cond),
        lambda z, t: toy_model(z, 1000 * t, zero),
        strength + 1,
        tuple(interval),
    )
    ours = euler(velocity, noise, timesteps(steps, shift))
    scale = float(expected.abs().max()) + 1
    assert float((ours - expected).abs().max()) <= 1e-6 * scale


def test_straight_paths_arrive_exactly():
    """On the path z_t = (1 − t) z_0 + t ε with its true velocity, one step or many end at z_0."""
    z0, noise = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    for steps in (1, 7):
        out = euler(lambda z, t: noise - z0, noise, timesteps(steps, 3.0))
        assert torch.allclose(out, z0, atol=1e-6)


def test_timesteps_run_from_one_to_zero():
    assert timesteps(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = timesteps(4, 3.0)
    assert shifted[0] == 1 and shifted[-1] == 0 and shifted[2] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="num_steps"):
        timesteps(0)
    with pytest.raises(ValueError, match="shift"):
        timesteps(3, 0.0)


def test_guidance_of_one_is_off_and_the_interval_is_closed():
    calls = []

    def unconditional(z, t):
        calls.append(t)
        return 0 * z

    z = torch.ones(1)
    assert guided(lambda z, t: z, unconditional, 1.0)(z, 0.5) == z and not calls
    velocity = guided(lambda z, t: z, unconditional, 3.0, (0.25, 0.75))
    results = {t: float(velocity(z, t)) for t in (1.0, 0.75, 0.5, 0.25, 0.0)}
    assert results == {1.0: 1.0, 0.75: 3.0, 0.5: 3.0, 0.25: 3.0, 0.0: 1.0}
    assert calls == [0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="interval"):
        guided(lambda z, t: z, unconditional, 3.0, (0.5, 0.2))


def test_several_conditions():
    parts = [lambda z, t, c=c: torch.full_like(z, c) for c in (1.0, 2.0, 6.0)]
    z = torch.zeros(2)
    assert torch.equal(averaged(parts)(z, 0.3), torch.full((2,), 3.0))
    turns = alternating(parts)
    assert [float(turns(z, t)[0]) for t in (1.0, 1.0, 0.8, 0.6, 0.4)] == [1, 1, 2, 6, 1]
    for make in (averaged, alternating):
        with pytest.raises(ValueError, match="at least one"):
            make([])


def test_steps_can_be_watched_and_changed():
    seen = []

    def on_step(step):
        seen.append((step.index, step.t, step.t_next))
        assert torch.allclose(step.predicted_data, step.latents - step.t_next * step.velocity)
        return torch.zeros_like(step.latents) if step.index == 2 else None

    out = euler(lambda z, t: torch.ones_like(z), torch.tensor([5.0]), timesteps(4), on_step)
    assert seen == [(0, 1.0, 0.75), (1, 0.75, 0.5), (2, 0.5, 0.25), (3, 0.25, 0.0)]
    assert float(out) == pytest.approx(-0.25)  # reset to 0 after the third step, then one step of −0.25
