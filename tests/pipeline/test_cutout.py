"""Cutting objects out of photos: by the border's colour on synthetic photos, by rembg (a stand-in), and what looks
wrong afterwards.
"""

import io
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.pipeline import cutout
from diff2to3.pipeline.cutout import components, cut_out, mask_problems, spread
from diff2to3.pipeline.photo_files import open_photo

SIZE = 240


@pytest.fixture(autouse=True)
def no_rembg(monkeypatch):
    """Whether or not it is installed."""
    monkeypatch.setitem(sys.modules, "rembg", None)


def mug():
    """bool [240, 240]: a body with a handle, whose hole is background."""
    y, x = np.mgrid[:SIZE, :SIZE]
    handle = (x - 160) ** 2 + (y - 120) ** 2
    return ((abs(x - 110) < 50) & (abs(y - 120) < 60)) | ((handle < 40**2) & (handle > 22**2) & (x > 110))


def photo_of(mask, background, noise=0.0):
    """A striped object on a background [H, W, 3], through JPEG."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    colors = np.stack([0.7 + 0.2 * np.sin(x / 5), 0.25 + 0.1 * np.cos(y / 9), 0.2 + 0 * x], -1)
    pixels = np.where(mask[..., None], colors, background) + noise * rng.standard_normal((SIZE, SIZE, 3))
    stream = io.BytesIO()
    Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return Image.open(stream)


def overlap(image, truth):
    found = np.asarray(image)[:, :, 3] > 127
    return (found & truth).sum() / (found | truth).sum()


def backgrounds():
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    return {
        "white": np.ones((SIZE, SIZE, 3)),
        "grey": np.full((SIZE, SIZE, 3), 0.5),
        "uneven light": np.stack([0.6 + 0.3 * y, 0.7 + 0.1 * x, 0.9 - 0.2 * y], -1),
        "vignette": (0.9 - 0.4 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))[..., None] * np.ones(3),
    }


@pytest.mark.parametrize("kind", ["white", "grey", "uneven light", "vignette"])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_plain_backgrounds_are_removed_and_the_hole_is_open(kind, noise):
    truth = mug()
    result = cut_out(photo_of(truth, backgrounds()[kind], noise), "border")
    assert result.method == "border" and result.notes == ()
    assert overlap(result.image, truth) > 0.97
    alpha = np.asarray(result.image)[:, :, 3]
    assert alpha[120, 175] == 0 and alpha[120, 110] == 255 and alpha[5, 5] == 0


def test_an_object_that_reaches_the_border_on_one_side():
    truth = np.zeros((SIZE, SIZE), bool)
    truth[80:, 70:180] = True
    result = cut_out(photo_of(truth, backgrounds()["uneven light"]), "border")
    assert overlap(result.image, truth) > 0.97 and result.notes == ()


def test_colours_stay_and_specks_go():
    truth = mug()
    background = backgrounds()["white"].copy()
    background[10:13, 10:13] = 0
    image = photo_of(truth, background)
    out = np.asarray(cut_out(image, "border").image)
    assert np.array_equal(out[..., :3], np.asarray(image)) and out[11, 11, 3] == 0


def test_large_photos_are_worked_on_small():
    truth = mug()
    image = photo_of(truth, backgrounds()["grey"]).resize((1200, 1200), Image.Resampling.BICUBIC)
    out = cut_out(image, "border").image
    assert out.size == (1024, 1024)
    large = np.asarray(Image.fromarray(truth).resize((1024, 1024)))
    assert overlap(out, large) > 0.96


def test_transparency_comes_first_and_none_takes_everything():
    clear = Image.new("RGBA", (20, 20), (1, 2, 3, 0))
    assert cut_out(clear).method == "alpha"
    whole = cut_out(photo_of(mug(), backgrounds()["white"]), "none")
    assert whole.method == "none" and whole.image.getextrema()[3] == (255, 255)


def corners_cut(alpha, radius, value=0):
    """Rounded corners, in place."""
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]]
    y = np.maximum(np.maximum(radius - y, y - (alpha.shape[0] - 1 - radius)), 0)
    x = np.maximum(np.maximum(radius - x, x - (alpha.shape[1] - 1 - radius)), 0)
    alpha[x**2 + y**2 > radius**2] = value


def useless_alpha(kind):
    """uint8 [240, 240] of which nothing is learnt."""
    alpha = np.full((SIZE, SIZE), 255, np.uint8)
    if kind == "rounded a little":
        corners_cut(alpha, 8)
    elif kind == "rounded":
        corners_cut(alpha, 40)
    elif kind == "lost pixels":
        alpha[
            np.random.default_rng(0).integers(0, SIZE, 30), np.random.default_rng(1).integers(0, SIZE, 30)
        ] = 0
    elif kind == "lost row":
        alpha[0] = 0
    elif kind == "veil":
        alpha[:] = 250
    elif kind == "half veil":
        alpha[:] = 128
    elif kind == "vignette":
        alpha[:] = 255 - np.abs(np.arange(SIZE) - SIZE // 2).astype(np.uint8)
    elif kind == "window with a shadow":
        y = np.abs(np.arange(SIZE) - (SIZE - 1) / 2)
        outside = np.maximum(np.maximum.outer(y, y) - 98, 0)
        alpha[:] = np.where(outside > 0, np.clip(100 - 4 * outside, 0, 100), 255)
        corners_cut(alpha[22:-22, 22:-22], 6, 60)
    return alpha


@pytest.mark.parametrize(
    "kind",
    [
        "rounded a little",
        "rounded",
        "lost pixels",
        "lost row",
        "veil",
        "half veil",
        "vignette",
        "window with a shadow",
    ],
)
def test_transparency_that_separates_nothing_is_no_cut_out(kind):
    """Screenshots and thumbnails: the object is found by its colour, as in the photo without the alpha channel."""
    truth = mug()
    image = photo_of(truth, backgrounds()["grey"]).convert("RGBA")
    alpha = useless_alpha(kind)
    image.putalpha(Image.fromarray(alpha))
    result = cut_out(image, "border")
    assert result.method == "border" and result.notes == ()
    if kind == "window with a shadow":
        truth = truth[22:-22, 22:-22]
    if kind == "lost row":
        truth = truth[1:]
    assert overlap(result.image, truth) > 0.96


def test_transparency_that_separates_is_kept():
    boxes = {}
    for name, (top, left) in {
        "crate": (40, 60),
        "wide": (90, 10),
        "tall": (0, 70),
        "to the corner": (60, 60),
    }.items():
        alpha = np.zeros((SIZE, SIZE), np.uint8)
        alpha[top : (SIZE if name == "to the corner" else SIZE - top), left : SIZE - left] = 255
        boxes[name] = alpha
    boxes["mug"] = mug() * np.uint8(255)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    boxes["plate to the rims"] = (x**2 + y**2 < 120**2) * np.uint8(255)
    boxes["frame"] = np.full((SIZE, SIZE), 255, np.uint8)
    boxes["frame"][30:-30, 30:-30] = 0
    boxes["mug of glass"] = mug() * np.uint8(120)
    for name, alpha in boxes.items():
        image = photo_of(mug(), backgrounds()["grey"]).convert("RGBA")
        image.putalpha(Image.fromarray(alpha))
        result = cut_out(image)
        assert result.method == "alpha" and np.array_equal(np.asarray(result.image)[..., 3], alpha), name


def test_public_screenshot_with_round_corners(shared):
    """TRELLIS.2's issue 35: 368 clear pixels made the whole picture the object."""
    folder = shared / "cases" / "photo"
    rounded, plain = (
        cut_out(open_photo(folder / f"suv_{k}.png"), "border") for k in ("rounded_screenshot", "plain")
    )
    assert rounded.method == "border"
    assert overlap(rounded.image, np.asarray(plain.image)[:, :, 3] > 127) > 0.99


