"""Mixed precision: autocast over float32 weights, and the loss scale that float16 needs."""

from __future__ import annotations

import math
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context that an objective's forward pass runs in."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


class LossScale:
    """The loss is multiplied by ``value`` so that small gradients do not vanish in float16.

    It halves when a gradient overflows (that step is skipped) and doubles after ``interval`` steps without
    one. The decision is taken on the norm of the whole gradient, which all processes share. In other
    precisions it stays at 1 and nothing is skipped.
    """

    def __init__(self, enabled: bool, interval: int = 2000) -> None:
        self.enabled, self.interval = enabled, interval
        self.value = 2.0**16 if enabled else 1.0
        self.good_steps = 0

    def accepts(self, norm: float) -> bool:
        """Whether a step with this gradient norm is to be taken, after adapting the scale.

        FloatingPointError when the gradient overflows at the smallest scale.
        """
        if not self.enabled:
            return True
        if math.isfinite(norm):
            self.good_steps += 1
            if self.good_steps == self.interval:
                self.value, self.good_steps = min(self.value * 2, 2.0**24), 0
            return True
        if self.value <= 1.0:
            raise FloatingPointError("the gradient overflows float16 at every loss scale; use bf16 or fp32")
        self.value, self.good_steps = self.value / 2, 0
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value, self.good_steps = state["value"], state["good_steps"]
