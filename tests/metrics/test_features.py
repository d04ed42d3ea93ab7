"""Extractors on random weights against the published implementations' numbers, and what is said when weights
are missing.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diff2to3.errors import InputError
from diff2to3.metrics.features import build_extractor, cosine_scores
from diff2to3.metrics.inception import InceptionV3
from diff2to3.metrics.lpips import Lpips


@pytest.fixture
def images(generator):
    return torch.rand(2, 40, 40, 3, generator=generator)


def pictures(count: int, side: int) -> torch.Tensor:
    """Smooth pictures [V, S, S, 3] from a formula, so that numbers computed elsewhere stay valid."""
    grid = torch.linspace(0, 3, side, dtype=torch.float64)
    phase = torch.arange(count, dtype=torch.float64)[:, None, None, None]
    rgb = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    waves = torch.sin(grid[:, None, None] * rgb + phase) * torch.cos(grid[None, :, None] * rgb.flip(0))
    return (0.5 + 0.5 * waves).float()


#: From torch-fidelity 0.4.0 (InceptionV3 with these weights) and lpips 0.1.4 (with these backbones).
INCEPTION = {
    "first": [0.007519, 0.052944, 0.045622, 8.60092, 0.006087, 0.06302, 0.057407, 7.934271],
    "mean": 2.220993589004295,
    "std": 3.1080378399582957,
}
LPIPS = {"vgg": [0.5889304, 0.6287169], "alex": [0.6492448, 0.8692437]}


def test_inception_gives_torch_fidelity_s_features(random_inception):
    network = InceptionV3(random_inception(1))
    x = (pictures(2, 299).permute(0, 3, 1, 2) * 255).round()
    with torch.no_grad():
        found = network((x - 128) / 128)
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found[:, :4].flatten().numpy(), INCEPTION["first"], rtol=2e-4)
    assert found.double().mean().item() == pytest.approx(INCEPTION["mean"], rel=1e-4)
    assert found.double().std().item() == pytest.approx(INCEPTION["std"], rel=1e-4)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_gives_the_published_package_s_distances(net, random_lpips):
    distances = Lpips(random_lpips(net, 1), net)(pictures(3, 64)[:2], pictures(3, 64)[1:])
    np.testing.assert_allclose(distances.numpy(), LPIPS[net], rtol=1e-4)


def test_lpips_is_a_distance_with_gradients(tiny_weights, images):
    lpips = Lpips.load(tiny_weights["lpips"])
    assert lpips(images, images).tolist() == [0, 0]
    torch.testing.assert_close(lpips(images, images.flip(0)), lpips(images.flip(0), images))
    x = images.clone().requires_grad_()
    lpips(x, images.flip(0)).sum().backward()
    assert bool((x.grad != 0).any()) and bool(torch.isfinite(x.grad).all())
    assert lpips.record is not None
    assert lpips.record.sha256 == hashlib.sha256(tiny_weights["lpips"].read_bytes()).hexdigest()


def test_lpips_names_what_is_missing(tmp_path, random_lpips):
    with pytest.raises(
        InputError, match=r"lpips: no file .*no\.safetensors; make it with: python eval/convert"
    ):
        Lpips.load(tmp_path / "no.safetensors")
    weights = random_lpips("vgg", 16)
    with pytest.raises(InputError, match=r"weights for alex lack net\.3\.bias"):
        Lpips(weights, "alex")
    (tmp_path / "bad.safetensors").write_bytes(b"not it")
    with pytest.raises(InputError, match=r"bad\.safetensors: not a complete safetensors file"):
        Lpips.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["inception", "dinov2", "clip"])
def test_extractors_load_from_local_files(name, tiny_weights, images):
    extractor = build_extractor(name, str(tiny_weights[name]))
    features = extractor(images)
    assert features.shape[0] == 2 and features.dtype == torch.float32
    assert bool(torch.isfinite(features).all()) and not torch.equal(features[0], features[1])
    torch.testing.assert_close(extractor(images[1:]), features[1:], rtol=1e-4, atol=1e-5)
    path = tiny_weights[name] if name == "inception" else tiny_weights[name] / "model.safetensors"
    assert extractor.record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.record.to_dict()["source"] == tiny_weights[name].name  # no private path
    with pytest.raises(ValueError, match="NaN"):
        extractor(images / 0)


def test_features_are_those_of_transformers(tiny_weights):
    """At the network's own size, where nothing is resized."""
    transformers = pytest.importorskip("transformers")
    images = pictures(2, 64)
    mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((images - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(tiny_weights["dinov2"])(x).pooler_output
    torch.testing.assert_close(build_extractor("dinov2", str(tiny_weights["dinov2"]))(images), expected)


def test_clip_scores_are_those_of_transformers(tiny_weights):
    """With resizing by PIL in 8 bits, as its picture processor does: the same up to rounding."""
    transformers = pytest.importorskip("transformers")
    images = (pictures(3, 72) * 255).round() / 255
    extractor = build_extractor("clip", str(tiny_weights["clip"]))
    features = extractor(images)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))
    resized = [
        torch.from_numpy(np.array(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)))
        for i in (images * 255).round().byte().numpy()
    ]
    x = ((torch.stack(resized).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(tiny_weights["clip"])
        expected = model(pixel_values=x).image_embeds
    scores = cosine_scores(features, features[:1])
    torch.testing.assert_close(
        scores, 100 * torch.cosine_similarity(expected, expected[:1]).double(), rtol=0, atol=0.05
    )
    assert scores[0].item() == pytest.approx(100)


def test_resizing_is_that_of_clean_fid(tiny_weights):
    """Bicubic with antialiasing, each channel in floating point, as PIL does it."""
    images = pictures(1, 512)
    extractor = build_extractor("inception", str(tiny_weights["inception"]))
    channels = [
        np.array(Image.fromarray(images[0, :, :, c].numpy()).resize((299, 299), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    expected = (np.stack(channels) * 255 - 128) / 128
    np.testing.assert_allclose(extractor.prepare(images)[0].numpy(), expected, atol=2e-4)


def test_missing_weights_are_one_line_each(tmp_path):
    for name, source, message in (
        ("inception", None, "inception: no weights given; download pt_inception"),
        ("inception", str(tmp_path / "x"), "inception: no file .*x; download pt_inception"),
        ("dinov2", str(tmp_path / "x"), "dinov2: no folder .*x; download it"),
        (
            "clip",
            "nobody/nothing",
            r"nobody/nothing: config.json is not in the local cache .*clip=FOLDER",
        ),
    ):
        with pytest.raises(InputError, match=message) as caught:
            build_extractor(name, source, offline=True)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"dinov2: no file .*config\.json"):
        build_extractor("dinov2", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="unknown name 'resnet'; known are inception, dinov2, clip"):
        build_extractor("resnet")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not FID's Inception-v3"):
        build_extractor("inception", str(tmp_path / "other.safetensors"))


def test_cosine_scores_of_undefined_directions():
    with pytest.raises(ValueError, match="direction is not defined"):
        cosine_scores(torch.zeros(1, 4), torch.ones(1, 4))
    assert cosine_scores(torch.ones(3, 4), -torch.ones(1, 4)).tolist() == pytest.approx([-100] * 3)


def test_published_files_are_converted(tmp_path, random_inception, random_lpips, program, capsys):
    """From .pth in the published layouts, with what else those hold."""
    inception = random_inception(16)
    extra = {"fc.weight": torch.zeros(2, 2), "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(3)}
    torch.save(inception | extra, tmp_path / "i.pth")
    main = program("convert_weights").main
    assert main(["inception", str(tmp_path / "i.pth"), str(tmp_path / "i.safetensors")]) == 0
    assert set(load_file(tmp_path / "i.safetensors")) == set(inception)
    weights = random_lpips("alex", 16)
    backbone = {k.replace("net.", "features."): v for k, v in weights.items() if k.startswith("net.")}
    torch.save(backbone | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "b.pth")
    linear = {f"lin{k}.model.1.weight": weights[f"lin.{k}.weight"] for k in range(5)}
    torch.save(linear, tmp_path / "l.pth")
    files = [str(tmp_path / name) for name in ("b.pth", "l.pth", "l.safetensors")]
    assert main(["lpips", "--net", "alex", *files]) == 0
    images = pictures(2, 64)
    expected = Lpips(weights, "alex")(images, images.flip(0))
    torch.testing.assert_close(Lpips.load(files[2], "alex")(images, images.flip(0)), expected)
    capsys.readouterr()
    for words in (
        ["inception", files[0], files[2]],
        ["lpips", files[1], files[1], files[2]],
        ["inception", "no", "x"],
    ):
        assert main(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    torch.save({"a": np.zeros}, tmp_path / "code.pth")  # a function: nothing is executed
    assert main(["inception", str(tmp_path / "code.pth"), "x"]) == 2
