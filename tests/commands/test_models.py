"""``diff2to3 models merge``: the parts of a model as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diff2to3.checkpoint import BundleInfo, NetworkEntry, check_hashes, read_bundle, save_bundle
from diff2to3.cli import main
from diff2to3.tensors import read_tensors


def bundle(folder: Path, kind: str, networks: dict[str, float], settings: dict) -> Path:
    """Networks of one number each."""
    entries = {name: NetworkEntry("Thing", {"size": 1}, f"{name}.safetensors") for name in networks}
    tensors = {name: {"weight": torch.full((2,), float(value))} for name, value in networks.items()}
    save_bundle(folder, BundleInfo(kind, entries, settings, "MIT", f"made as {kind}"), tensors)
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    vae = bundle(
        tmp_path / "a", "vae", {"encoder": 1, "decoder": 2}, {"latents": {"mean": [0.0]}, "features": [1]}
    )
    structure = bundle(
        tmp_path / "b", "structure-vae", {"structure_decoder": 3}, {"structure_latents": {"mean": [1]}}
    )
    flows = {"structure_flow": 4, "latent_flow": 5}
    settings = {"latents": {"mean": [1e-9]}, "samplers": {"latent": 1}}  # equal but for rounding
    return [str(vae), str(structure), str(bundle(tmp_path / "c", "flow", flows, settings))]


def test_networks_and_settings_of_all(parts, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["models", "merge", *parts, "-o", str(out)]) == 0
    assert (
        "image-to-3d: encoder, decoder, structure_decoder, structure_flow, latent_flow"
        in capsys.readouterr().out
    )
    info = read_bundle(out)
    check_hashes(out, info)
    assert info.kind == "image-to-3d" and info.license == "MIT"
    assert info.source == "made as vae; made as structure-vae; made as flow"
    assert info.settings == {
        "latents": {"mean": [1e-9]},
        "features": [1],
        "structure_latents": {"mean": [1]},
        "samplers": {"latent": 1},
    }
    values = {name: float(read_tensors(out / e.file)["weight"][0]) for name, e in info.networks.items()}
    assert values == {
        "encoder": 1,
        "decoder": 2,
        "structure_decoder": 3,
        "structure_flow": 4,
        "latent_flow": 5,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "model"]
    assert main(["models", "merge", str(out), parts[2], "-o", str(out), "--replace"]) == 0
    again = read_bundle(out)
    assert (again.source, again.license) == (info.source, info.license)  # each named once


def test_parts_are_not_called_a_generator(parts, tmp_path):
    assert main(["models", "merge", *parts[:2], "-o", str(tmp_path / "m")]) == 0
    assert read_bundle(tmp_path / "m").kind == "vae"
    assert main(["models", "merge", parts[1], parts[2], "-o", str(tmp_path / "n"), "--kind", "own"]) == 0
    assert read_bundle(tmp_path / "n").kind == "own"


def test_what_differs_is_an_error_unless_the_later_one_replaces_it(parts, tmp_path, capsys):
    newer = bundle(tmp_path / "newer", "vae", {"decoder": 9}, {"latents": {"mean": [0.5]}})
    out = tmp_path / "out"
    assert main(["models", "merge", parts[0], str(newer), "-o", str(out)]) == 2
    assert "network 'decoder' differs from that of" in capsys.readouterr().err
    assert not out.exists()
    assert main(["models", "merge", parts[0], str(newer), "-o", parts[0], "--replace"]) == 0
    info = read_bundle(Path(parts[0]))
    check_hashes(Path(parts[0]), info)
    assert float(read_tensors(Path(parts[0]) / "decoder.safetensors")["weight"][0]) == 9
    assert info.settings == {"latents": {"mean": [0.5]}, "features": [1]}
    other = bundle(tmp_path / "other", "vae", {"fourth": 1}, {"features": [2]})
    assert main(["models", "merge", parts[0], str(other), "-o", str(out)]) == 2
    assert "settings: 'features' is [2], and [1]" in capsys.readouterr().err
    assert main(["models", "merge", parts[0], parts[0], "-o", str(out)]) == 0  # the same twice is no conflict


def test_half_halves_the_files_and_refuses_what_it_cannot_hold(parts, tmp_path, capsys):
    assert main(["models", "merge", parts[0], "-o", str(tmp_path / "half"), "--half"]) == 0
    assert read_tensors(tmp_path / "half" / "encoder.safetensors")["weight"].dtype == torch.float16
    big = bundle(tmp_path / "big", "vae", {"encoder": 1e9}, {})
    assert main(["models", "merge", str(big), "-o", str(tmp_path / "x"), "--half"]) == 2
    assert "'weight' has numbers that float16 cannot hold" in capsys.readouterr().err


def test_average_is_the_weighted_mean_of_what_all_have(parts, tmp_path, capsys):
    newer = bundle(tmp_path / "newer", "flow", {"latent_flow": 9}, {"samplers": {"latent": 1}})
    out = tmp_path / "mean"
    assert main(["models", "average", parts[2], str(newer), "--weights", "3", "1", "-o", str(out)]) == 0
    assert "flow: latent_flow" in capsys.readouterr().out
    info = read_bundle(out)
    check_hashes(out, info)
    assert list(info.networks) == ["latent_flow"]
    assert float(read_tensors(out / info.networks["latent_flow"].file)["weight"][0]) == 0.75 * 5 + 0.25 * 9
    assert main(["models", "average", parts[2], str(newer), "-o", str(out)]) == 0
    assert float(read_tensors(out / info.networks["latent_flow"].file)["weight"][0]) == 7


def test_only_one_network_has_a_mean(parts, tmp_path, capsys):
    """Another configuration is another network, whatever its shapes."""
    entries = {"latent_flow": NetworkEntry("Thing", {"size": 2}, "latent_flow.safetensors")}
    info = BundleInfo("flow", entries, {}, "MIT", "test")
    save_bundle(tmp_path / "newer", info, {"latent_flow": {"weight": torch.ones(2)}})
    out = tmp_path / "mean"
    assert main(["models", "average", parts[2], str(tmp_path / "newer"), "-o", str(out)]) == 2
    assert "'latent_flow' is another network than in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "weights", "message"),
    [
        (("flow", {"other": 1}, {}), "1 1", "no network is in all of"),
        (("flow", {"latent_flow": 1}, {"samplers": {"latent": 2}}), "1 1", "settings: 'latent' is 2"),
        (("flow", {"latent_flow": 1}, {}), "1", "a weight for each"),
        (("flow", {"latent_flow": 1}, {}), "1 -1", "positive sum"),
        (("flow", {"latent_flow": 1}, {}), "nan 1", "positive sum"),
    ],
)
def test_what_has_no_mean_is_an_error(other, weights, message, parts, tmp_path, capsys):
    newer, out = bundle(tmp_path / "newer", *other), tmp_path / "mean"
    assert (
        main(["models", "average", parts[2], str(newer), "--weights", *weights.split(), "-o", str(out)]) == 2
    )
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("case", ["missing", "damaged", "unwritable"])
def test_bad_input(case, parts, tmp_path, capsys):
    out = tmp_path / "out"
    if case == "missing":
        parts[1] = str(tmp_path / "nothing")
    elif case == "damaged":
        path = Path(parts[0]) / "encoder.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    else:
        out.write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main(["models", "merge", *parts, "-o", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_list_has_embedded_models(capsys):
    from diff2to3.hub import EMBEDDED, embedded_models

    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "microsoft/TRELLIS-image-large" in shown
    for name in embedded_models():
        assert f"\n{name} " in shown
        assert main(["models", "--check", name]) == 0
        assert json.loads((EMBEDDED / name / "model.json").read_text())["networks"]
