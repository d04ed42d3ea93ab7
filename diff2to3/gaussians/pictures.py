"""Frames as a file: a sheet (PNG), an animation (GIF), or a film (MP4, with the optional package imageio-ffmpeg)."""

from __future__ import annotations

import io
import math
import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.files import write_atomic

#: File endings that write_frames knows.
FORMATS = (".png", ".gif", ".mp4")


def check_format(path: Path) -> None:
    """Raise before any work is done if ``path`` cannot be written: unknown ending, missing package or folder."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{path}: cannot write {path.suffix or 'a file without ending'}; use one of {', '.join(FORMATS)}"
        )
    if path.suffix.lower() == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise MissingDependencyError("imageio-ffmpeg", hint="pip install imageio-ffmpeg, or write a .gif")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist")


def write_frames(path: Path, frames: np.ndarray, fps: int = 24) -> None:
    """Write frames uint8 [V, H, W, 3] as the file's ending says; nothing is left behind if that fails."""
    check_format(path)
    writers: dict[str, Callable[[Path, np.ndarray, int], None]] = {
        ".png": write_sheet,
        ".gif": write_gif,
        ".mp4": write_mp4,
    }
    try:
        writers[path.suffix.lower()](path, frames, fps)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def sheet(frames: np.ndarray) -> np.ndarray:
    """Frames [V, H, W, 3] side by side in rows of about √(2 V) on white: one picture, wider than high."""
    v, h, w, _ = frames.shape
    columns = min(v, math.ceil(math.sqrt(2 * v)))
    rows = math.ceil(v / columns)
    out = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        top, left = i // columns * h, i % columns * w
        out[top : top + h, left : left + w] = frame
    return out


def write_sheet(path: Path, frames: np.ndarray, fps: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(sheet(frames)).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def write_gif(path: Path, frames: np.ndarray, fps: int) -> None:
    """One palette for all frames, so that colours do not flicker from frame to frame."""
    palette = Image.fromarray(sheet(frames)).quantize(255, method=Image.Quantize.MEDIANCUT)
    images = [
        Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for f in frames
    ]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
        optimize=False,
    )
    write_atomic(path, buffer.getvalue())


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264 through the ffmpeg binary that imageio-ffmpeg carries; sides are made even, as the format wants."""
    import imageio_ffmpeg

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
        "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an", "-c:v", "libx264", "-crf", "18",
        "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(temporary),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, input=np.ascontiguousarray(frames).tobytes(), capture_output=True)
        if done.returncode != 0:
            raise InputError(f"{path}: ffmpeg failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
