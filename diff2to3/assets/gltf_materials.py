"""glTF materials and textures as :class:`diff2to3.types.Material`, and how a primitive maps them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diff2to3.assets.gltf import Gltf, Json
from diff2to3.assets.images import TextureBudget
from diff2to3.assets.parts import decode_srgb
from diff2to3.assets.specular_glossiness import DIELECTRIC, convert_pixels, to_metallic
from diff2to3.errors import InputError
from diff2to3.types import Material, Texture

#: The last two are OpenGL's clamp to border and old clamp, which glTF does not have and some writers use.
_WRAPS = {33071: "clamp", 33648: "mirror", 10497: "repeat", 33069: "clamp", 10496: "clamp"}
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


#: A material, the UV map of its textures, and that of its emissive texture where it differs.
MappedMaterial = tuple[Material, UvMap, UvMap | None]


@dataclass(frozen=True)
class _Surface:
    """What a material is without emission; ``uv_map`` is None without a texture."""

    factor: Any
    texture: Texture | None
    uv_map: UvMap | None
    metallic: float
    roughness: float


class MaterialReader:
    """Reads each material and image of a document once."""

    def __init__(self, document: Gltf) -> None:
        self.document = document
        self.budget = TextureBudget(document.limits)
        self.notes: list[str] = []
        self._materials: dict[int | None, MappedMaterial] = {}
        self._images: dict[int, np.ndarray] = {}
        self._textures: dict[int, Texture] = {}

    def material(self, index: int | None) -> MappedMaterial:
        """The material and its UV maps; None is glTF's default material."""
        if index not in self._materials:
            spec = {} if index is None else self.document.item("materials", index)
            self._materials[index] = self._read(spec)
        return self._materials[index]

    def _read(self, spec: Json) -> MappedMaterial:
        extensions = spec.get("extensions", {})
        name = str(spec.get("name", ""))
        surface = self._surface(spec, extensions, name)
        emission = spec.get("emissiveTexture")
        strength = extensions.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1.0)
        emissive = tuple(float(x) * float(strength) for x in spec.get("emissiveFactor", (0, 0, 0)))
        emissive_texture = self._texture(emission) if any(emissive) else None
        emissive_map = UvMap.of(emission or {})
        if surface.uv_map is None or emissive_texture is None or surface.uv_map == emissive_map:
            own_map = None
        else:
            own_map = emissive_map
        if "KHR_materials_transmission" in extensions:
            self.notes.append(f"material {name!r}: transmission is drawn as opaque")
        material = Material(
            name=name,
            base_color_factor=_vector(surface.factor, 4, "baseColorFactor"),
            base_color_texture=surface.texture,
            emissive_factor=_vector(emissive, 3, "emissiveFactor"),
            emissive_texture=emissive_texture,
            alpha_mode=self._alpha_mode(spec, name),
            alpha_cutoff=float(spec.get("alphaCutoff", 0.5)),
            double_sided=bool(spec.get("doubleSided", False)),
            unlit="KHR_materials_unlit" in extensions,
            metallic_factor=surface.metallic,
            roughness_factor=surface.roughness,
        )
        return material, surface.uv_map or emissive_map, own_map

    def _alpha_mode(self, spec: Json, name: str) -> str:
        mode = str(spec.get("alphaMode", "OPAQUE"))
        if mode.upper() in ("OPAQUE", "MASK", "BLEND"):
            return mode.upper()
        self.notes.append(f"material {name!r}: alphaMode {mode[:20]!r} is unknown, drawn opaque")
        return "OPAQUE"

    def _surface(self, spec: Json, extensions: Json, name: str) -> _Surface:
        old = extensions.get("KHR_materials_pbrSpecularGlossiness")
        if old is not None:
            return self._specular_glossiness(old, name)
        pbr = spec.get("pbrMetallicRoughness", {})
        base = pbr.get("baseColorTexture")
        metallic, roughness = self._metallic_roughness(spec, name)
        factor = pbr.get("baseColorFactor", (1, 1, 1, 1))
        return _Surface(factor, self._texture(base), UvMap.of(base) if base else None, metallic, roughness)

    def _metallic_roughness(self, spec: Json, name: str) -> tuple[float, float]:
        """One number each for the material: factors, times the mean of a texture (blue and green; 4.6.2)."""
        pbr = spec.get("pbrMetallicRoughness")
        if pbr is None:
            return 0.0, 1.0
        metallic, roughness = float(pbr.get("metallicFactor", 1)), float(pbr.get("roughnessFactor", 1))
        info = pbr.get("metallicRoughnessTexture")
        if info is not None:
            texture = self._optional(info, name, "metallic-roughness texture", "taken for rough and no metal")
            if texture is None:
                return 0.0, roughness
            mean = texture.pixels.reshape(-1, 4).mean(0) / 255
            metallic, roughness = metallic * float(mean[2]), roughness * float(mean[1])
        return metallic, roughness

    def _specular_glossiness(self, old: Json, name: str) -> _Surface:
        """The metallic-roughness material that looks alike. Without a word on specular, diffuse is the colour."""
        info, specular_info = old.get("diffuseTexture"), old.get("specularGlossinessTexture")
        uv_map = UvMap.of(info) if info else None
        diffuse = self._texture(info)
        factor = _vector(old.get("diffuseFactor", (1, 1, 1, 1)), 4, "diffuseFactor")
        glossiness = float(old.get("glossinessFactor", 1))
        specular = None
        if specular_info is not None:
            specular = self._optional(specular_info, name, "specular texture", "its factor is used alone")
        if specular is None and "specularFactor" not in old:
            return _Surface(factor, diffuse, uv_map, 0.0, 1 - glossiness)
        mirror = np.array(_vector(old.get("specularFactor", (1, 1, 1)), 3, "specularFactor"))
        if specular is not None:
            glossiness *= float(specular.pixels[..., 3].mean()) / 255
            specular_map = UvMap.of(specular_info or {})
            if uv_map is not None and specular_map != uv_map:
                self.notes.append(
                    f"material {name!r}: its specular texture has its own UV map and is averaged"
                )
                mirror *= decode_srgb(specular.pixels[..., :3].reshape(-1, 3).mean(0) / 255)
                specular = None
            uv_map = uv_map or specular_map
        base: Any = factor
        if diffuse is None and specular is None:
            rgb, metal = to_metallic(np.array([factor[:3]]), mirror[None])
            base, metallic = (*rgb[0].tolist(), factor[3]), float(metal[0])
        elif specular is None and float(mirror.max()) <= DIELECTRIC:
            metallic = 0.0
        else:
            sampler = diffuse or specular
            images = [None if image is None else image.pixels for image in (diffuse, specular)]
            pixels, metallic = convert_pixels(images[0], images[1], (np.array(factor[:3]), mirror))
            diffuse = replace(sampler, pixels=pixels) if sampler is not None else None
            base = (1.0, 1.0, 1.0, factor[3])
        return _Surface(base, diffuse, uv_map, metallic, 1 - glossiness)

    def _optional(self, info: Json, name: str, what: str, instead: str) -> Texture | None:
        """A texture without which the asset can be drawn."""
        try:
            return self._texture(info)
        except InputError as error:
            self.notes.append(f"material {name!r}: {what} left out, {instead}: {error}")
            return None

    def _texture(self, info: Json | None) -> Texture | None:
        if info is None:
            return None
        index = info["index"]
        if index not in self._textures:
            spec = self.document.item("textures", index)
            sampler = self.document.item("samplers", spec["sampler"]) if "sampler" in spec else {}
            min_filter, mip_filter = _MIN_FILTERS.get(sampler.get("minFilter", 9987), ("linear", "linear"))
            self._textures[index] = Texture(
                pixels=self._image(spec),
                wrap=(
                    _WRAPS.get(sampler.get("wrapS", 10497), "repeat"),
                    _WRAPS.get(sampler.get("wrapT", 10497), "repeat"),
                ),
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
