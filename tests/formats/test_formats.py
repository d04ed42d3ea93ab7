"""Every file format of 3D Gaussians: round trips, other programs' readings, axes, damaged files."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diff2to3 import cli
from diff2to3.errors import InputError
from diff2to3.formats import (
    FORMATS,
    FRAMES,
    WRITABLE,
    decode,
    encode,
    find_format,
    format_named,
    read,
    sog,
    spz,
    write,
)
from diff2to3.formats.frames import into_frame, out_of_frame
from diff2to3.formats.screen_filter import PIXEL, VIEWER_FILTER, bake
from diff2to3.gaussians.render import render
from diff2to3.types import Gaussians

C0 = 0.28209479177387814
#: What each format may lose: position, log scale, degrees of rotation, opacity, colour (mean), higher coefficients.
QUANTA = {
    "ply": (0, 1e-5, 0.1, 1e-5, 1e-6, 1e-6),
    "glb": (0, 1e-6, 0.1, 1e-6, 1e-6, 1e-6),
    "compressed.ply": (1e-3, 0.01, 0.4, 0.003, 0.003, 0.03),
    "splat": (0, 1e-6, 1.2, 0.003, 0.003, None),
    "spz": (1.3e-4, 0.0321, 0.3, 0.003, 0.003, 0.1),
    "sog": (2e-5, 0.1, 1.0, 0.003, 0.003, 0.2),
    "gaussforge ply": (0, 1e-5, 0.1, 1e-5, 1e-6, 1e-6),
    "gaussforge compressed.ply": (1e-3, 0.01, 0.4, 0.003, 0.003, 0.03),
    "gaussforge splat": (0, 1e-6, 1.2, 0.005, 0.005, None),
    "gaussforge spz": (1.3e-4, 0.0321, 0.3, 0.003, 0.003, 0.1),
    "gaussforge sog": (2e-5, 0.2, 2.0, 0.006, 0.02, 0.2),
    "gaussforge ksplat": (1e-3, 0.03, 1.2, 0.005, 0.003, 0.1),
}


def random_gaussians(count: int, coefficients: int = 1, seed: int = 0) -> Gaussians:
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.rand(count, 3, generator=g) - 0.5,
        torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=-1),
        torch.rand(count, 3, generator=g) * 0.03 + 0.001,
        torch.rand(count, generator=g),
        torch.cat(
            [
                (torch.rand(count, 1, 3, generator=g) - 0.5) / C0,
                torch.randn(count, coefficients - 1, 3, generator=g) * 0.15,
            ],
            1,
        ),
    )


def in_order_of(read_back: Gaussians, want: Gaussians) -> Gaussians:
    """``want`` in the order of ``read_back``: formats sort. Each Gaussian's nearest must be another one's."""
    nearest = torch.cdist(read_back.means.double(), want.means.double()).argmin(1)
    assert len(nearest.unique()) == len(want) == len(read_back)
    return Gaussians(*(x[nearest] for x in (want.means, want.quats, want.scales, want.opacities, want.sh)))


def degrees_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (a, b))
    return 2 * torch.rad2deg(torch.asin(((a - b).norm(dim=1).minimum((a + b).norm(dim=1)) / 2).clamp(max=1)))


def assert_close(got: Gaussians, want: Gaussians, name: str) -> None:
    mean, scale, angle, opacity, color, higher = QUANTA[name]
    want = in_order_of(got, want)
    assert (got.means - want.means).abs().max() <= mean
    assert (got.scales.log() - want.scales.log()).abs().max() <= scale
    assert degrees_apart(got.quats, want.quats).max() <= angle
    assert (got.opacities - want.opacities).abs().max() <= opacity
    assert ((got.sh[:, 0] - want.sh[:, 0]).abs() * C0).mean() <= color
    if higher is None:
        assert got.sh.shape[1] == 1
    elif want.sh.shape[1] > 1:
        assert (got.sh[:, 1:] - want.sh[:, 1:]).abs().max() <= higher


@pytest.mark.parametrize(
    ("coefficients", "frame"), [(1, None), (4, None), (9, None), (16, None), *((9, f) for f in FRAMES)]
)
@pytest.mark.parametrize("name", WRITABLE)
def test_round_trip(name: str, coefficients: int, frame: str | None) -> None:
    want = random_gaussians(300, coefficients)
    data = encode(want, FORMATS[name], {"screen_filter": 0.1, "seed": 7}, frame=frame)
    got, metadata = decode(data, FORMATS[name], "a", frame)
    assert_close(got, want, name)
    assert metadata["frame"] == "right-handed, z up"
    if name not in ("splat", "spz"):  # which have no place for it
        assert metadata["seed"] == 7 and metadata["screen_filter"] == 0.1
        assert_close(decode(data, FORMATS[name], "a")[0], want, name)  # the file says its frame


def test_spz_4_holds_what_3_does() -> None:
    want = random_gaussians(200, 16)
    three, four = (spz.write(want, {"screen_filter": 0.1}, version=v) for v in (3, 4))
    for x, y in zip(
        spz.read(three, "a")[0].__dict__.values(), spz.read(four, "a")[0].__dict__.values(), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert spz.read(four, "a")[1]["antialiased"] is True


def test_frames_turn_what_is_seen_and_back() -> None:
    want = random_gaussians(50, 16)
    for name in FRAMES:
        there = into_frame(want, name)
        back = out_of_frame(there, name)
        torch.testing.assert_close(back.means, want.means, rtol=0, atol=0)
        torch.testing.assert_close(back.sh, want.sh, rtol=0, atol=2e-5)
    x, y, z = want.means.unbind(1)
    torch.testing.assert_close(into_frame(want, "y-down").means, torch.stack((x, -z, y), 1))
    torch.testing.assert_close(into_frame(want, "y-up").means, torch.stack((x, z, -y), 1))


# ---- other programs ----


def by_gaussforge(data: bytes, kind: str) -> Gaussians:
    """What gaussforge reads, which it hands over as a plain .ply; as it stands in the file."""
    gaussforge = pytest.importorskip("gaussforge")
    made = gaussforge.GaussForge().convert(data, kind, "ply")
    assert "error" not in made, made
    return decode(made["data"], FORMATS["ply"], "a", "native")[0]


@pytest.mark.parametrize("name", ["ply", "compressed.ply", "splat", "spz", "sog"])
def test_gaussforge_reads_what_we_write(name: str) -> None:
    want = random_gaussians(300)
    got = by_gaussforge(encode(want, FORMATS[name]), name)
    assert_close(got, into_frame(want, FORMATS[name].frame), name)


@pytest.mark.parametrize("name", ["ply", "compressed.ply", "splat", "spz", "sog", "ksplat"])
def test_we_read_what_gaussforge_writes(name: str) -> None:
    gaussforge = pytest.importorskip("gaussforge")
    want = random_gaussians(300)
    made = gaussforge.GaussForge().convert(encode(want, FORMATS["ply"]), "ply", name)
    assert "error" not in made, made
    # it leaves .spz in the axes of its input, where the format's own text has y up
    got, _ = decode(made["data"], FORMATS[name], "a", "y-down")
    assert_close(got, want, f"gaussforge {name}")


# ---- pictures ----


def picture(gaussians: Gaussians, **options: float | bool) -> torch.Tensor:
    viewmat = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 2], [0, 0, 0, 1]])
    focal = 64 / 2 / 0.36397
    K = torch.tensor([[focal, 0, 32], [0, focal, 32], [0, 0, 1]])
    return render(gaussians, viewmat[None], K[None], 64, 64, background=1.0, **options).colors


@pytest.mark.parametrize(("name", "least"), [("ply", 80), ("glb", 80), ("compressed.ply", 40), ("splat", 38),
                                             ("spz", 38), ("sog", 38)])  # fmt: skip
def test_pictures_after_reload(name: str, least: float) -> None:
    want = random_gaussians(1500)
    got, _ = decode(encode(want, FORMATS[name]), FORMATS[name], "a")
    error = (picture(got) - picture(want)).square().mean()
    assert -10 * torch.log10(error + 1e-12) >= least


def test_a_baked_filter_looks_right_in_viewers_that_blur_more() -> None:
    """Thin Gaussians, of less than a pixel, seen at the resolution that the filter is baked for."""
    want = random_gaussians(400)
    pixel = 2 / (64 / 2 / 0.36397)
    want = Gaussians(want.means, want.quats, want.scales * 0.3, want.opacities, want.sh)
    truth = picture(want, eps2d=0.1, antialiased=True)
    errors = []
    for shown in (want, bake(want, 0.1, pixel)[0]):
        seen = picture(shown, eps2d=VIEWER_FILTER, antialiased=False)
        errors.append(float((seen - truth).square().mean()))
    assert errors[1] < errors[0] / 4
    assert bake(want, 0.1)[1]["filter_baked_for_pixel"] == round(PIXEL, 6)


# ---- what the files say ----


def test_glb_is_as_the_extension_asks() -> None:
    want = random_gaussians(10, 4)
    data = encode(want, FORMATS["glb"], {"seed": 3})
    length = struct.unpack_from("<I", data, 12)[0]
    document = json.loads(data[20 : 20 + length])
    (primitive,) = document["meshes"][0]["primitives"]
    extension = primitive["extensions"]["KHR_gaussian_splatting"]
    assert primitive["mode"] == 0 and document["extensionsUsed"] == ["KHR_gaussian_splatting"]
    assert extension["kernel"] == "ellipse" and extension["colorSpace"] == "srgb_rec709_display"
    names = set(primitive["attributes"])
    prefix = "KHR_gaussian_splatting:"
    own = {prefix + n for n in ("ROTATION", "SCALE", "OPACITY", "SH_DEGREE_0_COEF_0", "SH_DEGREE_1_COEF_2")}
    assert own <= names and {"POSITION", "COLOR_0"} <= names
    position = document["accessors"][primitive["attributes"]["POSITION"]]
    np.testing.assert_allclose(position["max"], into_frame(want, "y-up").means.max(0).values, rtol=1e-6)
    assert all(view["byteOffset"] % 4 == 0 for view in document["bufferViews"]) and len(data) % 4 == 0


def test_glb_nodes_move_their_gaussians() -> None:
    want = random_gaussians(10)
    data = encode(want, FORMATS["glb"], frame="native")
    length = struct.unpack_from("<I", data, 12)[0]
    document = json.loads(data[20 : 20 + length])
    document["nodes"] = [{"children": [1], "scale": [2, 2, 2]}, {"mesh": 0, "translation": [1, 0, 0]}]
    from diff2to3.formats.glb import container

    got, _ = decode(container(document, data[28 + length :]), FORMATS["glb"], "a")
    torch.testing.assert_close(got.means, (want.means + torch.tensor([1.0, 0, 0])) * 2)
    torch.testing.assert_close(got.scales, want.scales * 2)
    document["nodes"][0]["scale"] = [2, 1, 1]
    with pytest.raises(InputError, match="stretches"):
        decode(container(document, data[28 + length :]), FORMATS["glb"], "a")


def test_sog_codebooks_are_near_the_best() -> None:
    """256 values for a bell curve: the best quantiser's error is √3 π σ² / (2 · 256²) (Panter and Dite)."""
    values = np.random.default_rng(0).normal(size=30000)
    book, labels = sog.codebook(values)
    error = np.mean((np.array(book)[labels] - values) ** 2)
    assert error < 1.1 * np.sqrt(3) * np.pi / (2 * 256**2)