@pytest.mark.parametrize("color", ["black", "white", (90, 20, 10)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_one_colour_is_no_object(color, mode):
    with pytest.raises(InputError, match="same colour"):
        cut_out(Image.new(mode, (64, 64), color))


def test_what_looks_wrong():
    empty, full = np.zeros((40, 40), np.uint8), np.full((40, 40), 255, np.uint8)
    with pytest.raises(InputError, match="no object: all of it looks like background"):
        mask_problems(empty)
    assert "covers the whole picture" in mask_problems(full)[0]
    cross = empty.copy()
    cross[18:22], cross[:, 18:22] = 255, 255
    assert "touches all four borders" in mask_problems(cross)[0]
    cross[0] = 0
    assert mask_problems(cross) == []


def test_a_busy_photo_is_warned_about():
    rng = np.random.default_rng(1)
    busy = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    result = cut_out(busy)
    assert (
        "it is not clear what the object is; look at the cut-out, and if it is wrong give a PNG"
        in result.notes[0]
    )


def test_the_network_and_the_border_agree_on_plain_backgrounds():
    """The border's outline is sharper."""
    result = cut_out(photo_of(mug(), backgrounds()["grey"]))
    assert result.method == "border" and result.notes == () and overlap(result.image, mug()) > 0.97


def test_a_background_that_is_not_plain_is_removed_by_the_network():
    """A shadowed floor with a pattern: the border's colour says nothing."""
    y, x = np.mgrid[:SIZE, :SIZE]
    floor = (
        np.where((y > 130)[..., None], [0.45, 0.4, 0.3], [0.75, 0.8, 0.85]) + 0.06 * np.sin(x / 3)[..., None]
    )
    truth = (x - 120) ** 2 + (y - 120) ** 2 < 60**2
    shadow = ((x - 130) / 70) ** 2 + ((y - 182) / 14) ** 2 < 1
    photo = photo_of(truth, np.where(shadow[..., None], 0.5 * floor, floor), 0.01)
    assert overlap(cut_out(photo, "border").image, truth) < 0.8
    for method in ("auto", "u2netp"):
        result = cut_out(photo, method)
        assert result.method == "u2netp" and overlap(result.image, truth) > 0.9


# ---- rembg ----


def stand_in(monkeypatch, remove, weights="u2net.onnx"):
    module, sessions, u2net = (
        types.ModuleType(n) for n in ("rembg", "rembg.sessions", "rembg.sessions.u2net")
    )
    module.remove, module.new_session = remove, lambda name: f"session of {name}"

    class U2netSession:
        @classmethod
        def resolve_existing(cls, name):
            return weights if name == "u2net.onnx" else None

    u2net.U2netSession = U2netSession
    for loaded in (module, sessions, u2net):
        monkeypatch.setitem(sys.modules, loaded.__name__, loaded)


def test_rembg_is_used_where_it_is_installed(monkeypatch):
    seen = []

    def remove(image, session):
        seen.append((image.size, image.mode, session))
        result = image.convert("RGBA")
        result.putalpha(Image.fromarray(np.tri(image.height, image.width, dtype=np.uint8) * 255))
        return result

    stand_in(monkeypatch, remove)
    image = photo_of(mug(), backgrounds()["white"]).resize((1400, 700))
    result = cut_out(image)
    # named: the library's own default model may not be used commercially
    assert seen == [((1024, 512), "RGB", "session of u2net")]
    assert result.method == "rembg" and result.notes == () and result.image.mode == "RGBA"
    opaque = image.convert("RGBA")  # an alpha channel that says nothing
    assert cut_out(opaque).method == "rembg"
    assert cut_out(image, "border").method == "border" and len(seen) == 2


@pytest.mark.parametrize("offline", [False, True])
def test_without_rembg_or_its_weights(monkeypatch, offline):
    image = photo_of(mug(), backgrounds()["white"])
    with pytest.raises(MissingDependencyError, match=r"pip install .diff2to3\[photos\]. \(or give a PNG"):
        cut_out(image, "rembg")

    def fails(image, session):
        raise OSError("no route to github.com\nmore")

    stand_in(monkeypatch, fails, weights=None)
    reason = "not on this machine" if offline else "rembg failed: no route to github.com"
    result = cut_out(image, offline=offline)
    assert result.method == "border" and reason in result.notes[0] and "\n" not in result.notes[0]
    assert "the smaller network in this package was used" in result.notes[0]
    with pytest.raises(InputError, match=reason):
        cut_out(image, "rembg", offline=offline)


# ---- connected parts ----


def parts_by_search(mask):
    """Labels by breadth-first search."""
    labels, number = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        number += 1
        queue, labels[start] = [start], number
        while queue:
            y, x = queue.pop()
            for n in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = 0 <= n[0] < mask.shape[0] and 0 <= n[1] < mask.shape[1]
                if inside and mask[n] and not labels[n]:
                    labels[n] = number
                    queue.append(n)
    return labels


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_components_and_spreading_against_a_search(height, width, seed, density):
    mask = np.random.default_rng(seed).random((height, width)) < density
    expected, found = parts_by_search(mask), components(mask)
    assert np.array_equal(found > 0, mask)
    pairs = set(zip(expected[mask].tolist(), found[mask].tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == expected.max()
    seeds = np.zeros_like(mask)
    seeds[0] = True
    reached = np.isin(expected, np.unique(expected[0][mask[0]])) & mask
    assert np.array_equal(spread(seeds, mask), reached)


def test_methods_are_checked():
    assert cutout.METHODS[0] == "auto"
    with pytest.raises(InputError, match="expected one of auto, rembg, u2netp, border, none"):
        cut_out(Image.new("RGB", (9, 9)), "magic")
