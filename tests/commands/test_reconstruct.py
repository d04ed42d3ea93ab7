"""``diff2to3 reconstruct``: files out, and bad input that leaves nothing behind."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from diff2to3.assets import load_mesh
from diff2to3.cli import main
from diff2to3.formats import read as read_ply
from diff2to3.pipeline.reconstruct import Reconstructor


def test_writes_the_gaussians_of_the_python_interface(asset, vae, tmp_path, capsys):
    out = tmp_path / "out.ply"
    picture = tmp_path / "turn.png"
    words = ["reconstruct", str(asset), "-o", str(out), "--model", str(vae), "--device", "cpu"]
    assert main([*words, "--turntable", str(picture), "--resolution", "24"]) == 0
    gaussians, metadata = read_ply(out)
    expected = Reconstructor.from_pretrained(str(vae))(load_mesh(asset)).gaussians
    torch.testing.assert_close(gaussians.means, expected.means)
    torch.testing.assert_close(gaussians.scales, expected.scales, rtol=1e-5, atol=1e-7)
    assert metadata["asset"] == "box.glb" and metadata["screen_filter"] == 0.1
    # the transform takes the file's corner to the object frame's
    corner = np.array(metadata["transform"]) @ [0.5, 0.25, 0.4, 1]
    np.testing.assert_allclose(corner, [0.5, -0.4, 0.25, 1], atol=1e-6)
    assert picture.read_bytes()[1:4] == b"PNG"
    assert f"{len(gaussians):,} Gaussians" in capsys.readouterr().out


def test_several_assets_go_to_a_folder_and_a_broken_one_is_said(asset, vae, tiny_models, tmp_path, capsys):
    folder = tmp_path / "assets"
    folder.mkdir()
    shutil.copy(asset, folder / "good.glb")
    (folder / "bad.glb").write_bytes(b"glTF nonsense")
    out = tmp_path / "new" / "out"
    assert main(["reconstruct", str(folder), str(asset), "-o", str(out), "--model", str(vae)]) == 2
    assert sorted(p.name for p in out.iterdir()) == ["box.ply", "good.ply"]
    assert (out / "box.ply").read_bytes()[-1000:] == (out / "good.ply").read_bytes()[-1000:]
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "bad.glb" in line


EMPTY = '{"asset": {"version": "2.0"}, "scenes": [{"nodes": []}], "scene": 0, "nodes": [], "meshes": []}'


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing file", "nowhere.glb: no such file"),
        ("corrupt GLB", "box.glb: GLB of"),
        ("empty mesh", "empty.gltf"),
        ("not a 3D file", "notes.txt: files of type 'txt' are not read"),
        ("wrong model path", "no such folder, not an embedded model"),
        ("not a model", "model.json: no such file"),
        ("truncated weights", "decoder.safetensors: not a complete safetensors file"),
        ("damaged settings", "unknown provider"),
        ("no encoder", "no network 'encoder'; this model cannot reconstruct"),
        ("unwritable folder", "cannot be written"),
        ("missing folder", "does not exist"),
        ("two assets, one file", "2 assets cannot be one file"),
        ("unknown weights", "--weights nothing: expected PROVIDER=PATH"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(case, said, asset, vae, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(vae, model)
    results = tmp_path / "results"
    results.mkdir()
    inputs, out, more = [asset], results / "out.ply", []
    if case == "missing file":
        inputs = [tmp_path / "nowhere.glb"]
    elif case == "corrupt GLB":
        asset.write_bytes(asset.read_bytes()[:500])
    elif case == "empty mesh":
        inputs = [tmp_path / "empty.gltf"]
        inputs[0].write_text(EMPTY)
    elif case == "not a 3D file":
        inputs = [tmp_path / "notes.txt"]
        inputs[0].write_text("a box")
    elif case == "wrong model path":
        model = tmp_path / "no model"
    elif case == "not a model":
        (model / "model.json").unlink()
    elif case == "truncated weights":
        path = model / "decoder.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "damaged settings":
        path = model / "model.json"
        path.write_text(path.read_text().replace('"provider": "rgb"', '"provider": "gbr"'))
        said = "unknown name 'gbr'"
    elif case == "no encoder":
        path = model / "model.json"
        path.write_text(path.read_text().replace('"encoder": {', '"encoder2": {'))
    elif case == "unwritable folder":
        if os.geteuid() == 0:
            results.rmdir()
            results.write_text("")  # root may write anywhere: a file in the place of the folder
            out, said = results, "is not a folder"
        else:
            results.chmod(0o500)
    elif case == "missing folder":
        out = results / "deeper" / "out.ply"
    elif case == "two assets, one file":
        inputs = [asset, asset]
    elif case == "unknown weights":
        more = ["--weights", "nothing"]
    before = sorted(tmp_path.rglob("*"))
    words = ["reconstruct", *map(str, inputs), "-o", str(out), "--model", str(model), *more]
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("diff2to3 reconstruct: error: ") and said in line
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
