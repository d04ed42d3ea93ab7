"""Image files as people have them, decoded to 8-bit sRGB: profiles, deep and float samples, orientation, HEIC."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from diff2to3.errors import InputError
from diff2to3.pipeline.cutout import shrunk

MAX_PIXELS = 100_000_000
MIN_SIDE = 8
#: Photos are shrunk to this side when they are opened.
MAX_SIDE = 4096
#: Formats whose further frames are an animation, rather than pages, thumbnails or depth maps.
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")
#: What "ftyp" boxes of HEIC files name.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
#: Endings of pictures that Pillow does not read, and what to do.
OTHER_KINDS = {
    (
        ".heic",
        ".heif",
        ".hif",
    ): 'HEIC pictures need pi-heif: pip install "diff2to3[photos]"; or save it as JPEG',
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"): "a camera's raw file; save it as JPEG",
    (".exr", ".hdr"): "a high-dynamic-range picture; save it as PNG or JPEG",
    (".svg", ".pdf", ".ai", ".eps"): "a drawing, not a photo; save it as PNG",
    (".tif", ".tiff"): "a kind of TIFF that Pillow does not read; save it with 8 or 16 bits a channel",
    (".avif",): "AVIF pictures need Pillow 11.3 or newer: pip install -U pillow; or save it as JPEG",
}


def open_photo(path: str | Path) -> Image.Image:
    """Decode an image file: RGBA if it has transparency, else RGB; in sRGB, whatever profile it has; turned as its EXIF
    says; shrunk to at most 4096 pixels a side.

    Raises:
        InputError: no such file, not an image, damaged, an animation, too small, or more than 100 million pixels.
    """
    with opened(path) as image:
        try:
            # decodes large JPEGs at a fraction of their size; colours stay as the profile means them
            image.draft(None, (MAX_SIDE, MAX_SIDE))
            image.load()
            # a palette has no colours between its own, so shrinking comes after the conversion
            return shrunk(to_8_bit(ImageOps.exif_transpose(image)), MAX_SIDE)
        except Exception as error:  # decoders raise whatever the damage makes them meet
            raise unreadable(Path(path), error) from error


def check_photo(path: str | Path) -> None:
    """What can be told without decoding the pixels; InputError as :func:`open_photo`."""
    opened(path).close()


def opened(path: str | Path) -> Image.Image:
    """The file's header, checked."""
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below says it better
            if is_heic(path):
                register_heic()
            image = Image.open(path)
            animated = image.format in ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: has too many pixels; at most 10⁸ can be read, shrink it first") from error
    except Exception as error:
        raise unreadable(path, error) from error
    problem = ""
    if image.width * image.height > MAX_PIXELS:
        problem = (
            f"{image.width} × {image.height} pixels are too many; at most 10⁸ can be read, shrink it first"
        )
    elif min(image.size) < MIN_SIDE:
        problem = f"{image.width} × {image.height} pixels are too few; at least {MIN_SIDE} a side"
    elif animated:
        problem = "an animation, not a photo; save one of its frames as a picture"
    if problem:
        image.close()
        raise InputError(f"{path}: {problem}")
    return image


def unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(f"{path}: cannot be read: {error.strerror or error}")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnidentifiedImageError):
        reason = "no kind of picture that is known"
        kind = ".heic" if is_heic(path) else path.suffix.lower()
        hints = [hint for endings, hint in OTHER_KINDS.items() if kind in endings]
        if hints and path.stat().st_size:
            reason = hints[0]
    return InputError(f"{path}: not an image that can be read ({reason})")


def is_heic(path: Path) -> bool:
    """By its first bytes: phones name these files as they like."""
    with open(path, "rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def register_heic() -> None:
    """Let Pillow read HEIC, by whichever of the two packages is installed; with neither, Pillow knows no such file."""
    try:
        from pi_heif import register_heif_opener
    except ImportError:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return
    register_heif_opener()


# ---- samples ----


def to_8_bit(image: Image.Image) -> Image.Image:
    """RGB or RGBA, 8 bits a channel, sRGB-encoded."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = scaled(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if isinstance(profile, bytes) and profile:
        alpha = image.convert("RGBA").getchannel("A") if transparent else None
        converted = to_srgb(image, profile)
        if converted is not None:
            if alpha is not None:
                converted.putalpha(alpha)
            return converted
    if image.mode in ("RGB", "RGBA") and "transparency" not in image.info:
        return image
    return image.convert("RGBA" if transparent else "RGB")


def scaled(image: Image.Image) -> Image.Image:
    """Grey with 8 bits of integer or float samples. White is what the brightest sample suggests: 1 or 2⁸ − 1 (floats),
    2⁸ − 1, 2¹⁰ − 1, 2¹² − 1 or 2¹⁶ − 1. NaN is black.
    """
    values = np.asarray(image).astype(np.float32)
    finite = values[np.isfinite(values)]
    brightest = float(finite.max(initial=0))
    whites: tuple[float, ...] = (255.0, 65535.0) if image.mode == "F" else (255.0, 1023.0, 4095.0, 65535.0)
    if image.mode == "F" and brightest <= 2:  # some above 1, as renderers write highlights
        whites = (1.0,)
    white = next((white for white in whites if brightest <= white), whites[-1])
    bytes_ = np.clip(np.nan_to_num(values, posinf=white) * (255 / white) + 0.5, 0, 255)
    return Image.fromarray(bytes_.astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """RGB by an embedded ICC profile. None where the profile is damaged or of another colour space than the pixels:
    programs then show the pixels as they are.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(space)
        grey = image.mode in ("1", "L", "LA", "La")
        fits = (
            grey if mode == "L" else image.mode == mode if mode in ("CMYK", "LAB") else image.mode != "CMYK"
        )
        if mode is None or not fits:
            return None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        pixels = image.convert(mode)
        pixels.info.pop("transparency", None)
        srgb = ImageCms.createProfile("sRGB")
        out = ImageCms.profileToProfile(pixels, source, srgb, intent, outputMode="RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if out is not None:
        out.info.pop("icc_profile", None)
    return out
