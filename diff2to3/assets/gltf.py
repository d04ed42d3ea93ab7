"""glTF 2.0 as a document: JSON, buffers, accessors and images, each checked against its bounds before use.

Nothing here knows about scenes; :mod:`diff2to3.assets.gltf_scene` walks the nodes. Numbers and names follow
the glTF 2.0 specification, sections 3.6 (accessors) and 4.4 (GLB).
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import urllib.parse
from functools import cached_property
from typing import Any

import numpy as np

from diff2to3.assets import codecs
from diff2to3.assets.limits import Limits
from diff2to3.assets.source import Resolver
from diff2to3.errors import InputError
from diff2to3.files import utf8

Json = dict[str, Any]

COMPONENT_DTYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
TYPE_SIZES = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}

#: Extensions that change what is drawn and that this reader follows or can safely ignore. A file that
#: *requires* any other one is refused.
UNDERSTOOD = {
    "EXT_mesh_gpu_instancing",
    "EXT_meshopt_compression",
    "EXT_texture_webp",
    "KHR_draco_mesh_compression",
    "KHR_materials_emissive_strength",
    "KHR_materials_pbrSpecularGlossiness",
    "KHR_materials_unlit",
    "KHR_mesh_quantization",
    "KHR_node_visibility",
    "KHR_texture_transform",
    # ignored: reflections and lights are not drawn
    "KHR_lights_punctual",
    "KHR_materials_anisotropy",
    "KHR_materials_clearcoat",
    "KHR_materials_dispersion",
    "KHR_materials_ior",
    "KHR_materials_iridescence",
    "KHR_materials_sheen",
    "KHR_materials_specular",
    "KHR_materials_transmission",
    "KHR_materials_variants",
    "KHR_materials_volume",
    "KHR_xmp",
    "KHR_xmp_json_ld",
}


class Gltf:
    """A parsed document. ``json`` is the raw JSON object; the methods decode what it points to."""

    def __init__(self, data: bytes, resolve: Resolver, limits: Limits) -> None:
        self.limits = limits
        self._resolve = resolve
        text, self._binary_chunk = _split_glb(data) if data[:4] == b"glTF" else (data, None)
        self.json = _parse_json(text)
        version = str(self.json.get("asset", {}).get("version", ""))
        if not version.startswith("2"):
            raise InputError(f"glTF version {version or 'missing'!s}; only glTF 2 is read")
        unknown = sorted(set(self.json.get("extensionsRequired", [])) - UNDERSTOOD)
        if unknown:
            raise InputError(f"requires the glTF extension {', '.join(unknown)}, which is not supported")
        self._buffers: dict[int, bytes] = {}
        self._views: dict[int, tuple[np.ndarray, int]] = {}

    @property
    def max_elements(self) -> int:
        """No accessor can sensibly hold more elements than three corners of every allowed face."""
        return 3 * self.limits.max_faces

    def item(self, collection: str, index: int | float) -> Json:
        """``json[collection][index]``; InputError when it is not there."""
        items = self.json.get(collection, [])
        if isinstance(index, float) and index.is_integer():  # JSON tells 4.0 from 4 no more than glTF does
            index = int(index)
        if not isinstance(index, int) or not 0 <= index < len(items):
            raise InputError(f"{collection}[{index}] is referred to and missing")
        found = items[index]
        if not isinstance(found, dict):
            raise InputError(f"{collection}[{index}] is not an object")
        return found

    def buffer(self, index: int) -> bytes:
        if index not in self._buffers:
            uri = self.item("buffers", index).get("uri")
            if uri is not None:
                self._buffers[index] = self.read_uri(uri)
            elif index == 0 and self._binary_chunk is not None:
                self._buffers[index] = self._binary_chunk
            else:
                raise InputError(f"buffers[{index}] has no data")
        return self._buffers[index]

    def read_uri(self, uri: str) -> bytes:
        """The bytes of a data: URI or of a file beside this one."""
        if not uri.startswith("data:"):
            return self._resolve(uri)
        header, _, payload = uri.partition(",")
        try:
            if header.endswith(";base64"):
                return base64.b64decode(payload, validate=False)
            return urllib.parse.unquote_to_bytes(payload)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"damaged data: URI ({error})") from None

    def view_bytes(self, index: int) -> tuple[np.ndarray, int]:
        """(uint8 bytes, stride or 0) of a buffer view, decompressed."""
        if index not in self._views:
            view = self.item("bufferViews", index)
            packed = view.get("extensions", {}).get("EXT_meshopt_compression")
            if packed is None:
                data = self._slice(view)
            else:
                num_bytes = int(packed["count"]) * int(packed["byteStride"])
                self.limits.check("bytes in a buffer view", num_bytes, "max_file_bytes")
                data = codecs.decode_meshopt(self._slice(packed).tobytes(), packed)
            self._views[index] = data, int(view.get("byteStride", 0))
        return self._views[index]

    def _slice(self, view: Json) -> np.ndarray:
        buffer = self.buffer(view["buffer"])
        start, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        if start < 0 or length < 0 or start + length > len(buffer):
            raise InputError(f"a buffer view ends at byte {start + length} of {len(buffer)}: truncated file")
        return np.frombuffer(buffer, np.uint8, length, start)

    def accessor(self, index: int) -> np.ndarray:
        """An accessor's values: [count, size], or [count] for scalars. Normalised integers become float32."""
        spec = self.item("accessors", index)
        dtype, size, count = self._layout(spec)
        if "bufferView" in spec:
            data, stride = self.view_bytes(spec["bufferView"])
            values = _strided(data, int(spec.get("byteOffset", 0)), stride, count, dtype, size)
        else:
            values = np.zeros((count, size), dtype)
        if "sparse" in spec:
            values = self._apply_sparse(values.copy(), spec["sparse"], dtype, size)
        return self.finish(values, spec)

    def finish(self, values: np.ndarray, spec: Json) -> np.ndarray:
        """Normalised integers to float32; [count, 1] to [count]."""
        if spec.get("normalized", False) and values.dtype.kind in "iu":
            top = np.float32(np.iinfo(values.dtype).max)
            values = np.maximum(values.astype(np.float32) / top, np.float32(-1))
        return values[:, 0] if spec["type"] == "SCALAR" else values

    def typed(self, values: np.ndarray, spec: Json) -> np.ndarray:
        """Values from a decoder that has integer types of its own, as the accessor's type."""
        dtype, size, count = self._layout(spec)
        if values.shape != (count, size):
            raise InputError(f"a compressed attribute is {values.shape}, its accessor {(count, size)}")
        return self.finish(values.astype(dtype), spec)

    def _layout(self, spec: Json) -> tuple[np.dtype, int, int]:
        try:
            dtype = np.dtype(COMPONENT_DTYPES[spec["componentType"]])
            size, count = TYPE_SIZES[spec["type"]], int(spec["count"])
        except KeyError as error:
            raise InputError(f"an accessor lacks or misuses {error}") from None
        if count < 0 or count > self.max_elements:
            raise InputError(
                f"an accessor with {count:,} is over the limit of {self.max_elements:,} (max_faces x 3)"
            )
        return dtype, size, count

    def _apply_sparse(self, values: np.ndarray, sparse: Json, dtype: np.dtype, size: int) -> np.ndarray:
        count = int(sparse["count"])
        if not 0 <= count <= len(values):
            raise InputError(f"a sparse accessor replaces {count} of {len(values)} elements")
        where, what = sparse["indices"], sparse["values"]
        data, _ = self.view_bytes(where["bufferView"])
        index_dtype = np.dtype(COMPONENT_DTYPES[where["componentType"]])
        rows = _strided(data, int(where.get("byteOffset", 0)), 0, count, index_dtype, 1)[:, 0]
        if count and int(rows.max()) >= len(values):
            raise InputError("a sparse accessor points past its end")
        data, _ = self.view_bytes(what["bufferView"])
        values[rows] = _strided(data, int(what.get("byteOffset", 0)), 0, count, dtype, size)
        return values

    def image_bytes(self, index: int) -> bytes:
        image = self.item("images", index)
        if "uri" in image:
            return self.read_uri(image["uri"])
        return bytes(self.view_bytes(image["bufferView"])[0].tobytes())

    @cached_property
    def nodes(self) -> list[Json]:
        nodes: list[Json] = self.json.get("nodes", [])
        self.limits.check("nodes", len(nodes), "max_nodes")
        return nodes


