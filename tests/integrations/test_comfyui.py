"""The ComfyUI nodes against its documented interface (ComfyUI itself is no package that can be installed)."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diff2to3.formats.ply import read_ply
from diff2to3.pipeline import ImageTo3D

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@pytest.fixture
def stand_in(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    return load_source(HERE / "comfy_stand_in.py")


@pytest.fixture
def comfy(stand_in: ModuleType) -> Iterator[Any]:
    with stand_in.installed() as running:
        yield running


@pytest.fixture
def nodes(comfy: Any) -> Iterator[dict[str, Any]]:
    """The pack loaded as ComfyUI does it: its folder as a package. Nodes by id."""
    folder = ROOT / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_diff2to3", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    yield {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}
    for name in [n for n in sys.modules if n.startswith(spec.name)]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tiny(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    return load_source(ROOT / "tests" / "tiny_generator.py")


@pytest.fixture(scope="module")
def bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.write_generator(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture
def model(nodes: dict[str, Any], bundle: Path) -> ImageTo3D:
    return nodes["Diff2to3LoadModel"].execute(str(bundle), "auto", False).args[0]


def image_and_mask(tiny: ModuleType, *numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE [B, H, W, 3] and the MASK of what is object."""
    rgba = torch.from_numpy(np.stack([np.asarray(tiny.photo(n)) for n in numbers])).float() / 255
    return rgba[..., :3], rgba[..., 3]


SETTINGS: dict[str, Any] = {
    "mask_marks": "object", "batch": "an object each", "seed": 3, "steps": 0, "guidance_scale": 0.0,
}  # fmt: skip


def test_schemas_say_what_execute_takes(nodes: dict[str, Any]) -> None:
    import inspect

    assert len(nodes) == 3
    for node in nodes.values():
        schema, taken = node.define_schema(), inspect.signature(node.execute).parameters
        assert {item.id for item in schema.inputs} == set(taken)
        for item in schema.inputs:
            assert item.optional == (taken[item.id].default is not inspect.Parameter.empty)
    kinds = {item.id: item.io_type for item in nodes["Diff2to3ImageTo3D"].define_schema().inputs}
    assert kinds["image"] == "IMAGE" and kinds["mask"] == "MASK"
    outputs = [out.io_type for out in nodes["Diff2to3ImageTo3D"].define_schema().outputs]
    assert outputs == ["SPLAT", "FILE_3D_PLY", "DIFF2TO3_ASSET"]


def test_the_same_asset_as_from_python(
    nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType, comfy: Any, tmp_path: Path
) -> None:
    image, mask = image_and_mask(tiny, 0)
    splat, file, results = nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **SETTINGS).args
    want = model(tiny.photo(0), seed=3).gaussians
    torch.testing.assert_close(results[0].gaussians.means, want.means)
    x, y, z = want.means.unbind(1)
    torch.testing.assert_close(splat.positions[0], torch.stack([x, -z, y], 1))  # y down
    assert splat.counts is None and torch.allclose(splat.rotations.norm(dim=-1), torch.ones(1, len(want)))
    (tmp_path / "a.ply").write_bytes(file.get_bytes())
    read, note = read_ply(tmp_path / "a.ply")
    torch.testing.assert_close(read.means, splat.positions[0], atol=1e-6, rtol=0)
    assert file.format == "ply" and note["frame"] == "right-handed, y down"
    (total, positions) = comfy.bars[0]
    assert total == 100 and positions == sorted(positions) and positions[-1] == 100


def test_masks_of_load_image_mark_the_background(
    nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType
) -> None:
    image, mask = image_and_mask(tiny, 0)
    marked = {**SETTINGS, "mask_marks": "background"}
    a = nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **SETTINGS).args[0]
    b = nodes["Diff2to3ImageTo3D"].execute(model, image, mask=1 - mask, **marked).args[0]
    assert torch.equal(a.positions, b.positions)


def test_an_alpha_channel_is_used(nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType) -> None:
    image, mask = image_and_mask(tiny, 0)
    a = nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **SETTINGS).args[0]
    b = nodes["Diff2to3ImageTo3D"].execute(model, torch.cat([image, mask[..., None]], -1), **SETTINGS).args[0]
    assert torch.equal(a.positions, b.positions)


def test_batches(nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType) -> None:
    image, mask = image_and_mask(tiny, 0, 1)
    node = nodes["Diff2to3ImageTo3D"]
    several, _, results = node.execute(model, image, mask=mask, **SETTINGS).args
    counts = [len(result.gaussians) for result in results]
    assert [result.seed for result in results] == [3, 4] and several.positions.shape[:2] == (2, max(counts))
    if counts[0] != counts[1]:
        assert several.counts.tolist() == counts
        assert not several.opacities[int(np.argmin(counts)), min(counts) :].any()
    one, _, results = node.execute(model, image, mask=mask, **{**SETTINGS, "batch": "one object"}).args
    assert len(results) == 1 and len(results[0].photos) == 2 and len(one.positions) == 1


def test_settings_are_the_models_unless_given(
    nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType, comfy: Any
) -> None:
    image, mask = image_and_mask(tiny, 0)
    nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **SETTINGS)
    nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **{**SETTINGS, "steps": 9})
    default, longer = (len(positions) for _, positions in comfy.bars)
    assert longer > default


def test_cancel_stops_at_the_next_step(
    nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType, comfy: Any, stand_in: ModuleType
) -> None:
    image, mask = image_and_mask(tiny, 0)
    comfy.cancelled = True
    with pytest.raises(stand_in.Interrupted):
        nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **SETTINGS)


def test_turntable(nodes: dict[str, Any], model: ImageTo3D, tiny: ModuleType) -> None:
    image, mask = image_and_mask(tiny, 0)
    asset = nodes["Diff2to3ImageTo3D"].execute(model, image, mask=mask, **SETTINGS).args[2]
    (frames,) = nodes["Diff2to3Turntable"].execute(asset, 5, 48, 10.0, 1.0).args
    assert frames.shape == (5, 48, 48, 3) and frames.dtype == torch.float32
    assert 0 <= frames.min() < 0.9 and frames.max() <= 1


@pytest.mark.parametrize(("image", "mask"), [((1, 8, 8, 1), None), ((2, 8, 8, 3), (3, 8, 8))])
def test_wrong_shapes_are_named(
    nodes: dict[str, Any], model: ImageTo3D, image: tuple[int, ...], mask: tuple[int, ...] | None
) -> None:
    given = None if mask is None else torch.ones(mask)
    with pytest.raises(ValueError, match="image:" if mask is None else "mask:"):
        nodes["Diff2to3ImageTo3D"].execute(model, torch.rand(image), mask=given, **SETTINGS)
