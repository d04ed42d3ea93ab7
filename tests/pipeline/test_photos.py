"""Photos of every kind that people have, and how they are cut out for the models."""

import sys

import icc
import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3.errors import InputError
from diff2to3.flow.framing import Framing
from diff2to3.pipeline import photo_files
from diff2to3.pipeline.photo_files import check_photo, open_photo
from diff2to3.pipeline.photos import (
    as_it_is,
    frame_cut_out,
    frame_like_trellis,
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


def test_a_gif_cut_within_its_second_frame(tmp_path):
    """Pillow counts the frames with an IndexError."""
    Image.new("P", (16, 16)).save(tmp_path / "a.gif")
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:-1] + b"," + bytes(8))
    for read in (open_photo, check_photo):
        with pytest.raises(InputError, match=r"a\.gif: not an image that can be read"):
            read(tmp_path / "a.gif")


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
    monkeypatch.setattr(photo_files, "MAX_PIXELS", 1000)
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
    monkeypatch.setattr(photo_files, "MAX_SIDE", 200)
    for ending in ("jpg", "png"):
        opened = save(tmp_path, base, f"large.{ending}", quality=95)
        assert opened.size == (200, 100)
        expected = np.asarray(base.resize((200, 100), Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(opened).astype(int) - expected).mean() < 2


# ---- colour profiles and samples ----


@pytest.mark.parametrize(
    ("primaries", "gamma"), [(icc.DISPLAY_P3, 2.2), (icc.ADOBE_RGB, 2.19921875), (icc.SRGB, 1.8)]
)
@pytest.mark.parametrize("kind", ["png", "tif", "webp", "RGBA", "shrunk"])
def test_profiles_of_rgb(tmp_path, monkeypatch, primaries, gamma, kind):
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (8, 10, 3), dtype=np.uint8)
    pixels = pixels.repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(pixels)
    if kind == "RGBA":
        image.putalpha(Image.fromarray(np.tri(64, 80, dtype=np.uint8) * 200))
    if kind == "shrunk":
        monkeypatch.setattr(photo_files, "MAX_SIDE", 40)
    ending = "png" if kind in ("RGBA", "shrunk") else kind
    options = {"lossless": True} if ending == "webp" else {}
    opened = save(tmp_path, image, f"a.{ending}", icc_profile=icc.rgb_profile(primaries, gamma), **options)
    expected = icc.srgb_of_rgb(pixels, primaries, gamma)
    found = np.asarray(opened)[..., :3]
    if kind == "shrunk":
        found, expected = found[2::4, 2::4], expected[4::8, 4::8]
        assert np.abs(found - expected).mean() < 4  # Lanczos rings a little beside edges
        return
    # matrices and curves are in 1/65536, and bytes round
    assert np.abs(found - expected).max() < 2
    assert np.abs(found.astype(float) - pixels).max() > 8  # the profile says something
    if kind == "RGBA":
        assert opened.mode == "RGBA" and np.array_equal(np.asarray(opened)[..., 3], np.asarray(image)[..., 3])
    again = prepare(opened, lambda i: frame_cut_out(i, Framing(32)), "none")  # not converted twice
    assert np.array_equal(np.asarray(again.cut_out)[..., :3], found)


@pytest.mark.parametrize("depth", [8, 16])
def test_profile_of_grey(tmp_path, depth):
    grey = np.arange(0, 240, 3, dtype=np.uint8).reshape(8, 10)
    image = Image.fromarray(grey if depth == 8 else grey.astype(np.uint16) * 257)
    opened = save(tmp_path, image, "a.png", icc_profile=icc.grey_profile(1.8))
    expected = icc.encoded((grey / 255.0) ** 1.8)
    assert np.abs(np.asarray(opened)[..., 1] - expected).max() < 2
    assert np.abs(expected - grey).max() > 15


