"""A page that shows one asset: a single HTML file that opens from the disk and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diff2to3 import __version__
from diff2to3.formats.comments import CONVENTIONS
from diff2to3.gaussians.render import EPS2D
from diff2to3.types import Gaussians
from diff2to3.views.photo_frame import PhotoCamera
from diff2to3.web.payload import pack

if TYPE_CHECKING:
    from diff2to3.pipeline.result import Result

#: Longest side of the photo inside the page.
PHOTO_SIDE = 512


@dataclass(frozen=True)
class Home:
    """Where the page's camera starts: degrees around z from +x, degrees above the horizon, distance to ``target``, and
    degrees of view across the shorter side.
    """

    azimuth: float = -90.0
    elevation: float = 10.0
    distance: float = 2.0
    fov: float = 40.0
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)


def home_for(gaussians: Gaussians) -> Home:
    """A view of the whole: in the unit box of our objects the usual one, else what fits the box of the middle 98 %
    along each axis.
    """
    if not len(gaussians):
        return Home()
    points = gaussians.means.detach().cpu().double().numpy()
    low, high = np.quantile(points, 0.01, 0), np.quantile(points, 0.99, 0)
    side = float((high - low).max())
    if (np.abs([low, high]) <= 0.6).all() and side > 0.3:
        return Home()
    target = [float(x) for x in (low + high) / 2]
    return Home(distance=2 * max(side, 1e-6), target=(target[0], target[1], target[2]))


def home_from_camera(viewmat: Tensor, fov_degrees: float) -> Home:
    """Where a camera [4, 4] that looks at the origin, upright, stands."""
    matrix = viewmat.detach().cpu().double().numpy()
    eye = -matrix[:3, :3].T @ matrix[:3, 3]
    distance = float(np.linalg.norm(eye))
    elevation = math.degrees(math.asin(max(-1.0, min(1.0, eye[2] / distance))))
    return Home(math.degrees(math.atan2(eye[1], eye[0])), elevation, distance, float(fov_degrees))


def home_from_photo(camera: PhotoCamera) -> Home:
    """The photo's view of an object in the photo frame; the page shows what its crop shows."""
    fov = math.degrees(2 * math.atan(0.5 / camera.focal))
    return Home(elevation=camera.elevation, distance=camera.focal, fov=fov)


def home_of(result: Result) -> Home:
    """Where the camera starts that shows a result: where its photo's stood, if the model says that."""
    camera = getattr(result, "camera", None)
    return home_for(result.gaussians) if camera is None else home_from_photo(camera)


def seen_picture(result: Result) -> Image.Image | None:
    """The photo without its background, or what the model saw of it; None for texts."""
    if not result.photos:
        return None
    if result.photos[0].cut_out is not None:
        small = result.photos[0].cut_out.copy()
        small.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
        return small
    pixels = (result.photos[0].picture.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.cpu().numpy())


def viewer_page(
    gaussians: Gaussians,
    name: str,
    *,
    photo: Image.Image | None = None,
    home: Home | None = None,
    note: Mapping[str, Any] | None = None,
    screen_filter: float = EPS2D,
) -> str:
    """The page's HTML.

    Args:
        name: of the asset: the title, and the stem of what is downloaded from the page.
        photo: shown beside it.
        home: where the camera starts; :func:`home_for` unless given.
        note: what a .ply downloaded from the page says about itself, beside the frame and the filter.
        screen_filter: in px².
    """
    facts = {
        "name": name,
        "about": f"{name} · {len(gaussians):,} Gaussians",
        "home": asdict(home or home_for(gaussians)),
        "photo": data_url(photo) if photo is not None else None,
        "note": {
            **CONVENTIONS,
            "generator": f"diff2to3 {__version__}",
            "screen_filter": screen_filter,
            **(note or {}),
        },
    }
    parts = {
        "facts": script_json(facts),
        "splats": base64.b64encode(pack(gaussians, screen_filter)).decode("ascii"),
    }
    return fill("viewer.html", parts)


def fill(page: str, parts: Mapping[str, str]) -> str:
    """A page of static/ with each {{name}} replaced: by ``parts``, or by the file of that name."""
    pieces = static(page).split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, text = piece.split("}}", 1)
        out += [parts[name] if name in parts else static(name), text]
    return "".join(out)


def static(name: str) -> str:
    """The text of a file in static/."""
    return (resources.files("diff2to3.web") / "static" / name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    return json.dumps(value).replace("<", "\\u003c")


def data_url(photo: Image.Image) -> str:
    """The picture, at most :data:`PHOTO_SIDE` pixels a side, as a data: address; transparency is kept."""
    small = photo.convert("RGBA" if photo.mode == "RGBA" else "RGB")
    small.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