# ---- damaged files ----


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    gaussforge = pytest.importorskip("gaussforge")
    want = random_gaussians(40, 4)
    made = {name: encode(want, FORMATS[name]) for name in WRITABLE}
    made["spz4"] = spz.write(want, {}, version=4)
    made["ksplat"] = gaussforge.GaussForge().convert(made["ply"], "ply", "ksplat")["data"]
    return made


def outcome(data: bytes, name: str) -> None:
    """Gaussians whose values are numbers, or one clear line."""
    entry = FORMATS["spz" if name == "spz4" else name]
    try:
        got, _ = decode(data, entry, "bad.file")
    except InputError as error:
        assert str(error).startswith("bad.file: ") and "\n" not in str(error)
        return
    assert all(bool(x.isfinite().all()) for x in (got.means, got.quats, got.scales, got.opacities, got.sh))


@pytest.mark.parametrize("name", [*WRITABLE, "spz4", "ksplat"])
def test_cut_and_changed_files_are_one_clear_error(name: str, files: dict[str, bytes]) -> None:
    good = files[name]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(
        st.integers(0, len(good)),
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4),
        st.booleans(),
    )
    def check(end: int, changes: list[tuple[int, int]], cut: bool) -> None:
        data = bytearray(good)
        for at, value in changes:
            data[at % 200 if value % 2 else at] = value  # headers more often
        outcome(bytes(data[:end] if cut else data), name)

    check()


