"""The kinds of files: what inputs begin as, how they are changed, and what reading one must give."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mutation
import numpy as np
import torch
from PIL import Image, ImageCms

from diff2to3.assets import Limits, load_mesh
from diff2to3.errors import InputError
from diff2to3.formats import FORMATS, decode, encode, spz
from diff2to3.pipeline import photo_files
from diff2to3.types import Gaussians

CASES = Path(__file__).resolve().parents[1] / "assets" / "cases"
#: Small, so that what a file may cost is noticed.
LIMITS = Limits(
    max_file_bytes=mutation.LARGEST,
    max_faces=20_000,
    max_nodes=1000,
    max_texture_pixels=1 << 20,
    max_texture_bytes=1 << 24,
)
MAX_PHOTO_PIXELS = 1 << 22  # for the 10⁸ of open_photo
#: Numbers of binary headers.
SIZES = tuple(
    struct.pack(f"{order}I", value)
    for order in "<>"
    for value in (0, 1, 255, 65536, 2**31 - 1, 2**32 - 1, 40)
)
JSON = (b"null", b"[]", b"{}", b"[0]", b'"', b"-1", b"1e99", b"true", b"NaN", b"\0")
PLY = (b"\nelement face 9\n", b"\nelement a 999999999999\n", b"\nproperty list uchar int vertex_indices\n",
       b"\nproperty double x\n", b"list ", b"\nend_header\n", b"binary_big_endian", b"ascii", b"\r\n",
       b"\nproperty uchar red\n", b" char", b" uint64", b"\xff\xfe", b"\0")  # fmt: skip
WORDS = {
    "obj": (b"\nf ", b"\nf 1 2 3 4 5", b"/", b"//", b"\nvn 0 0 1\n", b"\nvt 0 0\n", b"\nv 0 0 0 1 1 1\n", b" # c",
            b"\\\n", b"\r", b"\nusemtl a\n", b"\nmtllib a b.mtl\n", b"-1", b"\xef\xbb\xbf", b"\xff\xfe", b"\0"),
    "mtl": (b"\nnewmtl a\n", b"\nmap_Kd ", b"\nmap_d ", b"\nmap_Ke ", b" -s 1 1", b" -o ", b" -clamp on ",
            b" -mm 0 1 ", b" -imfchan l ", b"\nTr 1\n", b"\nd 0\n", b"\nKd xyz 1 1 1\n", b"\nKd spectral f\n",
            b"\nKe 9 9 9\n", b"#", b"..", b"/", b"\\", b"t.png", b"\xff\xfe", b"\0"),
    "ply": (*PLY, b"\nelement tristrips 1\n", b"\ncomment TextureFile a.png\n"),
    "glb": (*JSON, b'"extensions":{}', b'"sparse":{}', b"KHR_draco_mesh_compression", b"EXT_meshopt_compression",
            b"5126", b"5121", b'"MAT4"'),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """``check``: reads one input; True where it gives something, False where it is refused. It raises whatever must
    not happen.
    """

    seeds: Callable[[], list[bytes]]
    words: tuple[bytes, ...]
    rewrite: mutation.Rewrite
    check: Callable[[bytes, Path], bool]


def finite(*arrays: np.ndarray | torch.Tensor | None) -> bool:
    return all(x is None or bool(np.isfinite(np.asarray(x)).all()) for x in arrays)


# ---- meshes ----

OBJ_OF_MTL = b"mtllib m.mtl\nusemtl a\n" + (CASES / "mtl_subfolder" / "m.obj").read_bytes().split(b"\n", 2)[2]


def prepare(folder: Path) -> None:
    """What .mtl files are read with, and a bound for photos."""
    (folder / "m.obj").write_bytes(OBJ_OF_MTL)
    for name in ("tex.png", "t.png", "a.png"):
        (folder / name).write_bytes((CASES / "tr1_meshlab" / "t.png").read_bytes())
    photo_files.MAX_PIXELS = MAX_PHOTO_PIXELS


def mesh_kind(ending: str, rewrite: mutation.Rewrite = mutation.plain) -> Kind:
    def seeds() -> list[bytes]:
        return [p.read_bytes() for p in sorted(CASES.rglob("*")) if p.suffix.lower() == f".{ending}"]

    def check(data: bytes, folder: Path) -> bool:
        try:
            if ending == "mtl":
                (folder / "m.mtl").write_bytes(data)
                mesh = load_mesh(folder / "m.obj", limits=LIMITS)
            else:
                mesh = load_mesh(data, name="a", file_type=ending, limits=LIMITS)
        except InputError:
            return False
        assert 0 < mesh.num_faces <= LIMITS.max_faces
        assert finite(mesh.vertices, mesh.uvs, mesh.normals, mesh.colors, mesh.emissive_uvs)
        assert int(mesh.faces.min()) >= 0 and int(mesh.faces.max()) < len(mesh.vertices)
        return True

    return Kind(seeds, WORDS[ending], rewrite, check)


# ---- 3D Gaussians ----


def random_gaussians(coefficients: int, count: int = 12) -> Gaussians:
    rng = np.random.default_rng(coefficients)

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.float32))

    quats = torch.nn.functional.normalize(tensor(rng.normal(size=(count, 4))), dim=-1)
    means, scales = tensor(rng.uniform(-0.5, 0.5, (count, 3))), tensor(rng.uniform(0.001, 0.03, (count, 3)))
    return Gaussians(
        means,
        quats,
        scales,
        tensor(rng.uniform(size=count)),
        tensor(rng.normal(size=(count, coefficients, 3))),
    )


def splat_files(name: str) -> list[bytes]:
    """Degrees 0 to 3. .ksplat, which this package does not write, is gaussforge's."""
    several = [random_gaussians(coefficients) for coefficients in (1, 4, 9, 16)]
    if name == "spz4":
        return [spz.write(g, {"screen_filter": 0.1}, version=4) for g in several]
    if name == "ksplat":
        from gaussforge import GaussForge

        return [GaussForge().convert(encode(g, FORMATS["ply"]), "ply", "ksplat")["data"] for g in several]
    files = [encode(g, FORMATS[name], {"seed": 7, "screen_filter": 0.1}) for g in several]
    if name == "ply":
        files += [_as_text(files[0]), files[0].replace(b"element vertex", b"element a 0\nelement vertex", 1)]
    return files


