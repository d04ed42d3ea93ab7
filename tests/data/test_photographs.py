"""Photographs of boxes: the picture, the depth and the occupancy of a photo frame agree with each other."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diff2to3.checkpoint import BundleInfo, NetworkEntry, save_bundle
from diff2to3.config import config_from_dict
from diff2to3.data.executors import InlineExecutor
from diff2to3.data.pictures import decode_image
from diff2to3.data.prepare import prepare
from diff2to3.data.schema import DataConfig
from diff2to3.data.store import AssetStore
from diff2to3.flow.efficientnet import EfficientNetConfig, EfficientNetLite
from diff2to3.photo.frustum import project_points, voxel_centers

SETTINGS = {
    "seed": 5,
    "render": {"lighting": {"dome_samples": 8}, "supersample": 1},
    "resolutions": [16],
    "photographs": {"photo": {"num_views": 3, "size": 64, "resolution": 16}},
    "stages": ["voxels", "photographs", "maps"],
}


@pytest.fixture(scope="module")
def photographed(boxes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    network = EfficientNetLite(EfficientNetConfig(11, 1))
    entry = NetworkEntry("EfficientNetLite", {"num_blocks": 11, "pool": 1}, "photo_maps.safetensors")
    save_bundle(
        folder / "bundle", BundleInfo("maps", {"photo_maps": entry}), {"photo_maps": network.state_dict()}
    )
    settings = {
        **SETTINGS,
        "source": str(boxes),
        "out": str(folder / "data"),
        "maps": {"photo": {"bundle": str(folder / "bundle")}},
    }
    prepare(config_from_dict(DataConfig, settings, "test"), InlineExecutor())
    return AssetStore(folder / "data")


def test_occupancy_lies_in_the_hull_and_depth_on_its_front(photographed):
    checked = 0
    for asset in photographed.assets():
        stored = photographed.open(asset, "photographs_photo")
        for view in range(int(stored.info["num_views"])):
            item = stored.tensors(f"{view:03d}.safetensors")
            if float(item["lost"]) > 0:
                continue
            grid = torch.from_numpy(np.unpackbits(item["occupancy"].numpy(), axis=-1)).bool()
            _, alpha = decode_image(stored.read(f"{view:03d}.webp"))
            seen = project_points(voxel_centers(16), item["elevation"], item["focal"])[0]
            active = seen[grid.flatten()]
            pixels = ((active[:, :2] + 1) * 32).long().clamp(0, 63)
            # a voxel's centre may lie half a voxel's diagonal beside the surface: look around it
            near = torch.nn.functional.max_pool2d(alpha[None, None], 9, 1, 4)[0, 0]
            assert float(near[pixels[:, 1], pixels[:, 0]].min()) > 0.5
            # where the depth map sees something, there is an active voxel at that depth
            cells = ((active[:, :2] + 1) * 8).long().clamp(0, 15)
            for row, column in item["depth"].float().isfinite().nonzero()[::5].tolist():
                depth = float(item["depth"][row, column])
                around = ((cells[:, 0] - column).abs() <= 1) & ((cells[:, 1] - row).abs() <= 1)
                assert float((active[around, 2] - depth).abs().min()) < 1.3 / 16
            checked += 1
    assert checked >= 12


def test_maps_have_the_encoders_shapes_and_their_squares_are_kept(photographed):
    asset = photographed.assets()[0]
    stored = photographed.open(asset, "maps_photo")
    parts = [stored.tensors(f"{view:03d}.safetensors") for view in range(int(stored.info["num_views"]))]
    assert parts[0]["fine"].shape == (40, 8, 8) and parts[0]["coarse"].shape == (112, 4, 4)
    assert parts[0]["rgba"].shape == (4, 16, 16)
    squares = torch.stack([part["fine"].double().square().mean() for part in parts]).mean()
    assert stored.info["squares"][0] == pytest.approx(float(squares), rel=1e-2)


def test_relit_renderings_are_those_of_a_fresh_renderer(boxes):
    from diff2to3.assets import open_catalogue
    from diff2to3.assets.catalogue import load_asset
    from diff2to3.views.config import LightingConfig, RenderConfig
    from diff2to3.views.photo_frame import photograph
    from diff2to3.views.tracer import Camera, Frames, Tracer

    mesh = load_asset(next(iter(open_catalogue(str(boxes)))))
    shot = photograph(mesh.vertices, 30.0, 20.0, 2.0)
    camera = Camera.of(shot.viewmat.numpy(), shot.camera.K(48).numpy(), 48, 48)
    base = LightingConfig(dome_samples=8)
    other = replace(base, key_direction=(-0.2, -1.0, 0.4), key_intensity=0.6, dome_intensity=0.5)

    def picture(tracer):
        frames = Frames(1, 48, 48, ())
        tracer.render(camera, frames, 0)
        return frames.images

    reused = Tracer(mesh, RenderConfig(lighting=base, outputs=()))
    before = picture(reused)
    reused.relight(other)
    fresh = picture(Tracer(mesh, RenderConfig(lighting=other, outputs=())))
    np.testing.assert_array_equal(picture(reused), fresh)
    assert float(np.abs(fresh - before).max()) > 0.02
    with pytest.raises(ValueError, match="key light"):
        reused.relight(replace(other, dome_samples=16))


def test_elevations_are_radians(photographed):
    item = photographed.open(photographed.assets()[0], "photographs_photo").tensors("000.safetensors")
    assert math.radians(-12) < float(item["elevation"]) < math.radians(62)
    assert 1.0 <= float(item["focal"]) <= 6.0


def test_a_rod_seen_along_its_length_gives_no_photograph_and_no_error():
    """Its far end lies hundreds of cells behind the cube."""
    from diff2to3.data.photographs import photo_occupancy
    from diff2to3.types import Material, Mesh
    from diff2to3.views.photo_frame import photograph

    trimesh = pytest.importorskip("trimesh", reason="needs the data extra")
    box = trimesh.creation.box((1.0, 0.02, 0.02))
    faces = box.faces.astype(np.int32)
    rod = Mesh(box.vertices.astype(np.float32), faces, np.zeros(len(faces), np.int32), (Material(),))
    along = photograph(rod.vertices, 0.0, 0.0, 6.0)
    assert photo_occupancy(rod, along, 32) is None
    across = photograph(rod.vertices, 90.0, 0.0, 2.0)
    grid, lost = photo_occupancy(rod, across, 32)
    assert lost == 0.0 and 20 < grid.sum() < 200