@pytest.mark.parametrize("name", sorted(FORMATS))
@settings(max_examples=40, deadline=None, database=None)
@given(data=st.binary(max_size=300))
def test_anything_at_all_is_one_clear_error(name: str, data: bytes) -> None:
    outcome(data, name)
    outcome({"ply": b"ply\n", "glb": b"glTF", "spz": b"NGSP"}.get(name, b"") + data, name)


def damaged() -> dict[str, tuple[str, bytes]]:
    """Files that fuzzing found to raise something else than one clear error."""
    sog_file = encode(random_gaussians(40), FORMATS["sog"])
    head = b"ply\nformat binary_little_endian 1.0\n"
    packed = b"".join(
        b"property uint packed_%s\n" % x for x in (b"position", b"rotation", b"scale", b"color")
    )
    empty = bytearray(4096 + 1024)
    empty[1], empty[4] = 1, 1
    struct.pack_into("<H", empty, 4096 + 40, 1)
    return {
        "sog whose start is gone": ("sog", sog_file[200:]),
        "ply whose vertices start beyond its end": (
            "ply", head + b"element a 900\nproperty int b\nelement vertex 0\nproperty float x\nend_header\n",
        ),
        "compressed ply of chunks without properties": (
            "ply", head + b"element chunk 1\nelement vertex 1\n" + packed + b"end_header\n" + bytes(16),
        ),
        "ksplat of an empty section of degree 1": ("ksplat", bytes(empty)),
    }  # fmt: skip