def _as_text(data: bytes) -> bytes:
    head, body = data.split(b"end_header\n", 1)
    rows = np.frombuffer(body, "<f4").reshape(-1, head.count(b"\nproperty "))
    lines = "\n".join(" ".join(f"{x:.6g}" for x in row) for row in rows)
    return head.replace(b"binary_little_endian", b"ascii") + b"end_header\n" + lines.encode()


def splat_kind(
    name: str, words: tuple[bytes, ...] = SIZES, rewrite: mutation.Rewrite = mutation.plain
) -> Kind:
    entry = FORMATS["spz" if name == "spz4" else name]

    def check(data: bytes, folder: Path) -> bool:
        try:
            g, _ = decode(data, entry, "bad.file")
        except InputError as error:
            assert str(error).startswith("bad.file") and "\n" not in str(error), error
            return False
        assert finite(g.means, g.quats, g.scales, g.opacities, g.sh)
        return True

    return Kind(lambda: splat_files(name), words, rewrite, check)


# ---- photos ----


def photos() -> list[bytes]:
    """A small file of each kind that people have."""
    y, x = np.mgrid[:20, :24]
    rgb = Image.fromarray(np.stack([x * 10, y * 12, x + y], -1).astype(np.uint8))
    grey = rgb.convert("L")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        (rgb, "PNG", {"icc_profile": profile}),
        (rgb, "PNG", {}),
        (rgb.quantize(8), "PNG", {"transparency": 0}),
        (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG", {}),
        (rgb, "JPEG", {"exif": exif, "icc_profile": profile}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "WEBP", {"exif": exif}),
        (rgb, "WEBP", {"lossless": True}),
        (rgb.quantize(8), "GIF", {}),
        (rgb, "BMP", {}),
        (rgb, "TGA", {}),
    ]
    files = []
    for image, kind, options in pictures:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files.append(stream.getvalue())
    return files


def check_photo(data: bytes, folder: Path) -> bool:
    path = folder / "photo"
    path.write_bytes(data)
    try:
        image = photo_files.open_photo(path)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error), error
        return False
    assert image.mode in ("RGB", "RGBA") and max(image.size) <= photo_files.MAX_SIDE
    return True


KINDS = {
    "obj": mesh_kind("obj"),
    "mtl": mesh_kind("mtl"),
    "ply": mesh_kind("ply"),
    "glb": mesh_kind("glb", mutation.glb),
    "splat-ply": splat_kind("ply", (*PLY, *SIZES)),
    "photo": Kind(photos, (*SIZES, b"IHDR", b"PLTE", b"tRNS", b"\xff\xd8", b"\xff\xc0", b"Exif\0\0", b"II*\0",
                           b"MM\0*"), mutation.png, check_photo),
    "splat": splat_kind("splat"),
    "spz": splat_kind("spz", rewrite=mutation.gzipped),
    "spz4": splat_kind("spz4", rewrite=mutation.spz_4),
    "sog": splat_kind("sog", (*JSON, *SIZES, b'"bands":3', b'"files":["a"]'), mutation.zipped),
    "compressed-ply": splat_kind("compressed.ply", (*PLY, *SIZES)),
    "splat-glb": splat_kind("glb", (*JSON, *SIZES, b'"matrix":[]', b"5121"), mutation.glb),
    "ksplat": splat_kind("ksplat"),
}  # fmt: skip
