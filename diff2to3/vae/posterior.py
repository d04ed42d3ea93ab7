"""The diagonal Gaussian that an encoder returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(logvar)), elementwise: mean and logvar of one shape."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """mean + std · ε, with ε drawn on the generator's device in float32."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device, self.mean.dtype)

    def kl_terms(self) -> Tensor:
        """KL divergence to N(0, 1) of each element."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - self.logvar - 1)

    def kl(self) -> Tensor:
        """KL divergence to N(0, 1), mean over elements (as TRELLIS's loss takes it)."""
        return self.kl_terms().mean()