@pytest.mark.parametrize("what", damaged())
def test_what_fuzzing_found(what: str) -> None:
    name, data = damaged()[what]
    with pytest.raises(InputError, match=r"^bad\.file"):
        decode(data, FORMATS[name], "bad.file")


BOMBS = (
    "gzip header of 4 G points",
    "gzip of zeros",
    "version 4 of 4 G points",
    "a picture of 256 M pixels",
    "sections of 4 G buckets",
    "a header of 4 G vertices",
)


def bombs() -> dict[str, tuple[str, bytes]]:
    many = 0xFFFFFFFF
    header = struct.pack("<IIIBBBB", 0x5053474E, 3, many, 0, 12, 0, 0)
    picture = io.BytesIO()
    Image.new("RGBA", (16000, 16000)).save(picture, "WEBP", lossless=True, quality=0, method=0)
    archive = io.BytesIO()
    meta = {
        "version": 2,
        "count": 4,
        "means": {"mins": [0, 0, 0], "maxs": [1, 1, 1], "files": ["a.webp", "a.webp"]},
    }
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("meta.json", json.dumps(meta))
        z.writestr("a.webp", picture.getvalue())
    ksplat = bytearray(4096 + 1024)
    ksplat[1] = 1
    struct.pack_into("<I", ksplat, 4, 1)
    struct.pack_into("<I", ksplat, 16, many)
    struct.pack_into("<H", ksplat, 20, 1)
    struct.pack_into("<IIII", ksplat, 4096, many, 0, many, many)
    lying = struct.pack("<IIIBBBBI12x", 0x5053474E, 4, many, 3, 12, 0, 6, 32) + bytes(900)
    text = b"ply\nformat binary_little_endian 1.0\nelement vertex 4000000000\nproperty float x\nend_header\n"
    return {
        "gzip header of 4 G points": ("spz", gzip.compress(header)),
        "gzip of zeros": (
            "spz",
            gzip.compress(header[:8] + struct.pack("<I", 10**8) + header[12:] + bytes(10**6)),
        ),
        "version 4 of 4 G points": ("spz", lying),
        "a picture of 256 M pixels": ("sog", archive.getvalue()),
        "sections of 4 G buckets": ("ksplat", bytes(ksplat)),
        "a header of 4 G vertices": ("ply", text),
    }


@pytest.mark.parametrize("what", BOMBS)
def test_lying_counts_cost_no_memory(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, data = bombs()[what]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # our own bound, not Pillow's
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            decode(data, FORMATS[name], "bomb")
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()


# ---- the command ----


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = random_gaussians(60)
    write(tmp_path / "a.ply", want, {"seed": 4, "screen_filter": 0.1})
    for one, two in (
        ("a.ply", "b.glb"),
        ("b.glb", "c.sog"),
        ("c.sog", "d.compressed.ply"),
        ("d.compressed.ply", "e.spz"),
    ):
        assert cli.main(["convert", str(tmp_path / one), str(tmp_path / two)]) == 0
        got, metadata = read(tmp_path / two)
        assert len(got) == 60 and (two == "e.spz" or metadata["seed"] == 4)
    assert "60 Gaussians" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path / "e.spz"), str(tmp_path / "f.ply"), "--bake-filter"]) == 0
    assert cli.main(["convert", str(tmp_path / "a.ply"), str(tmp_path / "a.xyz")]) == 2
    assert "known endings are" in capsys.readouterr().err


def test_unknown_names_are_told() -> None:
    assert find_format("A.Compressed.PLY").name == "compressed.ply"
    with pytest.raises(InputError, match="expected one of"):
        format_named("ksplat")
    with pytest.raises(InputError, match="frame"):
        encode(random_gaussians(1), FORMATS["ply"], frame="up")