def test_profile_of_cmyk(tmp_path):
    """Inks that are multiplied: cyan on paper, and black."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1)
    lab = np.array([94.0, 0, 4]) * (1 - inks[..., 3:]) + [-8, -10, -12] * inks[..., :1]
    lab = lab + [-12, 20, 0] * inks[..., 1:2] + [-3, -2, 30] * inks[..., 2:3]
    lab[..., 0] = lab[..., 0].clip(0, 100)
    used = inks.reshape(-1, 4).astype(np.uint8) * 255
    image = Image.frombytes("CMYK", (16, 8), np.tile(used, (8, 1)).tobytes())
    opened = save(tmp_path, image, "a.tif", icc_profile=icc.cmyk_profile(lab))
    expected = icc.srgb_of_lab(lab.reshape(-1, 3).round())
    light = expected.min(1) > 60  # black point compensation changes what is dark,
    light[0] = False  # and the paper becomes white
    assert light.sum() >= 6 and (np.asarray(opened)[0][0] == 255).all() and opened.mode == "RGB"
    assert np.abs(np.asarray(opened)[0][light] - expected[light]).max() < 2
    assert np.asarray(opened)[0][15].max() < 40


@pytest.mark.parametrize(
    "profile", [b"not a profile", icc.grey_profile(1.0), icc.rgb_profile(icc.SRGB, 1)[:200]]
)
def test_profiles_that_cannot_be_used_change_nothing(tmp_path, profile):
    pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    opened = save(tmp_path, Image.fromarray(pixels), "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(opened), pixels)


@pytest.mark.parametrize("top", [1.0, 1.5, 255.0, 65535.0])
def test_float_samples(tmp_path, top):
    """Renderers write 0 to 1, with some highlights above; others bytes or words as floats."""
    grey = np.linspace(0, 1, 120, dtype=np.float32).reshape(10, 12)
    values = grey * (1 if top <= 2 else top)
    values[0, :3] = np.nan, np.inf, top
    opened = save(tmp_path, Image.fromarray(values), "f.tif")
    found = np.asarray(opened)[..., 1]
    assert found[0, :3].tolist() == [0, 255, 255]
    assert np.abs(found[1:] - grey[1:] * 255).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_deep_samples_of_fewer_bits(tmp_path, bits):
    grey = np.linspace(0, 1, 120).reshape(10, 12)
    values = (grey * (2**bits - 1)).round().astype(np.uint16)
    opened = save(tmp_path, Image.fromarray(values), "deep.png")
    assert np.abs(np.asarray(opened)[..., 0] - grey * 255).max() <= 1


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="writes HEIC")
    pixels = np.full((64, 64, 3), (200, 80, 40), np.uint8)
    heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=100)
    assert np.abs(np.asarray(open_photo(tmp_path / "a.heic")).astype(int) - pixels).max() < 6


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC pictures need pi-heif: pip install"),
        ("photo", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC pictures need pi-heif: pip install"),
        ("a.CR2", b"II*\0\x10\0\0\0CR\x02" + bytes(40), "a camera's raw file; save it as JPEG"),
        ("a.exr", b"v/1\x01" + bytes(40), "a high-dynamic-range picture; save it as PNG"),
        ("a.svg", b"<svg/>", "a drawing, not a photo; save it as PNG"),
        ("a.png", b"text", "no kind of picture that is known"),
    ],
)
def test_what_pillow_does_not_read_is_named(tmp_path, monkeypatch, name, content, hint):
    for package in ("pi_heif", "pillow_heif"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_photo(tmp_path / name)
    assert f"{tmp_path / name}: not an image that can be read ({hint}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_photo(tmp_path):
    with pytest.raises(InputError, match="cannot be read: "):
        open_photo(tmp_path)


def test_glass_is_made_solid():
    """An object that is nowhere opaque, cut out by its transparency or by hand."""
    pixels = np.zeros((60, 60, 4), np.uint8)
    pixels[20:40, 10:50] = (200, 100, 50, 128)
    image = Image.fromarray(pixels)
    for method, used in (("auto", "alpha"), ("none", "none")):
        seen = prepare(image, lambda i: frame_cut_out(i, Framing(48, margin=1.2)), method)
        assert seen.method == used
        middle = seen.picture[:, 24, 24] * 255
        assert (middle - torch.tensor([200.0, 100, 50])).abs().max() < 2
        assert (seen.picture[:, 2, 2] == 0.5).all()


def test_no_object_and_a_single_pixel():
    for framer in (frame_like_trellis, lambda image, size: frame_cut_out(image, Framing(size))):
        with pytest.raises(InputError, match="all of it is transparent"):
            framer(Image.new("RGBA", (9, 9), (255, 0, 0, 10)), 64)
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
