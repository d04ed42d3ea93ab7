"""ICC profiles made by hand, and what they mean in float64: an oracle that shares no code with Pillow's."""

from __future__ import annotations

import struct

import numpy as np

#: Columns: the primaries' XYZ at D50 (Bradford), from each space's specification.
DISPLAY_P3 = np.array(
    [[0.515102, 0.291965, 0.157153], [0.241182, 0.692236, 0.066582], [-0.001049, 0.041882, 0.784378]]
)
ADOBE_RGB = np.array(
    [[0.609741, 0.205276, 0.149185], [0.311113, 0.625671, 0.063217], [0.019470, 0.060867, 0.744568]]
)
SRGB = np.array(
    [[0.436066, 0.385147, 0.143066], [0.222488, 0.716873, 0.060608], [0.013916, 0.097076, 0.714096]]
)
D50 = (0.9642, 1.0, 0.8249)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 profile of an input device."""
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {
        b"desc": text,
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(*D50),
        **tags,
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, b"scnr", space, pcs)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*D50) + bytes(48)
    assert len(header) == 128
    return header + table + body


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """Matrix and one power law."""
    tags = {}
    for i, letter in enumerate((b"r", b"g", b"b")):
        tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*primaries[:, i])
        tags[letter + b"TRC"] = gamma_curve(gamma)
    return profile(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": gamma_curve(gamma)})


def cmyk_profile(corners: np.ndarray) -> bytes:
    """``corners`` [2, 2, 2, 2, 3]: CIELAB without and with each ink; linear in between."""
    ramp = bytes(range(256))
    lab = corners.reshape(-1, 3) * [255 / 100, 1, 1] + [0, 128, 128]
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += ramp * 4 + lab.round().clip(0, 255).astype(np.uint8).tobytes() + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": table})


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's curve, as bytes."""
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return curve * 255


def srgb_of_rgb(pixels: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    light = (pixels / 255.0) ** gamma
    return encoded(light @ (np.linalg.inv(SRGB) @ primaries).T)


def srgb_of_lab(lab: np.ndarray) -> np.ndarray:
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return encoded(xyz @ np.linalg.inv(SRGB).T)
