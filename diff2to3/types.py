"""The containers that stages hand to each other. Axes, units and frames are those of the README.

    Mesh          triangles with materials             assets -> views, voxels
    Views         images with cameras                 assets -> voxels, losses, evaluation
    SparseVoxels  features on the active voxels        voxels -> VAE -> flow
    Gaussians     activated 3D Gaussian parameters     VAE -> renderer, files

All are frozen: a stage makes a new one (``dataclasses.replace``) and never edits what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", bound="_TensorContainer")
V = TypeVar("V", bound="Views")


def _check(name: str, tensor: Tensor, shape: Sequence[int | None], *, integer: bool = False) -> None:
    """Raise ValueError naming ``name`` unless ``tensor`` has ``shape`` (None matches any size) and kind."""
    fits = tensor.ndim == len(shape) and all(
        w is None or s == w for s, w in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        want = ", ".join("?" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: expected shape [{want}], got {list(tensor.shape)}")
    if integer and tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    if not integer and not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


@dataclass(frozen=True)
class _TensorContainer:
    def to(self: T, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> T:
        """Copy to ``device``; ``dtype`` applies to floating-point tensors only."""
        changes: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value.to(device, dtype if value.is_floating_point() else None)
        return replace(self, **changes)

    def detach(self: T) -> T:
        """The same values without gradient history."""
        changes = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.detach() for k, v in changes.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Views(_TensorContainer):
    """V images of one object with their cameras.

    images    [V, H, W, 3]  sRGB-encoded, in [0, 1], straight alpha
    alphas    [V, H, W]     coverage in [0, 1]
    viewmats  [V, 4, 4]     world -> camera, OpenCV axes (x right, y down, z forward)
    Ks        [V, 3, 3]     intrinsics in pixels; the centre of the top-left pixel is (0.5, 0.5)
    depths    [V, H, W]     z in the camera frame in object units; 0 where nothing is seen. Optional
    """

    images: Tensor
    alphas: Tensor
    viewmats: Tensor
    Ks: Tensor
    depths: Tensor | None = None

    def __post_init__(self) -> None:
        _check("images", self.images, (None, None, None, 3))
        v, h, w, _ = self.images.shape
        _check("alphas", self.alphas, (v, h, w))
        _check("viewmats", self.viewmats, (v, 4, 4))
        _check("Ks", self.Ks, (v, 3, 3))
        if self.depths is not None:
            _check("depths", self.depths, (v, h, w))

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def height(self) -> int:
        return int(self.images.shape[1])

    @property
    def width(self) -> int:
        return int(self.images.shape[2])

    def select(self: V, index: Tensor | Sequence[int]) -> V:
        """The views at ``index``, in that order."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] if isinstance(v, Tensor) else v for k, v in picked.items()})

    def composite(self, background: Tensor | float) -> Tensor:
        """Images over ``background`` (a number or [3]), in the sRGB encoding: [V, H, W, 3]."""
        a = self.alphas[..., None]
        return self.images * a + (1 - a) * background


