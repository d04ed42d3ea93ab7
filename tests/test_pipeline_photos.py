"""Photos of every kind that people have, and how they are cut out for the models."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.pipeline import photos
from diff2to3.pipeline.photos import open_photo, prepare_photo, to_tensor


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
    frames = [base, base.transpose(Image.Transpose.ROTATE_180)]
    first = save(tmp_path, frames[0], "film.png", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(first.convert("RGB")), expected)


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
    with pytest.raises(InputError, match=r"a\.png: 64 × 64 pixels are too many"):
        open_photo(tmp_path / "a.png")
    with pytest.raises(InputError, match="no such file"):
        open_photo(tmp_path / "c.png")


def test_no_object_and_a_single_pixel():
    with pytest.raises(InputError, match="nothing in it is more than 80 % opaque"):
        prepare_photo(Image.new("RGBA", (9, 9), (255, 0, 0, 200)))
    with pytest.raises(InputError, match="smaller than two pixels"):
        prepare_photo(cut_out(box=(5, 5, 5, 5)))


def test_opaque_photos_go_through_background_removal(monkeypatch):
    seen = []

    def remove(image, session):
        seen.append((image.size, image.mode, session))
        return cut_out(*image.size, box=(10, 10, 50, 50))

    rembg = types.ModuleType("rembg")
    rembg.remove, rembg.new_session = remove, lambda name: name
    monkeypatch.setitem(sys.modules, "rembg", rembg)
    out = prepare_photo(Image.new("RGB", (4096, 2048)))
    assert seen == [((1024, 512), "RGB", "u2net")] and out.size == (518, 518)
    prepare_photo(Image.new("RGBA", (100, 80), (1, 2, 3, 255)))  # an alpha channel that says nothing
    assert len(seen) == 2
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .rembg\[cpu\]. \(or give a PNG"):
        prepare_photo(Image.new("RGB", (64, 64)))


def test_to_tensor():
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[0, 5] = (255, 0, 51)
    out = to_tensor([Image.fromarray(pixels)], 6)
    assert out.shape == (1, 3, 6, 6)
    assert out[0, :, 0, 5].tolist() == pytest.approx([1.0, 0.0, 0.2])
