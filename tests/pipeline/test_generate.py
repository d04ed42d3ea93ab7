"""The command, from photo files to finished assets: what it writes, and what it says when it cannot."""

import dataclasses
import importlib.util
import json
import os
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diff2to3 import cli
from diff2to3.commands.generate import names_of
from diff2to3.errors import InputError
from diff2to3.formats import read as read_ply
from diff2to3.gaussians.render import render
from diff2to3.pipeline import ImageTo3D, outputs
from diff2to3.pipeline.turntable import turntable
from diff2to3.types import Gaussians
from diff2to3.views.cameras import CameraConfig, sample_cameras

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_rembg(monkeypatch):
    """Whether or not it is installed."""
    monkeypatch.setitem(sys.modules, "rembg", None)


@pytest.fixture
def generate(bundles):
    """generate(words…) with the tiny model on the CPU → exit code."""

    def call(*words):
        given = [str(word) for word in words]
        model = [] if "--model" in given else ["--model", str(bundles["smdit"])]
        return cli.main(["generate", "--device", "cpu", "--offline", *model, *given])

    return call


def metadata_of(folder):
    """Of the one asset below."""
    (path,) = folder.rglob("metadata.json")
    return json.loads(path.read_text())


# ---------------------------------------------------------------- what it writes


def test_one_photo(generate, bundles, photos, model, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert generate(photos[0], "-o", out, "--seed", 3) == 0
    printed = capsys.readouterr()
    assert f"{out / 'photo0' / 'photo0.ply'}: " in printed.out and printed.err == ""
    files = {"photo0.ply", "photo0_turntable.png", "photo0_cutout.png", "metadata.json"}
    assert {p.name for p in (out / "photo0").iterdir()} == files
    assert {p.name for p in out.iterdir()} == {"photo0", "index.json", "contact_sheet.png"}
    metadata = metadata_of(out)
    expected = model(Image.open(photos[0]), seed=3)
    assert metadata["seed"] == 3 and metadata["input"] == [str(photos[0])] and set(metadata["files"]) == files
    assert metadata["num_voxels"] == len(expected.coords)
    assert metadata["num_gaussians"] == len(expected.gaussians)
    assert metadata["model"] == str(bundles["smdit"]) and metadata["frame"] == "right-handed, z up"
    assert metadata["structure"]["num_steps"] == 3 and metadata["latent"]["guidance_scale"] == 1.5
    assert metadata["versions"]["torch"] == torch.__version__ and metadata["device"] == "cpu"
    assert metadata["background_removal"] == ["alpha"] and metadata["warnings"] == []
    seconds = metadata["seconds"]
    parts = {"start", "load", "photos", "condition", "structure", "latents", "decode", "turntable", "ply"}
    assert set(seconds) == {*parts, "total"}
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in parts), abs=0.01)
    assert metadata["peak_memory_bytes"]["host"] > 50e6
    gaussians, comment = read_ply(out / "photo0" / "photo0.ply")
    assert comment["seed"] == 3 and comment["screen_filter"] == 0.1
    torch.testing.assert_close(gaussians.means, expected.gaussians.means, rtol=0, atol=1e-6)
    sheet = np.asarray(Image.open(out / "photo0" / "photo0_turntable.png"))
    assert sheet.shape == (2 * 256, 4 * 256, 3) and (sheet < 250).any()


def test_the_same_seed_gives_the_same_files(generate, photos, tmp_path):
    """Twice, alone, as one of several samples, in batches of another size, and with networks that wait elsewhere."""
    common = (photos[0], "--turntable", "none")
    assert generate(*common, "-o", tmp_path / "a", "--seed", 5) == 0
    assert generate(*common, "-o", tmp_path / "b", "--seed", 5, "--low-vram") == 0
    assert generate(*common, "-o", tmp_path / "c", "--seed", 4, "--num-samples", 2) == 0
    first = (tmp_path / "a" / "photo0" / "photo0.ply").read_bytes()
    assert first == (tmp_path / "b" / "photo0" / "photo0.ply").read_bytes()
    assert first == (tmp_path / "c" / "photo0_1" / "photo0_1.ply").read_bytes()
    assert first != (tmp_path / "c" / "photo0_0" / "photo0_0.ply").read_bytes()
    words = ("-o", tmp_path / "d", "--seed", 5, "--batch-size", 4, "--turntable", "none")
    assert generate(*photos, *words) == 0
    one, four = (read_ply(p)[0] for p in (tmp_path / "a/photo0/photo0.ply", tmp_path / "d/photo0/photo0.ply"))
    for name in ("means", "scales", "quats", "opacities", "sh"):
        assert (getattr(one, name) - getattr(four, name)).abs().max() < 1e-5, name
    assert metadata_of(tmp_path / "d" / "photo3")["batch_size"] == 4


