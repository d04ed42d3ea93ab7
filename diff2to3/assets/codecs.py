"""Compressed glTF geometry, through the format owners' decoders. Each is optional, and named when missing."""

from __future__ import annotations

from typing import Any

import numpy as np

from diff2to3.errors import InputError, MissingDependencyError


def decode_draco(data: bytes, attributes: dict[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(indices [3F], {attribute: [P, K]}) of a KHR_draco_mesh_compression payload.

    ``attributes`` maps glTF names to Draco's unique ids. Values are as stored: accessors normalise.
    """
    try:
        import DracoPy
    except ImportError:
        raise MissingDependencyError("DracoPy (this file is Draco-compressed)", "data") from None
    try:
        mesh = DracoPy.decode(data)
    except Exception as error:  # the decoder has exception types of its own, none of them shared
        raise InputError(f"damaged Draco data ({error})") from None
    if getattr(mesh, "faces", None) is None:
        raise InputError("the Draco data holds points, not triangles")
    found = {a["unique_id"]: np.asarray(a["data"]) for a in mesh.attributes}
    missing = sorted(name for name, key in attributes.items() if key not in found)
    if missing:
        raise InputError(f"the Draco data lacks {', '.join(missing)}")
    return np.asarray(mesh.faces).reshape(-1), {name: found[key] for name, key in attributes.items()}


def decode_meshopt(data: bytes, spec: dict[str, Any]) -> np.ndarray:
    """The uint8 bytes of a buffer view under EXT_meshopt_compression; ``spec`` is the extension object."""
    try:
        import meshoptimizer
    except ImportError:
        raise MissingDependencyError("meshoptimizer (this file is meshopt-compressed)", "meshopt") from None
    count, stride, mode = int(spec["count"]), int(spec["byteStride"]), spec["mode"]
    if mode not in ("ATTRIBUTES", "TRIANGLES", "INDICES") or (mode != "ATTRIBUTES" and stride not in (2, 4)):
        raise InputError(f"meshopt mode {mode!r} with stride {stride} is not part of the extension")
    try:
        if mode == "ATTRIBUTES":
            bytes_of_a_row = np.dtype((np.uint8, (stride,)))
            rows = meshoptimizer.decode_vertex_buffer(count, stride, data, dtype=bytes_of_a_row)
            flat = np.ascontiguousarray(rows).reshape(-1)
            return _unfilter(flat, spec.get("filter", "NONE"), count, stride)
        decode = meshoptimizer.decode_index_buffer
        if mode == "INDICES":
            decode = meshoptimizer.decode_index_sequence
        indices = decode(count, 4, data)  # always 4: the stream does not depend on the index size
        return np.ascontiguousarray(indices.astype("<u2" if stride == 2 else "<u4")).view(np.uint8)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"damaged meshopt data ({error})") from None


def _unfilter(data: np.ndarray, name: str, count: int, stride: int) -> np.ndarray:
    import meshoptimizer

    filters = {
        "OCTAHEDRAL": (meshoptimizer.decode_filter_oct, (4, 8)),
        "QUATERNION": (meshoptimizer.decode_filter_quat, (8,)),
        "EXPONENTIAL": (meshoptimizer.decode_filter_exp, tuple(range(4, 257, 4))),
    }
    if name == "NONE":
        return data
    if name not in filters:
        raise InputError(f"unknown meshopt filter {name!r}")
    decode, strides = filters[name]
    if stride not in strides:
        raise InputError(f"meshopt filter {name} cannot have a stride of {stride} bytes")
    # The filters work on groups of four elements and touch the rest of the last group.
    padded = np.concatenate([data, np.zeros(-count % 4 * stride, np.uint8)])
    decoded: np.ndarray = decode(padded, count, stride)
    return decoded[: count * stride]
