"""What in a photo is the object: its transparency, else a background-removal network, or the border's colour.

alpha   the photo's transparency separates something: it says what the object is
rembg   the library of that name (MIT) with U²-Net (Apache-2.0), as TRELLIS uses it; pip install "diff2to3[photos]"
u2netp  the small U²-Net inside this package (diff2to3.pipeline.u2net): about a second on one core
border  ours: whatever differs from the colour at the border, for pictures on a plain background
none    the photo has been cut out already: all of it is the object
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff2to3.errors import InputError, MissingDependencyError

#: What ``--background-removal`` takes.
METHODS = ("auto", "rembg", "u2netp", "border", "none")
#: Longest side of a photo that goes into background removal.
MAX_REMOVAL_SIDE = 1024
#: Longest side at which the border's colour is followed inwards.
BORDER_SIDE = 384
#: Masks that cover less are empty, masks that cover more are full (shares of the picture).
EMPTY, FULL = 1e-3, 0.97
#: Intersection over union from which two cut-outs agree.
AGREE = 0.85
#: What to do about a mask that looks wrong.
REMEDY = (
    "look at the cut-out, and if it is wrong give a PNG whose background is transparent, or a photo of the whole "
    "object on a plain background"
)
#: A pixel below this alpha (of 255) is clear.
CLEAR_ALPHA = 26
#: What fills so much of its box is a rectangle, and one of so much of the picture fills it.
RECTANGLE, FILLS = 0.94, 0.85


@dataclass(frozen=True)
class CutOut:
    """The object on transparency (RGBA), how it was found, and one warning per problem."""

    image: Image.Image
    method: str
    notes: tuple[str, ...] = ()


def cut_out(image: Image.Image, method: str = "auto", *, offline: bool = False) -> CutOut:
    """``image`` (RGB or RGBA) with its background made transparent.

    Args:
        method: one of :data:`METHODS`. Transparency wins over all but "none".
        offline: do not let rembg download its weights.

    Raises:
        InputError: nothing in the picture can be told from its background, or rembg fails and was asked for.
        MissingDependencyError: rembg was asked for and is not installed.
    """
    if method not in METHODS:
        raise InputError(f"background removal: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "none":
        return CutOut(image.convert("RGBA"), "none")
    if separates(image):
        return CutOut(image, "alpha")
    image = shrunk(without_alpha(image), MAX_REMOVAL_SIDE)
    extrema: Any = image.getextrema()
    if all(high - low <= 2 for low, high in extrema):
        raise InputError("image: all its pixels have the same colour; there is no object to see")
    notes: list[str] = []
    if method in ("auto", "rembg"):
        try:
            return checked(by_rembg(image, offline), "rembg", notes)
        except MissingDependencyError:
            if method == "rembg":
                raise
        except InputError as error:
            if method == "rembg":
                raise
            notes.append(f"{error}; the smaller network in this package was used")
    if method == "border":
        return checked(by_border(image), "border", notes)
    result, doubtful = by_u2netp(image)
    plain = by_border(image) if method == "auto" else result
    if method == "auto" and trusted(plain, result, doubtful):
        return checked(plain, "border", notes)
    empty = float((np.asarray(result)[:, :, 3] > 127).mean()) < EMPTY
    if doubtful or empty:
        notes.append(f"it is not clear what the object is; {REMEDY}")
    if empty and method == "auto":
        return checked(plain, "border", notes)
    return checked(result, "u2netp", notes)


def checked(image: Image.Image, method: str, notes: list[str]) -> CutOut:
    """With what looks wrong with the mask. InputError where nothing is left."""
    return CutOut(image, method, (*notes, *mask_problems(np.asarray(image)[:, :, 3])))


def trusted(plain: Image.Image, found: Image.Image, doubtful: bool) -> bool:
    """Whether the cut-out by the border's colour, whose outline is sharper, is to be taken: it agrees with the
    network's, or the network is in doubt and the background is plain all around.
    """
    mask, other = (np.asarray(image)[:, :, 3] > 127 for image in (plain, found))
    if not EMPTY < mask.mean() < FULL:
        return False
    same = (mask & other).sum() / max(int((mask | other).sum()), 1)
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return bool(same >= AGREE or (doubtful and not rim.any()))


def by_u2netp(image: Image.Image) -> tuple[Image.Image, bool]:
    """RGBA by the network in this package, and whether it is in doubt: half as many pixels are undecided as are the
    object's.
    """
    from diff2to3.pipeline.u2net import saliency

    found = saliency(image)
    undecided, inside = ((found > 0.1) & (found < 0.9)).sum(), (found > 0.5).sum()
    mask = Image.fromarray((found * 255 + 0.5).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    alpha = np.clip(3 * (np.asarray(mask, np.float32) / 255) - 1, 0, 1) * 255 + 0.5
    solid = Image.merge("RGBA", (*image.split(), Image.fromarray(alpha.astype(np.uint8))))
    return solid, bool(undecided > 0.5 * inside)


def separates(image: Image.Image) -> bool:
    """Whether the transparency says what the object is. It does not where too little is clear (a few lost pixels, an
    even veil) or where what is left is a rectangle, with corners that may be round, that fills the picture or throws a
    shadow: screenshots of windows, rounded thumbnails.
    """
    if image.mode != "RGBA":
        return False
    alpha = np.asarray(image)[:, :, 3]
    clear, solid = alpha < CLEAR_ALPHA, alpha >= 128
    if not clear.any() or clear.mean() < EMPTY:
        return False
    if not solid.any():
        return True
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if solid[box].mean() < RECTANGLE:
        return True
    # what is left out of the box lies in its corners, or inside the object, such as a handle's hole
    height, width = solid[box].shape
    y, x = np.nonzero(~solid[box])
    beside_corner = np.minimum(y, height - 1 - y) + np.minimum(x, width - 1 - x) < 0.3 * min(height, width)
    if not beside_corner.all() and len(y) > EMPTY * height * width:
        return True
    ring = np.ones_like(solid)
    ring[box] = False
    shadow = (ring & (alpha > 0)).sum() > 0.5 * ring.sum()
    return not (shadow or height * width > FILLS * alpha.size)


def without_alpha(image: Image.Image) -> Image.Image:
    """RGB: the box of what is solid, and, where that is transparent, the usual colour at its rim."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    pixels = np.asarray(image)
    solid = pixels[:, :, 3] >= 128
    if not solid.any():
        return image.convert("RGB")
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels, solid = pixels[box], solid[box]
    edge = np.zeros_like(solid)
    edge[[0, -1]], edge[:, [0, -1]] = True, True
    rim = pixels[edge & solid] if (edge & solid).any() else pixels[solid]
    filled = np.where(solid[:, :, None], pixels[:, :, :3], np.median(rim[:, :3], 0)).astype(np.uint8)
    return Image.fromarray(filled)


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """At most ``side`` pixels along its longer side."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def mask_problems(alpha: np.ndarray) -> list[str]:
    """What looks wrong with a mask uint8 [H, W]; InputError where it is empty."""
    solid = alpha > 127
    share = float(solid.mean())
    if share < EMPTY:
        raise InputError(
            "image: no object: all of it looks like background; give a PNG whose background is transparent"
        )
    if share > FULL:
        return [f"the mask covers the whole picture: no background was found; {REMEDY}"]
    rims = (solid[0], solid[-1], solid[:, 0], solid[:, -1])
    if all(rim.mean() > 0.02 for rim in rims):
        return [f"the mask touches all four borders; {REMEDY}"]
    return []


# ---- rembg ----


def by_rembg(image: Image.Image, offline: bool) -> Image.Image:
    """RGBA by rembg's U²-Net. InputError when it (or the download of its weights) fails."""
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without onnxruntime, some versions end the program
        hint = 'pip install "diff2to3[photos]" (or give a PNG whose background is transparent)'
        raise MissingDependencyError("rembg, which cuts objects out of photos,", hint=hint) from error
    try:
        if offline and not has_weights():
            raise InputError("rembg's weights are not on this machine, and offline is set")
        # named, because the library's own default model is for non-commercial use only
        result: Any = rembg.remove(image, session=rembg.new_session("u2net"))
    except InputError:
        raise
    except Exception as error:  # downloads, ONNX and sessions raise whatever they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"rembg failed: {reason}") from error
    return result.convert("RGBA")