def _split_glb(data: bytes) -> tuple[bytes, bytes | None]:
    """The JSON chunk and the binary chunk of a GLB container (specification 4.4)."""
    if len(data) < 20:
        raise InputError("truncated GLB header")
    _, version, total = struct.unpack_from("<4sII", data)
    if version != 2:
        raise InputError(f"GLB version {version}; only 2 is read")
    if total > len(data):
        raise InputError(f"GLB of {total} bytes holds only {len(data)}: truncated file")
    text, binary, offset = None, None, 12
    while offset + 8 <= total:
        length, kind = struct.unpack_from("<I4s", data, offset)
        offset += 8
        if offset + length > total:
            raise InputError("a GLB chunk ends past the file: truncated or damaged")
        if kind == b"JSON" and text is None:
            text = data[offset : offset + length]
        elif kind == b"BIN\0" and binary is None:
            binary = data[offset : offset + length]
        offset += length
        # A length counts its padding. Some writers leave the padding out, of the length or altogether.
        if data[offset + 4 : offset + 8] != b"BIN\0":
            offset = (offset + 3) & ~3
    if text is None:
        raise InputError("GLB without a JSON chunk")
    return text, binary


def _parse_json(text: bytes) -> Json:
    try:
        document = json.loads(utf8(text).decode("utf-8").rstrip("\0 "))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"not glTF: the JSON cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise InputError("not glTF: the JSON is not an object")
    if b"null" in text:
        _drop_nulls(document)
    return document


def _drop_nulls(document: Json) -> None:
    """Take out members that are null: some writers mean by it what leaving them out means."""
    stack: list[Any] = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key in [key for key, value in item.items() if value is None]:
                del item[key]
        stack.extend(
            v for v in (item.values() if isinstance(item, dict) else item) if isinstance(v, dict | list)
        )


def _strided(
    data: np.ndarray, offset: int, stride: int, count: int, dtype: np.dtype, size: int
) -> np.ndarray:
    """View ``count`` rows of ``size`` values starting at ``offset``: [count, size]."""
    row = dtype.itemsize * size
    stride = stride or row
    if count == 0:
        return np.zeros((0, size), dtype)
    if offset < 0 or stride < row or offset + stride * (count - 1) + row > len(data):
        raise InputError(f"an accessor of {count} does not fit its buffer view: truncated or damaged")
    return np.ndarray((count, size), dtype, data, offset, (stride, dtype.itemsize))
