"""Photos of every kind that people have, and how they are cut out for the models."""

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.flow.framing import Framing
from diff2to3.pipeline import photos
from diff2to3.pipeline.photos import (
    as_it_is,
    check_photo,
    frame_cut_out,
    frame_like_trellis,
    open_photo,
    prepare,
)


def prepare_photo(image):
    """TRELLIS's picture as bytes [518, 518, 3]."""
    out = frame_like_trellis(image, 518)
    return (out.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def cut_out(width=200, height=120, box=(30, 20, 110, 60), color=(200, 100, 50)):
    """A rectangle of one colour, inclusive pixel bounds, on transparency."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., :3] = 255  # white where transparent: must not shine through
    left, top, right, bottom = box
    pixels[top : bottom + 1, left : right + 1] = (*color, 255)
    return Image.fromarray(pixels)


def test_object_is_centred_with_the_margin_on_black():
    """Box 80 × 40 → crop of 96 a side around its centre → 518: the object is 80/96 as wide."""
    out = np.asarray(prepare_photo(cut_out()))
    assert out.shape == (518, 518, 3)
    inside = (np.abs(out.astype(int) - (200, 100, 50)) <= 1).all(-1)
    rows, columns = np.nonzero(inside)
    scale = 518 / 96
    # the crop starts 48 pixels left of the centre x = 70 and above y = 40
    assert columns.min() == pytest.approx((30 - 22) * scale, abs=9)
    assert columns.max() == pytest.approx((111 - 22) * scale, abs=9)
    assert rows.min() == pytest.approx((20 + 8) * scale, abs=9)
    assert rows.max() == pytest.approx((61 + 8) * scale, abs=9)
    assert (out[: rows.min() - 25] == 0).all() and (out[:, : columns.min() - 25] == 0).all()
    middle = slice(rows.min() + 20, rows.max() - 20), slice(columns.min() + 20, columns.max() - 20)
    assert inside[middle].all()


def test_half_transparent_pixels_are_premultiplied_and_do_not_count_as_object():
    image = np.asarray(cut_out()).copy()
    image[20:61, 111:150] = (255, 255, 255, 128)
    out = np.asarray(prepare_photo(Image.fromarray(image)))
    reference = np.asarray(prepare_photo(cut_out()))
    same = np.abs(out.astype(int) - reference).max(-1) <= 2
    assert same[:, :450].all()  # the crop is the same: the veil is not part of the box
    assert out[250, 517].tolist() == [128, 128, 128]


def save(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return open_photo(tmp_path / name)


def test_modes_and_formats(tmp_path):
    base = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
    expected = np.asarray(base)
    assert np.array_equal(np.asarray(save(tmp_path, base, "a.png")), expected)
    grey = base.convert("L")
    opened = save(tmp_path, grey, "grey.png")
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened)[..., 1], np.asarray(grey))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(save(tmp_path, deep, "deep.png"))[..., 0], np.asarray(grey))
    palette = save(tmp_path, base.quantize(8), "palette.png")
    assert palette.mode == "RGB" and palette.size == base.size
    cmyk = save(tmp_path, base.convert("CMYK"), "cmyk.tif")
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk).astype(int) - expected).max() <= 2
    seen = save(tmp_path, base.quantize(8), "see.gif", transparency=0)
    assert seen.mode == "RGBA" and (np.asarray(seen)[..., 3] == 0).any()
    light = save(tmp_path, grey.convert("LA"), "la.png")
    assert light.mode == "RGBA"
    pages = [base, base.transpose(Image.Transpose.ROTATE_180)]
    first = save(tmp_path, pages[0], "scan.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(np.asarray(first), expected)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32))
    assert np.array_equal(np.asarray(save(tmp_path, floats, "f.tif"))[..., 0], np.asarray(grey))
    black = save(tmp_path, Image.fromarray(np.zeros((10, 12), np.uint16)), "black.png")
    assert black.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_animations_are_refused(tmp_path, ending):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    for read in (open_photo, check_photo):
        with pytest.raises(InputError, match=rf"a\.{ending}: an animation, not a photo"):
            read(tmp_path / f"a.{ending}")
    frames[0].save(tmp_path / f"still.{ending}")
    assert open_photo(tmp_path / f"still.{ending}").size == (16, 16)


def test_exif_orientation(tmp_path):
    base = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90°
    opened = save(tmp_path, base, "turned.png", exif=exif)
    assert np.array_equal(np.asarray(opened), np.rot90(np.asarray(base), -1))


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: not an image that can be read"):
        open_photo(tmp_path / "a.png")


def test_truncated_and_oversized_and_missing(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"b\.png: not an image"):
        open_photo(tmp_path / "b.png")
    monkeypatch.setattr(photos, "MAX_PIXELS", 1000)
    for read in (open_photo, check_photo):
        with pytest.raises(InputError, match=r"a\.png: 64 × 64 pixels are too many"):
            read(tmp_path / "a.png")
        with pytest.raises(InputError, match="no such file"):
            read(tmp_path / "c.png")


def test_sizes_that_the_header_tells(tmp_path, monkeypatch):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match=r"tiny\.png: 1 × 1 pixels are too few"):
        check_photo(tmp_path / "tiny.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above twice this, Pillow refuses by itself
    with pytest.raises(InputError, match=r"a\.png: has too many pixels"):
        check_photo(tmp_path / "a.png")


@pytest.mark.filterwarnings("error")
def test_large_photos_are_shrunk(tmp_path, monkeypatch):
    y, x = np.mgrid[:400, :800]
    base = Image.fromarray(np.stack([x // 4, y // 2, x * 0], -1).astype(np.uint8))
    monkeypatch.setattr(photos, "MAX_SIDE", 200)
    for ending in ("jpg", "png"):
        opened = save(tmp_path, base, f"large.{ending}", quality=95)
        assert opened.size == (200, 100)
        expected = np.asarray(base.resize((200, 100), Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(opened).astype(int) - expected).mean() < 2


def test_no_object_and_a_single_pixel():
    for framer in (frame_like_trellis, lambda image, size: frame_cut_out(image, Framing(size))):
        with pytest.raises(InputError, match="nothing in it is more than 80 % opaque"):
            framer(Image.new("RGBA", (9, 9), (255, 0, 0, 200)), 64)
        with pytest.raises(InputError, match="smaller than three pixels"):
            framer(cut_out(box=(5, 5, 5, 5)), 64)


def test_our_framing_is_that_of_training():
    """The object's longer side takes 1/margin of the picture; grey behind it; colours in [0, 1]."""
    out = frame_cut_out(cut_out(box=(30, 20, 109, 59)), Framing(128, margin=1.6, background=0.5))
    inside = (out - torch.tensor([200, 100, 50])[:, None, None] / 255).abs().max(0).values < 0.01
    rows, columns = (inside.any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert (int(columns[0]), int(columns[-1])) == pytest.approx((24, 103), abs=1)
    assert (int(rows[0]), int(rows[-1])) == pytest.approx((44, 83), abs=1)
    assert (out[:, :20] == 0.5).all()


def test_prepare_says_how_it_cut_out():
    seen = prepare(cut_out(), lambda image: frame_cut_out(image, Framing(32)))
    assert seen.method == "alpha" and seen.notes == () and seen.picture.shape == (3, 32, 32)
    whole = prepare(Image.new("RGB", (40, 40), "red"), lambda i: frame_cut_out(i, Framing(32)), "none")
    assert whole.method == "none" and (whole.picture[0] == 1).sum() > 600


def test_as_it_is():
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[0, 5] = (255, 0, 51, 255)
    out = as_it_is(Image.fromarray(pixels), 6, 0.25)
    assert out.shape == (3, 6, 6)
    assert out[:, 0, 5].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert out[:, 3, 3].tolist() == [0.25] * 3