def has_weights() -> bool:
    """Whether rembg finds U²-Net on this machine."""
    from rembg.sessions.u2net import U2netSession

    if hasattr(U2netSession, "resolve_existing"):
        return U2netSession.resolve_existing("u2net.onnx") is not None
    return (Path(U2netSession.u2net_home()) / "u2net.onnx").is_file()


# ---- the border's colour ----


def by_border(image: Image.Image) -> Image.Image:
    """RGBA: transparent where the colour at the border goes on inwards, and in holes of the same colour."""
    small = shrunk(image, BORDER_SIDE)
    pixels = np.asarray(small, np.float32) / 255
    mask = Image.fromarray((border_mask(pixels) * 255).astype(np.uint8))
    soft = np.asarray(mask.resize(image.size, Image.Resampling.BILINEAR), np.float32) / 255
    if small.size == image.size:
        soft = feather(soft)
    # from the outline inwards, so that no rim of background colour is left
    alpha = np.clip(3 * soft - 1.25, 0, 1) * 255 + 0.5
    return Image.merge("RGBA", (*image.split(), Image.fromarray(alpha.astype(np.uint8))))


def feather(mask: np.ndarray) -> np.ndarray:
    """The mean over 3 × 3 pixels."""
    padded = np.pad(mask, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9)