@dataclass(frozen=True)
class SparseVoxels(_TensorContainer):
    """Features on the active voxels of a batch of R³ grids.

    coords      int32 [N, 4]   (batch, x, y, z), sorted by batch, no duplicates; 0 <= x, y, z < resolution
    feats       [N, C]
    resolution  R; the centre of index i is (i + 0.5)/R - 0.5
    cu_seqlens  int32 [B + 1]  rows of batch item b are cu_seqlens[b]:cu_seqlens[b+1]

    Build with :meth:`from_coords` to have ``cu_seqlens`` counted and everything checked.
    """

    coords: Tensor
    feats: Tensor
    resolution: int
    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        _check("coords", self.coords, (None, 4), integer=True)
        _check("feats", self.feats, (self.coords.shape[0], None))
        _check("cu_seqlens", self.cu_seqlens, (None,), integer=True)
        if self.resolution < 1:
            raise ValueError(f"resolution: expected a positive number, got {self.resolution}")

    @staticmethod
    def from_coords(
        coords: Tensor, feats: Tensor, resolution: int, batch_size: int | None = None
    ) -> SparseVoxels:
        """Check and pack. Raises ValueError for coordinates off the grid, unsorted batches or duplicates."""
        _check("coords", coords, (None, 4), integer=True)
        batch, xyz = coords[:, 0].long(), coords[:, 1:].long()
        if batch_size is None:
            batch_size = int(batch.max()) + 1 if len(batch) else 1
        if len(coords):
            if int(batch.min()) < 0 or int(batch.max()) >= batch_size:
                raise ValueError(f"coords: batch indices must be in [0, {batch_size})")
            if int(xyz.min()) < 0 or int(xyz.max()) >= resolution:
                raise ValueError(
                    f"coords: x, y, z must be in [0, {resolution}), got {int(xyz.min())} to {int(xyz.max())}"
                )
            if bool((batch[1:] < batch[:-1]).any()):
                raise ValueError("coords: rows must be sorted by batch index")
            keys = ((batch * resolution + xyz[:, 0]) * resolution + xyz[:, 1]) * resolution + xyz[:, 2]
            if len(torch.unique(keys)) != len(keys):
                raise ValueError("coords: duplicate voxels")
        counts = torch.bincount(batch, minlength=batch_size)
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return SparseVoxels(coords.to(torch.int32), feats, resolution, cu_seqlens)

    @staticmethod
    def cat(items: Sequence[SparseVoxels]) -> SparseVoxels:
        """Batch several (each may already hold several); resolutions and channels must agree."""
        if not items:
            raise ValueError("items: expected at least one SparseVoxels")
        if len({item.resolution for item in items}) != 1:
            raise ValueError(f"items: resolutions differ: {[item.resolution for item in items]}")
        coords, cu_seqlens = [], [items[0].cu_seqlens[:1]]
        num_batches = num_voxels = 0
        for item in items:
            shift = torch.tensor([num_batches, 0, 0, 0], dtype=item.coords.dtype, device=item.coords.device)
            coords.append(item.coords + shift)
            cu_seqlens.append(item.cu_seqlens[1:] + num_voxels)
            num_batches += item.batch_size
            num_voxels += len(item)
        feats = torch.cat([item.feats for item in items])
        return SparseVoxels(torch.cat(coords), feats, items[0].resolution, torch.cat(cu_seqlens))

    def __len__(self) -> int:
        return int(self.coords.shape[0])

    @property
    def batch_size(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1

    def with_feats(self, feats: Tensor) -> SparseVoxels:
        """The same voxels with other features [N, C']."""
        return replace(self, feats=feats)

    def unbind(self) -> list[SparseVoxels]:
        """One SparseVoxels a batch item, each with batch index 0."""
        bounds = self.cu_seqlens.tolist()
        items = []
        for start, stop in pairwise(bounds):
            coords = self.coords[start:stop].clone()
            coords[:, 0] = 0
            ends = torch.tensor([0, stop - start], dtype=torch.int32, device=coords.device)
            items.append(SparseVoxels(coords, self.feats[start:stop], self.resolution, ends))
        return items

    def centers(self) -> Tensor:
        """Voxel centres in the object frame: [N, 3]."""
        return (self.coords[:, 1:].to(self.feats.dtype) + 0.5) / self.resolution - 0.5


@dataclass(frozen=True)
class Gaussians(_TensorContainer):
    """Activated 3D Gaussian parameters of one object, in the object frame.

    means      [G, 3]
    quats      [G, 4]     wxyz; normalised where they are used
    scales     [G, 3]     standard deviations, > 0
    opacities  [G]        in [0, 1]
    sh         [G, K, 3]  spherical harmonics, K = (degree + 1)²; colour = 0.5 + Σ Y_k sh_k, sRGB-encoded
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh: Tensor

    def __post_init__(self) -> None:
        _check("means", self.means, (None, 3))
        g = self.means.shape[0]
        _check("quats", self.quats, (g, 4))
        _check("scales", self.scales, (g, 3))
        _check("opacities", self.opacities, (g,))
        _check("sh", self.sh, (g, None, 3))
        if self.sh.shape[1] not in (1, 4, 9, 16):
            raise ValueError(f"sh: expected 1, 4, 9 or 16 coefficients, got {self.sh.shape[1]}")

    def __len__(self) -> int:
        return int(self.means.shape[0])

    @property
    def sh_degree(self) -> int:
        return {1: 0, 4: 1, 9: 2, 16: 3}[int(self.sh.shape[1])]

    def chosen(self, which: Tensor) -> Gaussians:
        """Those that ``which`` picks: bool [G], or indices."""
        return Gaussians(
            self.means[which], self.quats[which], self.scales[which], self.opacities[which], self.sh[which]
        )

    @staticmethod
    def cat(items: Sequence[Gaussians]) -> Gaussians:
        """All Gaussians of ``items`` as one object; SH degrees must agree."""
        if not items:
            raise ValueError("items: expected at least one Gaussians")
        if len({item.sh.shape[1] for item in items}) != 1:
            raise ValueError(f"items: SH degrees differ: {[item.sh_degree for item in items]}")
        names = [f.name for f in fields(Gaussians)]
        return Gaussians(**{n: torch.cat([getattr(item, n) for item in items]) for n in names})


def _check_array(name: str, array: np.ndarray, shape: Sequence[int | None], dtype: type) -> None:
    fits = array.ndim == len(shape) and all(
        w is None or s == w for s, w in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        want = ", ".join("?" if w is None else str(w) for w in shape)
        have = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{name}: expected {np.dtype(dtype).name} [{want}], got {have}")


@dataclass(frozen=True, eq=False)
class Texture:
    """An image with the sampler it is read through.

    pixels      uint8 [H, W, 4]  sRGB-encoded colour, linear alpha; uv (0, 0) is the corner of pixel [0, 0]
    wrap        (u, v): each "repeat", "mirror" or "clamp"
    mag_filter  "linear" or "nearest"
    min_filter  "linear" or "nearest", within a level
    mip_filter  "linear" or "nearest" between levels, or "none" for the full image only
    """

    pixels: np.ndarray
    wrap: tuple[str, str] = ("repeat", "repeat")
    mag_filter: str = "linear"
    min_filter: str = "linear"
    mip_filter: str = "linear"

    def __post_init__(self) -> None:
        _check_array("pixels", self.pixels, (None, None, 4), np.uint8)
        for name, value, known in (
            ("wrap", self.wrap[0], ("repeat", "mirror", "clamp")),
            ("wrap", self.wrap[1], ("repeat", "mirror", "clamp")),
            ("mag_filter", self.mag_filter, ("linear", "nearest")),
            ("min_filter", self.min_filter, ("linear", "nearest")),
            ("mip_filter", self.mip_filter, ("linear", "nearest", "none")),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, eq=False)
class Material:
    """How a surface is coloured: factor x texture x vertex colour, plus emission; factors are linear.

    base_color_factor    linear RGBA
    base_color_texture   None for a plain colour
    emissive_factor      linear RGB, may exceed 1
    alpha_mode           "OPAQUE", "MASK" (visible where alpha >= alpha_cutoff) or "BLEND"
    double_sided         False: a face is seen only from the side from which it winds counter-clockwise
    unlit                True: the colour is shown as it is, under any light
    metallic_factor      0 to 1; only the path tracer heeds it (a texture is averaged to one number)
    roughness_factor     0 to 1; likewise
    """

    name: str = ""
    base_color_factor: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    base_color_texture: Texture | None = None
    emissive_factor: tuple[float, float, float] = (0.0, 0.0, 0.0)
    emissive_texture: Texture | None = None
    alpha_mode: str = "OPAQUE"
    alpha_cutoff: float = 0.5
    double_sided: bool = False
    unlit: bool = False
    metallic_factor: float = 0.0
    roughness_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha_mode not in ("OPAQUE", "MASK", "BLEND"):
            raise ValueError(f"alpha_mode: expected OPAQUE, MASK or BLEND, got {self.alpha_mode!r}")


@dataclass(frozen=True, eq=False)
class Mesh:
    """One asset as a flat list of triangles in the object frame. Arrays are numpy, on the CPU.

    vertices      float32 [P, 3]   object frame: z up, bounding box centred, longest side 1
    faces         int32 [F, 3]     counter-clockwise seen from outside
    material_ids  int32 [F]        rows of ``materials``
    materials     M >= 1
    normals       float32 [P, 3]   unit shading normals, or None for flat shading
    uvs           float32 [P, 2]   texture coordinates, v down; None where no material has a texture
    colors        float32 [P, 4]   linear RGBA vertex colours, or None for white
    emissive_uvs  float32 [P, 2]   coordinates of emissive textures; None where they read ``uvs``
    transform     float64 [4, 4]   file coordinates -> object frame
    notes         what the file has and this container does not carry, one line each
    """

    vertices: np.ndarray
    faces: np.ndarray
    material_ids: np.ndarray
    materials: tuple[Material, ...]
    normals: np.ndarray | None = None
    uvs: np.ndarray | None = None
    colors: np.ndarray | None = None
    emissive_uvs: np.ndarray | None = None
    transform: np.ndarray = field(default_factory=lambda: np.eye(4))
    name: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_array("vertices", self.vertices, (None, 3), np.float32)
        _check_array("faces", self.faces, (None, 3), np.int32)
        _check_array("material_ids", self.material_ids, (len(self.faces),), np.int32)
        _check_array("transform", self.transform, (4, 4), np.float64)
        p = len(self.vertices)
        for name, array, width in (
            ("normals", self.normals, 3),
            ("uvs", self.uvs, 2),
            ("emissive_uvs", self.emissive_uvs, 2),
            ("colors", self.colors, 4),
        ):
            if array is not None:
                _check_array(name, array, (p, width), np.float32)
        if not self.materials:
            raise ValueError("materials: expected at least one")
        for name, index, bound in (
            ("faces", self.faces, p),
            ("material_ids", self.material_ids, len(self.materials)),
        ):
            if index.size and (int(index.min()) < 0 or int(index.max()) >= bound):
                raise ValueError(f"{name}: indices must be in [0, {bound})")

    @property
    def num_faces(self) -> int:
        return len(self.faces)

    @property
    def triangles(self) -> np.ndarray:
        """Corner positions: float32 [F, 3, 3] (face, corner, xyz)."""
        return np.asarray(self.vertices[self.faces])

    def mirrored(self) -> Mesh:
        """The same asset as a mirror at x = 0 shows it; faces stay counter-clockwise seen from outside."""
        flip = np.array([-1, 1, 1], np.float32)
        return replace(
            self,
            vertices=self.vertices * flip,
            faces=np.ascontiguousarray(self.faces[:, ::-1]),
            normals=None if self.normals is None else self.normals * flip,
            transform=np.diag([-1.0, 1.0, 1.0, 1.0]) @ self.transform,
        )
