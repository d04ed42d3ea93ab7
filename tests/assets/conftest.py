"""A writer of small glTF files, so that every feature is tested on a file that says exactly one thing."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import pytest

_COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
_TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}

#: A unit right-angled triangle in the xy plane and a cube of 12 triangles that wind counter-clockwise.
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)


class GlbWriter:
    """Collects accessors and JSON; ``glb()`` or ``gltf()`` gives the file."""

    def __init__(self) -> None:
        self.json: dict[str, Any] = {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": []}
        self.data = bytearray()

    def view(self, data: bytes, **extra: Any) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        self.json["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data), **extra}
        )
        self.data += data
        return len(self.json["bufferViews"]) - 1

    def accessor(self, array: np.ndarray, **extra: Any) -> int:
        array = np.ascontiguousarray(array)
        width = int(np.prod(array.shape[1:], dtype=int))
        self.json["accessors"].append(
            {
                "bufferView": self.view(array.tobytes()),
                "componentType": _COMPONENTS[array.dtype.str[1:]],
                "type": _TYPES[width],
                "count": len(array),
                **extra,
            }
        )
        return len(self.json["accessors"]) - 1

    def add(self, collection: str, item: dict[str, Any]) -> int:
        self.json.setdefault(collection, []).append(item)
        return len(self.json[collection]) - 1

    def image(self, pixels: np.ndarray) -> int:
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return self.add("images", {"bufferView": self.view(stream.getvalue()), "mimeType": "image/png"})

    def mesh(self, positions: np.ndarray = TRIANGLE, indices: Any = (0, 1, 2), **primitive: Any) -> int:
        """A mesh of one primitive; ``attributes`` in ``primitive`` adds to POSITION."""
        attributes = {"POSITION": self.accessor(positions.astype("f4")), **primitive.pop("attributes", {})}
        body = {"attributes": attributes, **primitive}
        if indices is not None:
            body["indices"] = self.accessor(np.asarray(indices, "u2"))
        return self.add("meshes", {"primitives": [body]})

    def scene(self, *nodes: dict[str, Any]) -> GlbWriter:
        roots = [self.add("nodes", node) for node in nodes]
        self.json["scenes"] = [{"nodes": roots}]
        return self

    def glb(self) -> bytes:
        self.json["buffers"] = [{"byteLength": len(self.data)}]
        text = json.dumps(self.json).encode()
        text += b" " * (-len(text) % 4)
        body = bytes(self.data) + b"\0" * (-len(self.data) % 4)
        total = 12 + 8 + len(text) + 8 + len(body)
        return b"".join(
            [
                struct.pack("<4sII", b"glTF", 2, total),
                struct.pack("<I4s", len(text), b"JSON"),
                text,
                struct.pack("<I4s", len(body), b"BIN\0"),
                body,
            ]
        )

    def gltf(self, buffer_uri: str) -> bytes:
        self.json["buffers"] = [{"byteLength": len(self.data), "uri": buffer_uri}]
        return json.dumps(self.json).encode()


@pytest.fixture
def writer() -> GlbWriter:
    return GlbWriter()


@pytest.fixture
def triangle_glb() -> bytes:
    made = GlbWriter()
    return made.scene({"mesh": made.mesh()}).glb()