def border_mask(pixels: np.ndarray) -> np.ndarray:
    """bool [H, W] of the object in sRGB [H, W, 3]."""
    distance, noise = distance_to_background(pixels)
    threshold = float(np.clip(5 * noise, 0.035, 0.15))
    like = distance < threshold
    seeds = np.zeros_like(like)
    seeds[0], seeds[-1], seeds[:, 0], seeds[:, -1] = like[0], like[-1], like[:, 0], like[:, -1]
    outside = spread(seeds, like)
    # holes, such as a handle's, where the colour is nearly exactly the background's
    labels = components(like & ~outside & (distance < threshold / 2))
    counts = np.bincount(labels.ravel())
    is_hole = counts > 5e-4 * labels.size
    is_hole[0] = False
    mask = ~outside & ~is_hole[labels]
    labels = components(mask)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    mask = (counts >= 0.05 * max(counts.max(), 1))[labels] & mask
    return mask & ~blurred_rim(mask, distance)


def blurred_rim(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """What, near the outline, is less than half as far from the background as its surroundings are at most: the blur of
    lenses, shrinking and JPEG makes objects wider.
    """
    return grown(~mask) & mask & (distance < 0.5 * highest(distance))


def grown(mask: np.ndarray) -> np.ndarray:
    """bool [H, W] of what is within two pixels of ``mask``."""
    return highest(mask.astype(np.uint8)) > 0


def highest(values: np.ndarray) -> np.ndarray:
    """The maximum over 5 × 5 pixels."""
    h, w = values.shape
    padded = np.pad(values, 2, mode="edge")
    rows = np.maximum.reduce([padded[i : i + h] for i in range(5)])
    return np.asarray(np.maximum.reduce([rows[:, i : i + w] for i in range(5)]))


def distance_to_background(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Distance [H, W] to a smooth background fitted to the border, and that border's noise.

    A quadratic in x and y a channel (plain walls in uneven light), by iteratively reweighted least squares,
    so that an object that reaches the border on one side does not count.
    """
    h, w, _ = pixels.shape
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    ring = np.ones((h, w), bool)
    width = max(2, min(h, w) // 50)
    ring[width:-width, width:-width] = False
    colors, rows = pixels[ring].astype(np.float64), basis[ring]
    residual = np.linalg.norm(colors - np.median(colors, 0), axis=1)
    for _ in range(8):
        noise = max(float(np.median(residual)), 0.004)
        weight = 1 / (1 + (residual / (3 * noise)) ** 2)[:, None]
        ridge = np.diag([0, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4]) * len(rows)
        fit = np.linalg.solve((weight * rows).T @ rows + ridge * weight.mean(), (weight * rows).T @ colors)
        residual = np.linalg.norm(colors - rows @ fit, axis=1)
    return np.linalg.norm(pixels - basis @ fit, axis=2), float(np.median(residual))


def spread(seeds: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Cells of ``allowed`` that are connected to ``seeds`` along rows and columns: bool [H, W]."""
    reached = seeds & allowed
    while True:
        before = int(reached.sum())
        for turned in (False, True):
            a, r = (allowed.T, reached.T) if turned else (allowed, reached)
            runs = run_ids(a)
            hit = np.zeros(int(runs.max()) + 1, bool)
            hit[runs[r]] = True
            filled = hit[runs] & a
            reached = filled.T if turned else filled
        if int(reached.sum()) == before:
            return reached


def components(mask: np.ndarray) -> np.ndarray:
    """Labels int64 [H, W] from 1 on of the parts of ``mask`` connected along rows and columns; 0 outside."""
    far = mask.size
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), far)
    while True:
        before = labels
        for turned in (False, True):
            m, current = (mask.T, labels.T) if turned else (mask, labels)
            runs = run_ids(m)
            least = np.full(int(runs.max()) + 1, far)
            np.minimum.at(least, runs[m], current[m])
            current = np.where(m, least[runs], far)
            labels = current.T if turned else current
        if np.array_equal(labels, before):
            break
    _, numbered = np.unique(np.append(labels.ravel(), far), return_inverse=True)
    top = int(numbered[-1])
    return np.where(mask, numbered[:-1].reshape(mask.shape) + 1, 0) if top else np.zeros(mask.shape, int)


def run_ids(mask: np.ndarray) -> np.ndarray:
    """A number for every run of equal values along each row: int64 [H, W]."""
    starts = np.ones(mask.shape, bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    return starts.ravel().cumsum().reshape(mask.shape) - 1
