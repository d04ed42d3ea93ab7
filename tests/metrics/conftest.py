"""Random weights of the metrics' networks, in their published layouts and at any width."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[str, int, int, int, int]


def inception_shapes() -> Iterator[Shape]:
    """(name, out, in, kernel height, width) of every convolution of FID's Inception-v3."""

    def chain(block: str, channels: int, *layers: tuple[str, int, int, int]) -> Iterator[Shape]:
        for name, out, height, width in layers:
            yield f"{block}.{name}", out, channels, height, width
            channels = out

    yield "Conv2d_1a_3x3", 32, 3, 3, 3
    yield "Conv2d_2a_3x3", 32, 32, 3, 3
    yield "Conv2d_2b_3x3", 64, 32, 3, 3
    yield "Conv2d_3b_1x1", 80, 64, 1, 1
    yield "Conv2d_4a_3x3", 192, 80, 3, 3
    for block, c, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        yield from chain(block, c, ("branch1x1", 64, 1, 1))
        yield from chain(block, c, ("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5))
        double = (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))
        yield from chain(block, c, *double)
        yield from chain(block, c, ("branch_pool", pool, 1, 1))
    yield from chain("Mixed_6a", 288, ("branch3x3", 384, 3, 3))
    yield from chain("Mixed_6a", 288, *double)
    for block, d in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        yield from chain(block, 768, ("branch1x1", 192, 1, 1))
        seven = (("branch7x7_1", d, 1, 1), ("branch7x7_2", d, 1, 7), ("branch7x7_3", 192, 7, 1))
        yield from chain(block, 768, *seven)
        sides = ((d, 1, 1), (d, 7, 1), (d, 1, 7), (d, 7, 1), (192, 1, 7))
        yield from chain(block, 768, *((f"branch7x7dbl_{i + 1}", *side) for i, side in enumerate(sides)))
        yield from chain(block, 768, ("branch_pool", 192, 1, 1))
    yield from chain("Mixed_7a", 768, ("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3))
    sides = ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
    yield from chain("Mixed_7a", 768, *((f"branch7x7x3_{i + 1}", *side) for i, side in enumerate(sides)))
    for block, c in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        yield from chain(block, c, ("branch1x1", 320, 1, 1))
        yield from chain(block, c, ("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, 1, 3))
        yield f"{block}.branch3x3_2b", 384, 384, 3, 1
        yield from chain(
            block,
            c,
            ("branch3x3dbl_1", 448, 1, 1),
            ("branch3x3dbl_2", 384, 3, 3),
            ("branch3x3dbl_3a", 384, 1, 3),
        )
        yield f"{block}.branch3x3dbl_3b", 384, 384, 3, 1
        yield from chain(block, c, ("branch_pool", 192, 1, 1))


def inception_weights(divisor: int = 1) -> dict[str, Tensor]:
    """Seeded weights; all widths (multiples of 16) divided by ``divisor``."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, out, channels, height, width in inception_shapes():
        out, channels = out // divisor, channels if channels == 3 else channels // divisor
        spread = (2 / (channels * height * width)) ** 0.5
        weights[f"{name}.conv.weight"] = (
            torch.randn(out, channels, height, width, generator=generator) * spread
        )
        weights[f"{name}.bn.weight"] = torch.rand(out, generator=generator) + 0.5
        weights[f"{name}.bn.bias"] = torch.randn(out, generator=generator) * 0.2
        weights[f"{name}.bn.running_mean"] = torch.randn(out, generator=generator) * 0.2
        weights[f"{name}.bn.running_var"] = torch.rand(out, generator=generator) + 0.5
    return weights


#: (index in torchvision's features, out, in, kernel); the last of each group is compared.
_VGG = [
    *((0, 64, 3, 3), (2, 64, 64, 3), (5, 128, 64, 3), (7, 128, 128, 3), (10, 256, 128, 3), (12, 256, 256, 3)),
    *((14, 256, 256, 3), (17, 512, 256, 3), (19, 512, 512, 3), (21, 512, 512, 3)),
    *((24, 512, 512, 3), (26, 512, 512, 3), (28, 512, 512, 3)),
]
_ALEX = [(0, 64, 3, 11), (3, 192, 64, 5), (6, 384, 192, 3), (8, 256, 384, 3), (10, 256, 256, 3)]
_TAPS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}


def lpips_weights(net: str, divisor: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for index, out, channels, side in _VGG if net == "vgg" else _ALEX:
        out, channels = out // divisor, channels if channels == 3 else channels // divisor
        spread = (2 / (channels * side * side)) ** 0.5
        weights[f"net.{index}.weight"] = torch.randn(out, channels, side, side, generator=generator) * spread
        weights[f"net.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
    for k, channels in enumerate(_TAPS[net]):
        weights[f"lin.{k}.weight"] = torch.rand(1, channels // divisor, 1, 1, generator=generator)
    return weights


@pytest.fixture(scope="session")
def program() -> Callable[[str], ModuleType]:
    """A program of eval/ by name, as a module."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).resolve().parents[2] / "eval" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"eval_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def random_inception() -> Callable[[int], dict[str, Tensor]]:
    return inception_weights


@pytest.fixture(scope="session")
def random_lpips() -> Callable[[str, int], dict[str, Tensor]]:
    return lpips_weights


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random weights of every network, saved as the real ones are: lpips, inception, dinov2, clip."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(inception_weights(16), folder / "inception.safetensors")
    save_file(lpips_weights("vgg", 16), folder / "lpips.safetensors")
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dinov2 = transformers.Dinov2Config(image_size=32, mlp_ratio=2, **small)
        transformers.Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
        clip = transformers.CLIPVisionConfig(image_size=32, intermediate_size=32, projection_dim=8, **small)
        transformers.CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    names = ("inception", "lpips", "dinov2", "clip")
    return {name: folder / (name if name in names[2:] else f"{name}.safetensors") for name in names}


@pytest.fixture(autouse=True)
def tiny_networks(one_thread: None) -> None:
    """Networks this small are several times slower on two threads than on one, where the machine is busy."""
