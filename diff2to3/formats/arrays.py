"""What the formats share: Gaussians as float64 arrays and back, packing of numbers into bits, and how much a file may
ask for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diff2to3.errors import InputError
from diff2to3.types import Gaussians

#: Y_0, the constant of spherical harmonics: colour = 0.5 + SH_C0 · sh_0.
SH_C0 = 0.28209479177387814
#: Number of coefficients a channel by degree, without the constant.
SH_REST = (0, 3, 8, 15)
#: More bytes than this for each byte of a compressed file are taken for a lie. (Deflate cannot reach 1033.)
MAX_RATIO = 1040
SQRT_HALF = 0.5**0.5
#: For each component that is left out of a packed quaternion, the three that are kept.
OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])


@dataclass(frozen=True)
class Arrays:
    """float64: means [G, 3], quats [G, 4] wxyz of length 1, scales [G, 3], opacities [G], sh [G, K, 3]."""

    means: np.ndarray
    quats: np.ndarray
    scales: np.ndarray
    opacities: np.ndarray
    sh: np.ndarray

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        return SH_REST.index(self.sh.shape[1] - 1)

    @property
    def colors(self) -> np.ndarray:
        """Colour [G, 3] without the part that depends on the direction, not clipped."""
        return np.asarray(0.5 + SH_C0 * self.sh[:, 0])

    def take(self, order: np.ndarray) -> Arrays:
        return Arrays(*(x[order] for x in (self.means, self.quats, self.scales, self.opacities, self.sh)))


def arrays_of(gaussians: Gaussians) -> Arrays:
    """ValueError where a value is NaN or infinite: no file of ours holds any."""

    def numpy(x: Tensor) -> np.ndarray:
        return x.detach().to("cpu", torch.float64).numpy()

    values = {
        name: numpy(getattr(gaussians, name)) for name in ("means", "quats", "scales", "opacities", "sh")
    }
    bad = [name for name, x in values.items() if not np.isfinite(x).all()]
    if bad:
        raise ValueError(f"gaussians: NaN or infinite values in {', '.join(bad)}")
    return Arrays(**{**values, "quats": unit(values["quats"])})


def gaussians_of(name: str, a: Arrays) -> tuple[Gaussians, list[str]]:
    """The Gaussians whose values are all finite, and a line that says how many are not.

    Raises:
        InputError: none can be used, of a file that holds some.
    """
    rows = [
        np.isfinite(x).all(tuple(range(1, x.ndim))) for x in (a.means, a.quats, a.scales, a.opacities, a.sh)
    ]
    keep = np.logical_and.reduce(rows) & (a.scales >= 0).all(1) & (np.abs(a.means) < 1e30).all(1)
    notes = []
    if not keep.all():
        dropped = int(len(a) - keep.sum())
        if dropped == len(a):
            raise InputError(
                f"{name}: none of its {len(a):,} Gaussians has usable values; the file is damaged"
            )
        notes = [f"{name}: {dropped:,} of {len(a):,} Gaussians left out: values that are no numbers"]
        a = a.take(keep)

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    opacities = a.opacities.clip(0, 1)
    # a coefficient beyond 1e6 is damage; bounded, so that float32 products stay finite
    sh = a.sh.clip(-1e6, 1e6)
    return Gaussians(
        *(tensor(x) for x in (a.means, unit(a.quats), a.scales.clip(0, 1e30), opacities, sh))
    ), notes


def unit(quats: np.ndarray) -> np.ndarray:
    """Quaternions of length 1; those of length 0 become the identity."""
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.abs(quats).max(-1, keepdims=True, initial=0.0)
        safe = quats / np.where(largest > 0, largest, 1)
        length = np.linalg.norm(safe, axis=-1, keepdims=True)
        return np.where(length > 0, safe / np.where(length > 0, length, 1), np.array([1.0, 0, 0, 0]))


def logit(x: np.ndarray, margin: float = 1e-6) -> np.ndarray:
    x = x.clip(margin, 1 - margin)
    return np.asarray(np.log(x) - np.log1p(-x))


def quantise(x: np.ndarray, levels: int) -> np.ndarray:
    """[0, 1] → 0 … levels, rounded and clipped; int64."""
    return np.asarray(np.floor(x.clip(0, 1) * levels + 0.5).astype(np.int64))


def largest_apart(quats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A quaternion by its smallest three components: which of wxyz [G] is the largest, and the others [G, 3] in order,
    with the sign that makes the largest positive. They are within ±√½.
    """
    which = np.abs(quats).argmax(1)
    rows = np.arange(len(quats))
    sign = np.where(quats[rows, which] < 0, -1.0, 1.0)
    return which, quats[rows[:, None], OTHERS[which]] * sign[:, None]


def largest_back(which: np.ndarray, three: np.ndarray) -> np.ndarray:
    """The inverse of ``largest_apart``."""
    quats = np.empty((len(which), 4))
    rows = np.arange(len(which))
    quats[rows[:, None], OTHERS[which]] = three
    quats[rows, which] = np.sqrt((1 - (three**2).sum(1)).clip(min=0))
    return quats


def morton_order(points: np.ndarray) -> np.ndarray:
    """Indices [G] along a Z-order curve of 2¹⁰ cells an axis: neighbours in the file are neighbours in space."""
    if not len(points):
        return np.zeros(0, np.int64)
    low, high = points.min(0), points.max(0)
    cells = quantise((points - low) / np.where(high > low, high - low, 1), 1023)
    code = np.zeros(len(points), np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= ((cells[:, axis] >> bit) & 1) << (3 * bit + axis)
    return np.argsort(code, kind="stable")


def rest_by_channel(sh: np.ndarray) -> np.ndarray:
    """Higher coefficients [G, 3(K−1)] channel after channel, as .ply files hold them."""
    return np.asarray(sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), -1))


def rest_from_channels(dc: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """sh [G, K, 3] of dc [G, 3] and what ``rest_by_channel`` gives."""
    higher = rest.reshape(len(dc), 3, -1).transpose(0, 2, 1)
    return np.concatenate((dc[:, None], higher), 1)


def parse_json(name: str, what: str, data: bytes) -> Any:
    """InputError that names the part where it is not JSON."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: {what} is not valid JSON; the file is damaged") from error


def need(ok: bool, name: str, problem: str) -> None:
    """InputError unless ``ok``."""
    if not ok:
        raise InputError(f"{name}: {problem}")
