"""Samplers and guidance as functions over a velocity callable.

    velocity(z_t, t) -> dz/dt            t a Python float: 1 is noise, 0 is data

    v = guided(conditional, unconditional, guidance_scale=7.5, interval=(0.5, 0.95))
    z = euler(v, noise, timesteps(25, shift=3.0))

    euler            order 1, one evaluation a step
    heun             order 2, two evaluations a step
    adams_bashforth  order 2 or 3, one evaluation a step: it remembers the velocities of earlier steps

Whoever wants to change a trajectory wraps the callable, or passes ``on_step``; nothing is subclassed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Step:
    """What a sampler has just done: step ``index`` from ``t`` to ``t_next`` with ``velocity`` gave
    ``latents``.
    """

    index: int
    num_steps: int
    t: float
    t_next: float
    latents: Tensor
    velocity: Tensor

    @property
    def predicted_data(self) -> Tensor:
        """The end of the straight line that this step followed."""
        return self.latents - self.t_next * self.velocity


OnStep = Callable[[Step], Tensor | None]


def timesteps(num_steps: int, shift: float = 1.0) -> list[float]:
    """num_steps + 1 times from 1 to 0: t' = shift · t / (1 + (shift − 1) t) of equally spaced t.

    TRELLIS calls the shift ``rescale_t``; above 1 it spends more steps near the noise.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    if shift <= 0:
        raise ValueError(f"shift: expected a positive number, got {shift}")
    even = (1 - i / num_steps for i in range(num_steps + 1))
    return [shift * t / (1 + (shift - 1) * t) for t in even]


@torch.no_grad()
def euler(velocity: Velocity, noise: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Follow ``velocity`` from ``noise`` at times[0] to times[-1] by straight steps.

    on_step  called after every step; a tensor that it returns replaces the latents
    """
    z = noise
    num_steps = len(times) - 1
    for i in range(num_steps):
        t, t_next = times[i], times[i + 1]
        v = velocity(z, t)
        z = z - (t - t_next) * v
        if on_step is not None:
            changed = on_step(Step(i, num_steps, t, t_next, z, v))
            z = z if changed is None else changed
    return z


@torch.no_grad()
def heun(velocity: Velocity, noise: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """As :func:`euler`, with the mean of the velocities at both ends of a step (Karras et al. 2022, alg. 1)."""
    z = noise
    num_steps = len(times) - 1
    for i in range(num_steps):
        t, t_next = times[i], times[i + 1]
        v = velocity(z, t)
        v = (v + velocity(z - (t - t_next) * v, t_next)) / 2
        z = z - (t - t_next) * v
        if on_step is not None:
            changed = on_step(Step(i, num_steps, t, t_next, z, v))
            z = z if changed is None else changed
    return z


@torch.no_grad()
def adams_bashforth(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    on_step: OnStep | None = None,
    order: int = 2,
) -> Tensor:
    """As :func:`euler`, with the mean over a step of the polynomial through the last ``order`` velocities.

    The first steps, and those after ``on_step`` replaced the latents, have fewer to go by. Steps may be uneven.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"order: expected 1 to 4, got {order}")
    z = noise
    past: list[tuple[float, Tensor]] = []
    num_steps = len(times) - 1
    for i in range(num_steps):
        t, t_next = times[i], times[i + 1]
        past = [(t, velocity(z, t)), *past][:order]
        weights = multistep_weights([time for time, _ in past], t, t_next)
        v = weights[0] * past[0][1]
        for weight, (_, earlier) in zip(weights[1:], past[1:], strict=True):
            v = v + weight * earlier
        z = z - (t - t_next) * v
        if on_step is not None:
            changed = on_step(Step(i, num_steps, t, t_next, z, v))
            if changed is not None:
                z, past = changed, []
    return z


def multistep_weights(nodes: Sequence[float], t: float, t_next: float) -> list[float]:
    """Weights w with Σ w_k f(nodes_k) = the mean over [t, t_next] of the polynomial through these values."""
    weights = []
    for k, node in enumerate(nodes):
        # Lagrange's polynomial of this node in u = (time − t)/(t_next − t), lowest power first.
        others = [(other - t) / (t_next - t) for j, other in enumerate(nodes) if j != k]
        own = (node - t) / (t_next - t)
        polynomial = [1.0]
        for other in others:
            shifted, scaled = [0.0, *polynomial], [-other * c for c in polynomial] + [0.0]
            polynomial = [(a + b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c / (power + 1) for power, c in enumerate(polynomial)))
    return weights


Sampler = Callable[..., Tensor]

#: name → sampler(velocity, noise, times, on_step)
SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "adams_bashforth": adams_bashforth}


def guided(
    conditional: Velocity,
    unconditional: Velocity,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance: v_uncond + s (v_cond − v_uncond) for t in the closed ``interval``, else
    v_cond.

    A scale of 1 is off. TRELLIS's ``cfg_strength`` is s − 1. (Interval: Kynkäänniemi et al. 2024.)
    """
    low, high = interval
    if low > high:
        raise ValueError(f"interval: expected (low, high), got {interval}")
    if guidance_scale == 1:
        return conditional

    def velocity(z: Tensor, t: float) -> Tensor:
        v = conditional(z, t)
        if not low <= t <= high:
            return v
        return guidance_scale * v - (guidance_scale - 1) * unconditional(z, t)

    return velocity


def averaged(velocities: Sequence[Velocity]) -> Velocity:
    """The mean of several conditions' velocities (TRELLIS's "multidiffusion" over several images)."""
    if not velocities:
        raise ValueError("velocities: expected at least one")

    def velocity(z: Tensor, t: float) -> Tensor:
        total = velocities[0](z, t)
        for other in velocities[1:]:
            total = total + other(z, t)
        return total / len(velocities)

    return velocity


def alternating(velocities: Sequence[Velocity]) -> Velocity:
    """One condition a step, in turn (TRELLIS's "stochastic" mode). Good for one sampling run.

    A call at a new time moves on to the next condition; calls at the same time stay with it.
    """
    if not velocities:
        raise ValueError("velocities: expected at least one")
    seen: list[float] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        if not seen or seen[-1] != t:
            seen.append(t)
        return velocities[(len(seen) - 1) % len(velocities)](z, t)

    return velocity