def test_settings_reach_the_samplers(generate, photos, tmp_path):
    words = ("--steps", 2, "--guidance-scale", 1, "--sampler", "heun", "--dtype", "bfloat16")
    assert generate(photos[0], "-o", tmp_path, *words, "--turntable", "none") == 0
    metadata = metadata_of(tmp_path)
    for stage in ("structure", "latent"):
        assert metadata[stage]["num_steps"] == 2 and metadata[stage]["guidance_scale"] == 1
        assert metadata[stage]["sampler"] == "heun"
    assert metadata["dtype"] == "bfloat16"


@pytest.fixture
def one_step_bundle(tiny, tmp_path):
    """one_step_bundle(stages…): a model whose named stages make their result at once."""

    def make(*stages):
        folder = tiny.write_generator(tmp_path / "one_step")

        def change(values):
            for stage in stages:
                values["settings"]["samplers"][stage]["num_steps"] = 1

        edit(folder, change)
        return folder

    return make


@pytest.mark.parametrize("words", [("--steps", 8), ("--guidance-scale", 3), ("--sampler", "heun")])
def test_a_model_that_is_no_flow_refuses_to_be_sampled(
    generate, one_step_bundle, photos, tmp_path, capsys, words
):
    folder = one_step_bundle("structure", "latent")
    assert generate(photos[0], "--model", folder, "-o", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert f"error: {words[0]}: this model makes its result in one step" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert generate(photos[0], "--model", folder, "-o", tmp_path / "out", "--turntable", "none") == 0


def test_settings_reach_the_stage_that_is_a_flow(generate, one_step_bundle, photos, tmp_path):
    folder = one_step_bundle("latent")
    words = ("--steps", 8, "--guidance-scale", 3, "--turntable", "none")
    assert generate(photos[0], "--model", folder, "-o", tmp_path / "out", *words) == 0
    metadata = metadata_of(tmp_path / "out")
    assert metadata["structure"]["num_steps"] == 8 and metadata["structure"]["guidance_scale"] == 3
    assert metadata["latent"]["num_steps"] == 1 and metadata["latent"]["guidance_scale"] == 1.5
    model = ImageTo3D.from_pretrained(str(folder))
    more = dataclasses.replace(model.latent_settings, num_steps=5)
    with pytest.raises(InputError, match="latent: num_steps: this model makes its result in one step"):
        model(Image.open(photos[0]), latent=more)


def test_files_may_do_without_what_nobody_sees(generate, photos, tmp_path, capsys):
    counts = []
    for k, words in enumerate(((), ("--prune", 0.5))):
        assert generate(photos[0], "-o", tmp_path / str(k), *words, "--turntable", "none") == 0
        counts.append(len(read_ply(tmp_path / str(k) / "photo0" / "photo0.ply")[0]))
        settings = metadata_of(tmp_path / str(k))
        assert (settings["structure"]["prune"], settings["latent"]["prune"]) == (0, 0.5 * k)
    assert 0 < counts[1] < counts[0]
    assert generate(photos[0], "-o", tmp_path / "c", "--prune", -1) == 2
    assert "prune: expected a number of pixels of at least 0, got -1.0" in capsys.readouterr().err


def test_several_photos_of_one_object(generate, photos, tmp_path):
    words = ("--image", photos[0], "--image", photos[1], "--turntable", "none")
    assert generate(*words, "-o", tmp_path / "a") == 0
    assert metadata_of(tmp_path / "a")["input"] == [str(photos[0]), str(photos[1])]
    assert generate(*words, "-o", tmp_path / "b", "--multi-image", "multidiffusion") == 0
    assert generate(photos[0], "-o", tmp_path / "c", "--turntable", "none") == 0
    made = [(tmp_path / folder / "photo0" / "photo0.ply").read_bytes() for folder in "abc"]
    assert len(set(made)) == 3


def test_viewer_is_one_more_file(generate, photos, tmp_path):
    assert generate(photos[0], "-o", tmp_path, "--turntable", "none", "--viewer") == 0
    assert {p.name for p in (tmp_path / "photo0").iterdir()} >= {"photo0.ply", "photo0.html", "metadata.json"}
    page = (tmp_path / "photo0" / "photo0.html").read_text(encoding="utf-8")
    assert "<title>" in page and "data:image/webp;base64," in page  # what the model saw is beside it
    assert "photo0.html" in json.loads((tmp_path / "photo0" / "metadata.json").read_text())["files"]


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_animated_turntables(generate, photos, tmp_path, ending, monkeypatch):
    if ending == "mp4":
        pytest.importorskip("imageio_ffmpeg", reason="films need imageio-ffmpeg")
    monkeypatch.setattr(outputs, "RESOLUTION", 32)
    monkeypatch.setattr(outputs, "DEFAULT_VIEWS", {".gif": 5, ".mp4": 5})
    assert generate(photos[0], "-o", tmp_path, "--turntable", ending) == 0
    film = tmp_path / "photo0" / f"photo0_turntable.{ending}"
    if ending == "gif":
        with Image.open(film) as image:
            assert image.n_frames == 5 and image.size == (32, 32)
    else:
        assert film.read_bytes()[4:8] == b"ftyp"


def test_a_folder_with_a_bad_photo(generate, photos, tiny, tmp_path, capsys):
    """The others are made; the command says which failed, and exits with 2."""
    many = tmp_path / "photos"
    many.mkdir()
    tiny.photo(1).save(many / "a.png")
    tiny.photo(2).save(many / "a.webp", lossless=True)
    Image.new("RGBA", (40, 40)).save(many / "nothing.png")
    (many / "notes.txt").write_text("not an image")
    for batch_size in (1, 3):
        out = tmp_path / f"out{batch_size}"
        words = ("-o", out, "--turntable", "none", "--batch-size", batch_size)
        assert generate(many, *words) == 2
        error = capsys.readouterr().err
        assert error == (
            f"diff2to3 generate: error: {many / 'nothing.png'}: no object: all of it is transparent\n"
            "diff2to3 generate: 1 failed; the others are done\n"
        )
        made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
        files = {
            f"{n}/{f}" for n in ("a_png", "a_webp") for f in (f"{n}.ply", f"{n}_cutout.png", "metadata.json")
        }
        assert made == {*files, "index.json", "contact_sheet.png"}


def files_below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_an_unreadable_file_does_not_stop_a_folder(generate, photos, tiny, tmp_path, capsys):
    """Every fault is told at the end; the index holds both, the sheet every input beside its result."""
    many = tmp_path / "photos"
    many.mkdir()
    for name in ("b.png", "c.png"):
        tiny.photo(len(name)).save(many / name)
    (many / "a.png").write_bytes(b"text")
    (many / "d.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert generate(many, tmp_path / "missing.png", "-o", out, "--turntable", "none") == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line.split(": ")[2] for line in lines[:-1]] == [
        str(many / "a.png"), str(many / "d.jpg"), str(tmp_path / "missing.png")
    ]  # fmt: skip
    assert lines[-1] == "diff2to3 generate: 3 failed; the others are done"
    assert printed.out.splitlines()[-1].startswith(f"{out}: 2 assets in ")
    index = json.loads((out / "index.json").read_text())
    assert [asset["name"] for asset in index["assets"]] == ["b", "c"]
    assert set(index["assets"][0]["files"]) == {"b.ply", "b_cutout.png", "metadata.json"}
    assert [failure["input"] for failure in index["failed"]] == [
        [str(many / "a.png")], [str(many / "d.jpg")], [str(tmp_path / "missing.png")]
    ]  # fmt: skip
    sheet = np.asarray(Image.open(out / "contact_sheet.png")).astype(int)
    assert sheet.shape == (2 * (160 + 14), 2 * 160, 3)
    for row in (0, 174):
        for column in (0, 160):
            assert (sheet[row : row + 160, column : column + 160] < 200).any(), (row, column)
    assert (np.asarray(Image.open(out / "b" / "b_cutout.png"))[..., 3] == 0).any()


def test_only_unreadable_files(generate, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"text")
    assert generate(tmp_path, "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("error: ") == 2 and not (tmp_path / "out").exists()


def test_hidden_files_and_folders_within(generate, tiny, tmp_path, capsys):
    many = tmp_path / "photos"
    (many / "deep" / "er").mkdir(parents=True)
    (many / ".cache").mkdir()
    for name in ("a.png", ".b.png", "._a.png", "deep/c.png", "deep/er/a.png", ".cache/d.png"):
        tiny.photo(len(name) % 5).save(many / name)
    words = ("--turntable", "none")
    assert generate(many, "-o", tmp_path / "flat", *words) == 0
    assert {p.name for p in (tmp_path / "flat").iterdir() if p.is_dir()} == {"a"}
    # the results lie among the photos, and are no photos
    for _ in range(2):
        assert generate(many, "-o", many, "--recursive", *words) == 0
        made = {str(p.relative_to(many)) for p in many.rglob("*.ply")}
        assert made == {"a_png/a_png.ply", "a_png_2/a_png_2.ply", "c/c.ply"}
    folder = many / ".cache"
    assert generate(folder / "d.png", "-o", tmp_path / "named", *words) == 0  # asked for by name
    empty = tmp_path / "empty"
    (empty / "within").mkdir(parents=True)
    assert generate(empty, "-o", tmp_path / "none") == 2
    assert "no image in this folder; --recursive looks into the folders within" in capsys.readouterr().err


def test_nothing_of_another_asset_is_overwritten(generate, photos, tiny, tmp_path, capsys):
    """Two photos of one name in two runs; another seed; the same again; and what is there already left out."""
    out = tmp_path / "out"
    (tmp_path / "other").mkdir()
    tiny.photo(3).save(tmp_path / "other" / "photo0.png")
    words = ("-o", out, "--turntable", "none")
    assert generate(photos[0], *words) == 0
    first = (out / "photo0" / "metadata.json").read_bytes()
    capsys.readouterr()
    assert generate(tmp_path / "other" / "photo0.png", *words) == 0
    assert f"{out / 'photo0'} holds something else; writing photo0_2" in capsys.readouterr().err
    assert generate(photos[0], *words, "--seed", 1) == 0
    assert (out / "photo0" / "metadata.json").read_bytes() == first
    names = [asset["name"] for asset in json.loads((out / "index.json").read_text())["assets"]]
    assert names == ["photo0", "photo0_2", "photo0_3"]
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    capsys.readouterr()
    assert generate(photos[0], *words, "--skip-existing") == 0
    assert capsys.readouterr().out == f"{out}: 1 already there, left out\n"
    assert {name: (out / name).stat().st_mtime_ns for name in names} == before
    assert generate(photos[0], *words) == 0  # made again, in its place
    assert {p.name for p in out.iterdir() if p.is_dir()} == set(names)
    (out / "photo1").mkdir()
    (out / "photo1" / "mine.txt").write_text("keep")
    assert generate(photos[1], *words) == 0
    assert files_below(out / "photo1") == {"mine.txt"} and (out / "photo1_2" / "photo1_2.ply").is_file()


def test_out_may_be_one_file(generate, photos, tmp_path, capsys):
    path = tmp_path / "new" / "chair.ply"
    assert generate(photos[0], "-o", path, "--seed", 3) == 0
    assert files_below(tmp_path) == {"new/chair.ply"} and read_ply(path)[1]["seed"] == 3
    assert generate(photos[0], "-o", tmp_path / "chair.SPZ") == 0
    assert (tmp_path / "chair.SPZ").read_bytes()[:2] == b"\x1f\x8b"
    (tmp_path / "chair.SPZ").unlink()
    capsys.readouterr()
    assert generate(photos[0], "-o", tmp_path / "a.ksplat") == 2  # only read
    assert generate(*photos[:2], "-o", tmp_path / "two.ply") == 2
    assert "is one file, and there are 2 assets; name a folder" in capsys.readouterr().err
    assert files_below(tmp_path) == {"new/chair.ply"}


def test_one_file_may_be_a_mesh(generate, photos, tmp_path, capsys):
    for package in ("fast_simplification", "xatlas", "scipy", "trimesh"):
        pytest.importorskip(package, reason="needs the mesh extra")
    import trimesh

    assert generate(photos[0], "-o", tmp_path / "chair.glb", "--mesh") == 0
    scene = trimesh.load(tmp_path / "chair.glb", process=False)
    assert sum(len(part.faces) for part in scene.geometry.values()) > 10
    assert generate(photos[0], "-o", tmp_path / "chair.obj", "--mesh") == 0
    assert {"chair.glb", "chair.obj", "chair.mtl"} <= files_below(tmp_path)
    capsys.readouterr()
    assert generate(photos[0], "-o", tmp_path / "chair.spz", "--mesh") == 2
    assert "is a file of Gaussians; with --mesh name one of .glb, .obj" in capsys.readouterr().err


def test_the_printed_time_includes_the_start(generate, photos, tmp_path, capsys):
    before = time.perf_counter()
    assert generate(photos[0], "-o", tmp_path) == 0
    wall = time.perf_counter() - before
    printed = float(capsys.readouterr().out.splitlines()[0].split(" in ")[1].split()[0])
    seconds = metadata_of(tmp_path)["seconds"]
    assert seconds["start"] + seconds["load"] - 0.1 < printed < wall + 0.1


def test_turntables_start_where_the_photo_was_taken():
    """Red in front (−y, where a photo's camera stands), blue behind."""
    g = Gaussians(
        torch.tensor([[0.0, -0.3, 0], [0, 0.3, 0]]), torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2, 3), 0.1),
        torch.tensor([0.99, 0.99]), torch.tensor([[[1.7, -1.7, -1.7]], [[-1.7, -1.7, 1.7]]]),
    )  # fmt: skip
    frames = turntable(g, 4, 32, elevation=0.0, azimuth=-90.0)
    middle = frames[:, 16, 16].tolist()
    assert middle[0][0] > 200 > 60 > middle[0][2] and middle[2][2] > 200 > 60 > middle[2][0]


