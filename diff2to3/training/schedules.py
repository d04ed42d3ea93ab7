"""Learning-rate schedules: the factor on the peak rate for a step's place between warm-up and end."""

from __future__ import annotations

import math
from collections.abc import Callable


def _constant(x: float, decay: float) -> float:
    return 1.0


def _linear(x: float, decay: float) -> float:
    return 1.0 - x


def _cosine(x: float, decay: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * x))


def _wsd(x: float, decay: float) -> float:
    return 1.0 if x <= 1.0 - decay else (1.0 - x) / decay


#: name -> (place x in [0, 1] after the warm-up, share of the decay) -> factor from 1 at the start to 0 at the
#: end (``constant`` stays at 1; ``wsd`` is warm-up, stable, decay, also called a trapezoid).
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}


def rate_factor(
    schedule: str, step: int, steps: int, *, warmup: int = 0, decay: float = 0.2, floor: float = 0.0
) -> float:
    """The share of the peak learning rate that step ``step`` (from 0) of ``steps`` takes.

    Warm-up: (step + 1) / warmup. After it floor + (1 - floor) s(x) with x = (step - warmup) / (steps -
    warmup), so that the first step after the warm-up has the peak rate and the step after the last would have
    the floor.
    """
    if step < warmup:
        return (step + 1) / warmup
    x = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return floor + (1.0 - floor) * SCHEDULES[schedule](x, decay)
