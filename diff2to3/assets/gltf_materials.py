"""glTF materials and textures as :class:`diff2to3.types.Material`, and how a primitive maps them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from diff2to3.assets.gltf import Gltf, Json
from diff2to3.assets.images import TextureBudget
from diff2to3.errors import InputError
from diff2to3.types import Material, Texture

_WRAPS = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
#: minFilter -> (within a level, between levels); glTF 2.0 section 3.8.4
_MIN_FILTERS = {
    9728: ("nearest", "none"),
    9729: ("linear", "none"),
    9984: ("nearest", "nearest"),
    9985: ("linear", "nearest"),
    9986: ("nearest", "linear"),
    9987: ("linear", "linear"),
}


@dataclass(frozen=True)
class UvMap:
    """Which UV set a material's textures read, and through which affine map (KHR_texture_transform)."""

    uv_set: int = 0
    matrix: tuple[tuple[float, float, float], tuple[float, float, float]] = ((1, 0, 0), (0, 1, 0))

    @staticmethod
    def of(texture_info: Json) -> UvMap:
        uv_set = int(texture_info.get("texCoord", 0))
        transform = texture_info.get("extensions", {}).get("KHR_texture_transform")
        if transform is None:
            return UvMap(uv_set)
        scale_u, scale_v = map(float, transform.get("scale", (1, 1)))
        offset_u, offset_v = map(float, transform.get("offset", (0, 0)))
        # v points down, so the extension's counter-clockwise turn of the coordinates is this matrix; its
        # worked example (lower left quadrant, image turned clockwise) is a test here.
        cos, sin = math.cos(transform.get("rotation", 0)), math.sin(transform.get("rotation", 0))
        rows = ((cos * scale_u, sin * scale_v, offset_u), (-sin * scale_u, cos * scale_v, offset_v))
        return UvMap(int(transform.get("texCoord", uv_set)), rows)

    def apply(self, uvs: np.ndarray) -> np.ndarray:
        """float32 [P, 2] -> float32 [P, 2]."""
        if self.matrix == ((1, 0, 0), (0, 1, 0)):
            return uvs.astype(np.float32)
        u, v = uvs.astype(np.float64).T
        return np.stack([a * u + b * v + c for a, b, c in self.matrix], 1).astype(np.float32)


class MaterialReader:
    """Reads each material and image of a document once."""

    def __init__(self, document: Gltf) -> None:
        self.document = document
        self.budget = TextureBudget(document.limits)
        self.notes: list[str] = []
        self._materials: dict[int | None, tuple[Material, UvMap]] = {}
        self._images: dict[int, np.ndarray] = {}
        self._textures: dict[int, Texture] = {}

    def material(self, index: int | None) -> tuple[Material, UvMap]:
        """The material and its UV map; None is glTF's default material."""
        if index not in self._materials:
            spec = {} if index is None else self.document.item("materials", index)
            self._materials[index] = self._read(spec)
        return self._materials[index]

    def _read(self, spec: Json) -> tuple[Material, UvMap]:
        extensions = spec.get("extensions", {})
        name = str(spec.get("name", ""))
        factor, base = self._base_color(spec, extensions)
        emission = spec.get("emissiveTexture")
        uv_map = UvMap.of(base or emission or {})
        if base and emission and UvMap.of(emission) != uv_map:
            self.notes.append(f"material {name!r}: the emissive texture has its own UV map and is left out")
            emission = None
        strength = extensions.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1.0)
        if "KHR_materials_transmission" in extensions:
            self.notes.append(f"material {name!r}: transmission is drawn as opaque")
        emissive = tuple(float(x) * float(strength) for x in spec.get("emissiveFactor", (0, 0, 0)))
        metallic, roughness = self._metallic_roughness(spec, extensions)
        material = Material(
            name=name,
            base_color_factor=_vector(factor, 4, "baseColorFactor"),
            base_color_texture=self._texture(base),
            emissive_factor=_vector(emissive, 3, "emissiveFactor"),
            emissive_texture=self._texture(emission) if any(emissive) else None,
            alpha_mode=spec.get("alphaMode", "OPAQUE"),
            alpha_cutoff=float(spec.get("alphaCutoff", 0.5)),
            double_sided=bool(spec.get("doubleSided", False)),
            unlit="KHR_materials_unlit" in extensions,
            metallic_factor=metallic,
            roughness_factor=roughness,
        )
        return material, uv_map

    def _base_color(self, spec: Json, extensions: Json) -> tuple[Any, Json | None]:
        """(factor, texture info) of the metallic-roughness model, or of the older specular-glossiness one."""
        old = extensions.get("KHR_materials_pbrSpecularGlossiness")
        if old is not None:
            return old.get("diffuseFactor", (1, 1, 1, 1)), old.get("diffuseTexture")
        pbr = spec.get("pbrMetallicRoughness", {})
        return pbr.get("baseColorFactor", (1, 1, 1, 1)), pbr.get("baseColorTexture")

    def _metallic_roughness(self, spec: Json, extensions: Json) -> tuple[float, float]:
        """One number each for the material: factors, times the mean of a texture (blue and green; 4.6.2)."""
        old = extensions.get("KHR_materials_pbrSpecularGlossiness")
        if old is not None:
            return 0.0, 1 - float(old.get("glossinessFactor", 1))
        pbr = spec.get("pbrMetallicRoughness")
        if pbr is None:
            return 0.0, 1.0
        metallic, roughness = float(pbr.get("metallicFactor", 1)), float(pbr.get("roughnessFactor", 1))
        texture = self._texture(pbr.get("metallicRoughnessTexture"))
        if texture is not None:
            mean = texture.pixels.reshape(-1, 4).mean(0) / 255
            metallic, roughness = metallic * float(mean[2]), roughness * float(mean[1])
        return metallic, roughness

    def _texture(self, info: Json | None) -> Texture | None:
        if info is None:
            return None
        index = info["index"]
        if index not in self._textures:
            spec = self.document.item("textures", index)
            sampler = self.document.item("samplers", spec["sampler"]) if "sampler" in spec else {}
            min_filter, mip_filter = _MIN_FILTERS[sampler.get("minFilter", 9987)]
            self._textures[index] = Texture(
                pixels=self._image(spec),
                wrap=(_WRAPS[sampler.get("wrapS", 10497)], _WRAPS[sampler.get("wrapT", 10497)]),
                mag_filter="nearest" if sampler.get("magFilter") == 9728 else "linear",
                min_filter=min_filter,
                mip_filter=mip_filter,
            )
        return self._textures[index]

    def _image(self, texture: Json) -> np.ndarray:
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        source = webp.get("source", texture.get("source"))
        if source is None:
            kinds = ", ".join(texture.get("extensions", {})) or "none"
            raise InputError(f"a texture has no image in a format that is read (extensions: {kinds})")
        if source not in self._images:
            data = self.document.image_bytes(source)
            self._images[source] = self.budget.decode(data, f"images[{source}]")
        return self._images[source]


def _vector(values: Any, size: int, name: str) -> Any:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != size or not all(map(math.isfinite, numbers)):
        raise InputError(f"{name}: expected {size} finite numbers, got {values}")
    return numbers