def test_names_never_clash():
    paths = [Path(p) for p in ("x/a.png", "x/a.jpg", "x/b.png", "y/a.png", "y/a.png")]
    assert names_of(paths) == ["a_png", "a_jpg", "b", "a_png_2", "a_png_3"]


def test_an_opaque_photo_is_cut_out(generate, tiny, tmp_path, capsys):
    cut = tiny.photo()
    white = Image.new("RGBA", cut.size, "white")
    Image.alpha_composite(white, cut).convert("RGB").save(tmp_path / "photo.jpg", quality=95)
    assert generate(tmp_path / "photo.jpg", "-o", tmp_path / "out", "--turntable", "none") == 0
    assert capsys.readouterr().err == ""
    assert metadata_of(tmp_path / "out")["background_removal"][0] in ("border", "u2netp")
    words = ("-o", tmp_path / "quiet", "--turntable", "none", "--background-removal", "border")
    assert generate(tmp_path / "photo.jpg", *words) == 0
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- other programs


def gsplat_peer():
    """eval/benchmarks/gsplat_peer.py."""
    path = Path(__file__).resolve().parents[2] / "eval" / "benchmarks" / "gsplat_peer.py"
    spec = importlib.util.spec_from_file_location("gsplat_peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vertices_by(library, path):
    """The vertices of a .ply as a structured array."""
    module = pytest.importorskip(library, reason="an independent reader of .ply")
    if library == "plyfile":
        return module.PlyData.read(str(path))["vertex"].data
    return module.load(path, process=False).metadata["_ply_raw"]["vertex"]["data"]


@pytest.mark.parametrize("library", ["plyfile", "trimesh"])
def test_other_programs_read_and_render_the_ply_alike(generate, photos, tmp_path, library):
    """Another reader's columns, activated as the 3DGS paper says, through gsplat's PyTorch reference."""
    pytest.importorskip("gsplat", reason="an independent rasteriser")
    assert generate(photos[0], "-o", tmp_path, "--turntable", "none") == 0
    vertices = vertices_by(library, tmp_path / "photo0" / "photo0.ply")

    def columns(*names):
        return torch.from_numpy(np.stack([vertices[name].astype(np.float32) for name in names], -1))

    quats = columns("rot_0", "rot_1", "rot_2", "rot_3")
    sh = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    opacities = 1 / (1 + torch.exp(-columns("opacity")[:, 0]))
    scales = torch.exp(columns("scale_0", "scale_1", "scale_2"))
    viewmats, Ks = sample_cameras(CameraConfig("orbit", num_views=3), 64, 64, np.random.default_rng(0))
    ours, _ = read_ply(tmp_path / "photo0" / "photo0.ply")
    reference = gsplat_peer().gsplat_reference
    for view in range(3):
        cameras = (viewmats[view : view + 1], Ks[view : view + 1])
        theirs, alphas = reference(
            columns("x", "y", "z"), quats / quats.norm(dim=1, keepdim=True), scales, opacities, sh, *cameras, 64, 64
        )  # fmt: skip
        # the filter that viewers add: 0.3 px², opacities as they are
        picture = render(ours, *cameras, 64, 64, eps2d=0.3, antialiased=False)
        assert float(alphas.max()) > 0.5
        # the reference blends every Gaussian to the end; ours stops once 1e-4 shines through
        assert (picture.colors - theirs).abs().max() < 2e-3
        assert (picture.alphas - alphas[..., 0]).abs().max() < 2e-3


# ---------------------------------------------------------------- bad input


def write_text(path):
    path.write_text("this is text")


def write_film(path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def write_huge(path, side=20000):
    """20,000 × 20,000 black pixels: a small file, and 1.2 GB once decoded."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


BAD_PHOTOS = {
    "text.png": (write_text, "not an image that can be read"),
    "one.png": (lambda p: Image.new("RGB", (1, 1), "red").save(p), "1 × 1 pixels are too few"),
    "huge.png": (write_huge, "too many pixels"),
    "clear.png": (lambda p: Image.new("RGBA", (64, 64)).save(p), "no object"),
    "black.png": (lambda p: Image.new("RGB", (64, 64)).save(p), "same colour; there is no object"),
    "film.gif": (write_film, "an animation, not a photo"),
    "missing.png": (lambda p: None, "no such file"),
    "empty.jpg": (lambda p: p.write_bytes(b""), "not an image that can be read"),
}


@pytest.mark.parametrize("name", BAD_PHOTOS)
@pytest.mark.parametrize("existing", [False, True])
def test_bad_photos(generate, tmp_path, capsys, name, existing):
    make, message = BAD_PHOTOS[name]
    make(tmp_path / name)
    out = tmp_path / "a" / "out"
    if existing:
        out.mkdir(parents=True)
    assert generate(tmp_path / name, "-o", out) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"diff2to3 generate: error: {tmp_path / name}: ") and error.count("\n") == 1
    assert message in error
    # what was there before is there still, and nothing else
    assert (list(out.iterdir()) == []) if existing else not (tmp_path / "a").exists()


def cut_short(folder, name="latent_flow"):
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(folder, change):
    values = json.loads((folder / "model.json").read_text())
    change(values)
    (folder / "model.json").write_text(json.dumps(values))


BAD_MODELS = {
    "not a complete safetensors file": cut_short,
    "decoder.safetensors: no such file": lambda f: (f / "decoder.safetensors").unlink(),
    "model.json: not valid JSON": lambda f: (f / "model.json").write_text("{"),
    "this model cannot generate: it has no latent_flow; it has": lambda f: edit(
        f, lambda v: v["networks"].pop("latent_flow")
    ),
    "no network 'image_encoder'": lambda f: edit(f, lambda v: v["networks"].pop("image_encoder")),
    "latents: expected mean and std": lambda f: edit(f, lambda v: v["settings"]["latents"].pop("mean")),
    "latents: expected 4 means and deviations, got 3 and 4": lambda f: edit(
        f, lambda v: v["settings"]["latents"]["mean"].pop()
    ),
    "samplers: structure: ": lambda f: edit(
        f, lambda v: v["settings"]["samplers"]["structure"].update(guidance_interval=[0.1, 0.5, 1.0])
    ),
    "samplers: latent: ": lambda f: edit(f, lambda v: v["settings"]["samplers"]["latent"].update(steps=5)),
    "settings are damaged: margin": lambda f: edit(f, lambda v: v["settings"]["condition"].update(margin=0)),
    "sampler: expected one of euler": lambda f: edit(
        f, lambda v: v["settings"]["samplers"]["latent"].update(sampler="ddim")
    ),
    "unknown type 'Wrong'": lambda f: edit(f, lambda v: v["networks"]["decoder"].update(type="Wrong")),
    "structure_flow: expected a StructureDiT or StructureSMDiT, got a LatentSMDiT": lambda f: edit(
        f, lambda v: v["networks"].update(structure_flow=v["networks"]["latent_flow"])
    ),
    "kind 'toaster' is not one that generates": lambda f: edit(f, lambda v: v.update(kind="toaster")),
}


@pytest.mark.parametrize("message", BAD_MODELS)
def test_bad_models(generate, bundles, photos, tmp_path, capsys, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in bundles["smdit"].iterdir():
        os.link(path, folder / path.name)
    for path in (
        folder / "model.json",
        folder / "latent_flow.safetensors",
    ):  # those that are changed in place
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    BAD_MODELS[message](folder)
    assert generate(photos[0], "--model", folder, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{photo}", "--model", "nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["{photo}", "-o", "{file}"], "cannot be written to"),
        (["{photo}", "-o", "{file}/below"], "cannot be written to"),
        ([], "no input"),
        (["{photo}", "--image", "{photo}"], "not both"),
        (["--prompt", "a chair"], "takes images, not text"),
        (["{photo}", "--steps", "0"], "--steps: expected at least 1"),
        (["{photo}", "--batch-size", "0"], "--batch-size: expected at least 1"),
        (["{photo}", "--num-samples", "-1"], "--num-samples: expected at least 1"),
        (["{photo}", "--seed", "-1"], "--seed: expected a number from 0"),
        (["{photo}", "--guidance-scale", "nan"], "guidance scale"),
        (["{photo}", "--device", "warp:3"], "--device: 'warp:3' cannot be used here"),
        (["{folder}"], "no image in this folder"),
    ],
)
def test_bad_words(generate, photos, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    names = {"photo": photos[0], "file": tmp_path / "file", "folder": tmp_path / "folder"}
    assert generate(*(word.format(**names) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}
    assert not list((tmp_path / "folder").iterdir())


def test_a_full_disk_leaves_nothing(generate, photos, tmp_path, capsys, monkeypatch):
    """Writing fails after the .ply and the turntable are there."""

    def full(path):
        if path.name == "metadata.json":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "sync", full)
    assert generate(photos[0], "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("photo0.ply: cannot be written to: No space left on device\n")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(generate, photos, tmp_path, capsys, monkeypatch):
    """Ctrl-C while the files are written."""

    def interrupted(path):
        if path.suffix == ".png":
            raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "sync", interrupted)
    assert generate(photos[0], "-o", tmp_path / "out") == 130
    assert capsys.readouterr().err == "diff2to3 generate: interrupted\n"
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_is_the_default(photos, tmp_path, capsys, monkeypatch, bundles, tiny):
    """``mini-photo`` by name, from the package's own folder; of a model without a generator what is missing is said."""
    from diff2to3 import hub

    embedded = tmp_path / "bundles"
    embedded.mkdir()
    (embedded / "mini-photo").symlink_to(bundles["smdit"])
    tiny.write_generator(embedded / "mini", leave_out=("structure_flow", "latent_flow"))
    monkeypatch.setattr(hub, "EMBEDDED", embedded)
    words = ["generate", str(photos[0]), "--device", "cpu", "--turntable", "none"]
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 0
    assert metadata_of(tmp_path / "out")["model"] == "mini-photo"
    capsys.readouterr()
    assert cli.main([*words, "--model", "mini", "-o", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        "diff2to3 generate: error: mini (embedded): this model cannot generate: it has no structure_flow, "
        "latent_flow; it has structure_decoder, decoder, image_encoder. The embedded generator is mini-photo\n"
    )


def test_other_formats(generate, photos, tmp_path, capsys):
    """Every file holds the same object, the right way up."""
    out = tmp_path / "out"
    assert generate(photos[0], "-o", out, "--turntable", "none", "--format", "glb,ply,spz") == 0
    assert {"photo0.glb", "photo0.ply", "photo0.spz"} <= {p.name for p in out.rglob("*")}
    assert "photo0.glb" in capsys.readouterr().out
    paths = {p.suffix: p for p in out.rglob("photo0.*")}
    want = read_ply(paths[".ply"])[0].means
    for suffix, atol in ((".glb", 1e-6), (".spz", 2e-4)):
        torch.testing.assert_close(read_ply(paths[suffix])[0].means, want, atol=atol, rtol=0)
    assert generate(photos[0], "-o", tmp_path / "no", "--format", "glb,xyz") == 2
    assert "expected one of" in capsys.readouterr().err and not (tmp_path / "no").exists()
