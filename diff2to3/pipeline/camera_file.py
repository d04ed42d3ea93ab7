"""The camera of a generated asset's photo, as metadata.json records it and ``render --camera`` reads it.

    "camera": {"elevation": 21.4, "focal": 1.83}

Both are those of :class:`diff2to3.views.photo_frame.PhotoCamera`: the asset's .ply is in the photo frame, so that no
more is needed to look at it as the photo did.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from diff2to3.errors import InputError
from diff2to3.views.photo_frame import PhotoCamera


def camera_entry(camera: PhotoCamera) -> dict[str, float]:
    """What metadata.json says about a camera: degrees above the horizon, focal length over the side of the crop."""
    return {"elevation": round(camera.elevation, 4), "focal": round(camera.focal, 5)}


def read_camera(path: Path) -> PhotoCamera:
    """The camera in a metadata.json.

    Raises:
        InputError: no such file, not JSON, or no camera in it.
    """
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    entry = metadata.get("camera") if isinstance(metadata, dict) else None
    if not isinstance(entry, dict):
        raise InputError(
            f"{path}: has no camera; metadata.json of a model that works in the photo frame has one"
        )
    values = [entry.get(name) for name in ("elevation", "focal")]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise InputError(f"{path}: camera: expected numbers elevation and focal, got {entry}")
    try:
        return PhotoCamera(float(values[0]), float(values[1]))  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"{path}: camera: {error}") from error
