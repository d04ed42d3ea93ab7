"""Wavefront MTL: materials of OBJ files. Every statement but Kd, d, Tr, Ke and the textures of Kd, d and Ke is ignored.

Kd is linear, as Blender's importer takes it. map_Kd stands in place of Kd, which many exporters leave black; map_d and
map_Ke are multiplied by d and Ke unless those are 0. A picture of map_d says how opaque the surface is by its alpha
where it has any, else by its brightness, or by the channel that -imfchan names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from diff2to3.assets.images import TextureBudget
from diff2to3.assets.parts import NO_MATERIAL
from diff2to3.assets.source import Resolver
from diff2to3.errors import InputError
from diff2to3.files import utf8
from diff2to3.types import Material, Texture

#: How many arguments each option of a map statement takes at most (MTL specification, texture map options).
_MAP_OPTIONS = {
    "-blendu": 1, "-blendv": 1, "-bm": 1, "-boost": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1, "-mm": 2,
    "-o": 3, "-s": 3, "-t": 3, "-texres": 1, "-type": 1,
}  # fmt: skip
_FOLLOWED = {"map_kd": {"-s", "-o", "-clamp"}, "map_ke": {"-s", "-o", "-clamp"},
             "map_d": {"-s", "-o", "-clamp", "-imfchan"}}  # fmt: skip
_SHOWN = {"map_kd": "map_Kd", "map_ke": "map_Ke", "map_d": "map_d"}
#: Brightness of linear RGB (ITU-R BT.709).
_LUMINANCE = (0.2126, 0.7152, 0.0722)
#: Options that may leave out their last numbers.
_VECTOR_OPTIONS = ("-o", "-s", "-t", "-mm")
#: CIE XYZ -> linear sRGB (IEC 61966-2-1), for "Kd xyz".
_XYZ_TO_RGB = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))


@dataclass(frozen=True)
class TextureMap:
    """Where a texture lies on the texture coordinates of an OBJ, whose v points up: u' = scale u + offset."""

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def apply(self, uvs: np.ndarray) -> np.ndarray:
        """float64 [P, 2] with v up -> float32 [P, 2] with v down."""
        u, v = (uvs[:, i] * self.scale[i] + self.offset[i] for i in range(2))
        return np.stack([u, 1 - v], 1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Surface:
    """A material, and how its textures lie: of colour and opacity, and of emission."""

    material: Material
    where: TextureMap = TextureMap()
    emissive_where: TextureMap = TextureMap()


def name_of(text: bytes) -> str:
    """A name in a file whose encoding is not said: UTF-8, else Latin-1."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def find_name(text: bytes, resolve: Resolver, folder: str = "") -> tuple[str, bytes] | None:
    """(path, bytes) of the file that the rest of a statement names, as it stands or before a comment."""
    for name in _without_comment(name_of(text)):
        try:
            return resolve.find(name, folder)
        except InputError:
            continue
    return None


def _without_comment(text: str) -> list[str]:
    """The text, and what stands before " #" in it: a name may hold #, and a comment may follow a name."""
    cut = text.split(" #")[0].strip() if not text.startswith("#") else text
    return list(dict.fromkeys((text, cut)))


@dataclass
class _Block:
    """The statements under one newmtl, and the folder of the file that they are in."""

    folder: str
    said: dict[str, bytes] = field(default_factory=dict)


class MaterialLibrary:
    """Materials by name. Each is made, and its texture decoded, when a face first uses it."""

    def __init__(self, resolve: Resolver, budget: TextureBudget, notes: list[str]) -> None:
        self.budget = budget
        self._resolve, self._notes = resolve, notes
        self._blocks: dict[str, _Block] = {}
        self._surfaces: dict[str, Surface] = {}
        self._pixels: dict[str, np.ndarray] = {}

    def add(self, data: bytes, folder: str) -> None:
        """Take in one file, which lies in ``folder`` relative to the OBJ."""
        block = _Block(folder)
        for line in utf8(data).splitlines():
            words = line.split(None, 1)
            if len(words) < 2 or words[0].startswith(b"#"):
                continue
            if words[0].lower() == b"newmtl":
                block = _Block(folder)
                for name in _without_comment(name_of(words[1].strip())):
                    self._blocks[name] = block
            else:
                block.said[name_of(words[0]).lower()] = words[1].strip()

    def surface(self, key: bytes) -> Surface | None:
        """The material that ``usemtl`` names, or None."""
        for name in _without_comment(name_of(key)):
            if name in self._blocks:
                if name not in self._surfaces:
                    self._surfaces[name] = self._read(name, self._blocks[name])
                return self._surfaces[name]
        return None

    def _read(self, name: str, block: _Block) -> Surface:
        texture, where = self._texture(name, block, "map_kd")
        if "map_kd" in block.said:
            color = NO_MATERIAL[:3] if texture is None else (1.0, 1.0, 1.0)
        else:
            color = self._color(name, block, "Kd", NO_MATERIAL[:3])
        alpha = self._alpha(name, block.said)
        cut, cut_where = self._texture(name, block, "map_d")
        if cut is not None and texture is not None and cut_where != where:
            self._notes.append(f"material {name!r}: map_d lies in another way than map_Kd, left out")
        elif cut is not None:
            texture, where = self._with_opacity(texture, cut, block), cut_where
            alpha = alpha or 1.0
        else:
            cut = None
        emissive, emissive_where = self._texture(name, block, "map_ke")
        glow = self._color(name, block, "Ke", (0.0, 0.0, 0.0))
        if "map_ke" in block.said:  # without its picture it is not known what glows
            glow = (0.0, 0.0, 0.0) if emissive is None else glow if any(glow) else (1.0, 1.0, 1.0)
        material = Material(
            name=name,
            base_color_factor=(*color, alpha),
            base_color_texture=texture,
            emissive_factor=glow,
            emissive_texture=emissive,
            alpha_mode="BLEND" if alpha < 1 or cut is not None else "OPAQUE",
            double_sided=True,
        )
        return Surface(material, where, emissive_where)

    def _color(
        self, name: str, block: _Block, key: str, default: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        """Linear RGB of one statement: one number for grey, three, or "xyz" and three."""
        words = block.said.get(key.lower(), b"").split(b"#")[0].split()
        if not words:
            return default
        is_xyz = words[0].lower() == b"xyz"
        found = [number for number in map(_number, words[is_xyz : is_xyz + 3]) if number is not None]
        if len(found) < len(words[is_xyz : is_xyz + 3]) or not found:  # "spectral FILE", or no numbers
            self._notes.append(f"material {name!r}: {key} is no colour in RGB, left out")
            return default
        r, g, b = (found * 3)[:3]
        if is_xyz:
            r, g, b = (max(row[0] * r + row[1] * g + row[2] * b, 0.0) for row in _XYZ_TO_RGB)
        elif key == "Kd" and are_bytes(np.array([r, g, b])):
            self._notes.append(f"material {name!r}: a Kd above 1 is read as 0 to 255")
            r, g, b = r / 255, g / 255, b / 255
        return r, g, b

    def _alpha(self, name: str, said: dict[str, bytes]) -> float:
        """Opacity: d, or one minus Tr. MeshLab writes "Tr 1" for opaque things, so that says nothing."""
        for key in ("d", "tr"):
            numbers = [_number(word) for word in said.get(key, b"").split(b"#")[0].split()]
            found = [number for number in numbers if number is not None]
            if not found:
                continue
            if key == "d":
                return min(max(found[-1], 0.0), 1.0)  # "-halo" may stand before it
            if found[0] >= 1:
                self._notes.append(f"material {name!r}: Tr 1 without d is drawn opaque")
                return 1.0
            return min(1 - found[0], 1.0)
        return 1.0

    def _texture(self, name: str, block: _Block, key: str) -> tuple[Texture | None, TextureMap]:
        if key not in block.said:
            return None, TextureMap()
        shown = _SHOWN[key]
        options, rest = _map_options(block.said[key])
        ignored = sorted(set(options) - _FOLLOWED[key])
        if ignored:
            self._notes.append(f"material {name!r}: options {', '.join(ignored)} of {shown} are not followed")
        found = find_name(rest, self._resolve, block.folder)
        if found is None:
            instead = "drawn grey" if key == "map_kd" else f"{shown} is left out"
            self._notes.append(f"material {name!r}: no texture {name_of(rest)[:80]!r}, {instead}")
            return None, TextureMap()
        path, data = found
        if path not in self._pixels:
            self._pixels[path] = self.budget.decode(data, path)
        wrap = "clamp" if options.get("-clamp") == [b"on"] else "repeat"
        scale = _vector(options.get("-s", []), 1.0)
        return Texture(self._pixels[path], (wrap, wrap)), TextureMap(
            scale, _vector(options.get("-o", []), 0.0)
        )

    def _with_opacity(self, texture: Texture | None, cut: Texture, block: _Block) -> Texture:
        """The colours of ``texture``, or white, and the opacity of ``cut``."""
        options, _ = _map_options(block.said["map_d"])
        channel = b"".join(options.get("-imfchan", [])).lower().decode("latin-1")
        opacity = _scalar(cut.pixels, channel)
        if texture is None:
            pixels, wrap = np.full_like(cut.pixels, 255), cut.wrap
        else:
            pixels, wrap = texture.pixels.copy(), texture.wrap
            if opacity.shape != pixels.shape[:2]:
                opacity = self.budget.resized(opacity, pixels.shape[1], pixels.shape[0])
        pixels[..., 3] = opacity
        self.budget.count(pixels)
        return Texture(pixels, wrap)


def _scalar(pixels: np.ndarray, channel: str) -> np.ndarray:
    """uint8 [H, W] of uint8 [H, W, 4]: the channel that -imfchan names ("m" is matte, ours alpha), else alpha where
    there is any, else brightness.
    """
    if channel in ("r", "g", "b"):
        return pixels[..., "rgb".index(channel)]
    if channel == "m" or (channel != "l" and int(pixels[..., 3].min()) < 255):
        return pixels[..., 3]
    return (pixels[..., :3] @ np.array(_LUMINANCE) + 0.5).astype(np.uint8)


def are_bytes(colors: np.ndarray) -> bool:
    """Whether colours that should lie in [0, 1] are numbers from 0 to 255."""
    top = float(np.nanmax(colors, initial=0))
    return top > 2 or (top > 1 and bool((colors == np.floor(colors)).all()))


def _map_options(text: bytes) -> tuple[dict[str, list[bytes]], bytes]:
    """({option: its arguments}, what follows: the file's name, which may hold spaces)."""
    options: dict[str, list[bytes]] = {}
    words = text.split(None, 1)
    while len(words) == 2 and words[0].lower().decode("latin-1") in _MAP_OPTIONS:
        key, rest = words[0].lower().decode("latin-1"), words[1]
        options[key] = []
        words = rest.split(None, 1)
        while len(words) == 2 and len(options[key]) < _MAP_OPTIONS[key]:
            if key in _VECTOR_OPTIONS and _number(words[0]) is None:
                break
            options[key].append(words[0])
            rest = words[1]
            words = rest.split(None, 1)
        text = rest
    return options, text.strip()


def _vector(words: list[bytes], default: float) -> tuple[float, float]:
    numbers = [number for number in map(_number, words) if number is not None]
    u, v = (numbers + [default] * 2)[:2]
    return u, v


def _number(word: bytes) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
