"""Damaged and hostile OBJ, MTL, PLY and GLB files: each must give a mesh or an InputError, soon and in little memory.

    python tests/fuzz/readers.py obj --executions 1000000
    python tests/fuzz/readers.py glb --first 4711 --executions 1 --show     the input number 4711 again
    python tests/fuzz/readers.py ply --atheris -runs=1000000                inputs chosen by the code they reach

Inputs are the files in tests/assets/cases, changed in a few places. Input number i follows from the target and i
alone. ``--atheris`` needs pip install atheris; what follows it goes to libFuzzer.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

if "--atheris" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["diff2to3.assets"]):
        import diff2to3.assets.gltf_scene
        import diff2to3.assets.obj
        import diff2to3.assets.ply_mesh  # noqa: F401

from diff2to3.assets import Limits, load_mesh
from diff2to3.errors import InputError

CASES = Path(__file__).resolve().parents[1] / "assets" / "cases"
#: Small, so that what a file may cost is noticed.
LIMITS = Limits(
    max_file_bytes=1 << 20,
    max_faces=20_000,
    max_nodes=1000,
    max_texture_pixels=1 << 20,
    max_texture_bytes=1 << 24,
)
SECONDS = 20  # of this process's own time: others may hold it up
MIB = 1200  # of the process, with numpy, Pillow and the decoders

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
NUMBERS = (
    b"0", b"-1", b"1", b"2", b"255", b"256", b"65535", b"65536", b"1e9", b"2147483648", b"-2147483649",
    b"4294967296", b"99999999999999999999", b"1e39", b"-1e400", b"nan", b"inf", b"0.5", b"1,5", b"1.#QNAN", b"",
)  # fmt: skip
WORDS = {
    "obj": (b"\nf ", b"\nf 1 2 3 4 5", b"/", b"//", b"\nvn 0 0 1\n", b"\nvt 0 0\n", b"\nv 0 0 0 1 1 1\n", b" # c",
            b"\\\n", b"\r", b"\nusemtl a\n", b"\nmtllib a b.mtl\n", b"-1", b"\xef\xbb\xbf", b"\xff\xfe", b"\0"),
    "mtl": (b"\nnewmtl a\n", b"\nmap_Kd ", b" -s 1 1", b" -o ", b" -clamp on ", b" -mm 0 1 ", b"\nTr 1\n", b"\nd 0\n",
            b"\nKd xyz 1 1 1\n", b"\nKd spectral f\n", b"\nKe 9 9 9\n", b"#", b"..", b"/", b"\\", b"\xff\xfe", b"\0"),
    "ply": (b"\nelement face 9\n", b"\nproperty list uchar int vertex_indices\n", b"\nproperty double x\n",
            b"\nelement tristrips 1\n", b"list ", b"\nend_header\n", b"binary_big_endian", b"ascii", b"\r\n",
            b"\ncomment TextureFile a.png\n", b"\nproperty uchar red\n", b" char", b" uint64", b"\xff\xfe", b"\0"),
    "glb": (b"null", b"[]", b"{}", b"[0]", b'"', b"-1", b"1e99", b"true", b'"extensions":{}', b'"sparse":{}',
            b"KHR_draco_mesh_compression", b"EXT_meshopt_compression", b"5126", b"5121", b'"MAT4"', b"\0"),
}  # fmt: skip
OBJ_OF_MTL = b"mtllib m.mtl\nusemtl a\n" + (CASES / "mtl_subfolder" / "m.obj").read_bytes().split(b"\n", 2)[2]


def seeds(target: str) -> list[bytes]:
    """The files that inputs begin as."""
    return [p.read_bytes() for p in sorted(CASES.rglob("*")) if p.suffix.lower() == f".{target}"]


def mutated(target: str, number: int, pool: list[bytes]) -> bytes:
    """Input number ``number``."""
    rng = Random(f"{target} {number}")
    data = rng.choice(pool)
    if target == "glb" and rng.random() < 0.7:
        return _with_json(data, lambda text: _changed(text, rng, target, pool))
    return _changed(data, rng, target, pool)


def _changed(data: bytes, rng: Random, target: str, pool: list[bytes]) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 4, 16, 64)))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:at] + bytes(rng.choices(range(256), k=end - at)) + data[end:]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] * rng.choice((2, 3, 50)) + data[end:]
        elif kind in (3, 4):
            data = data[:at] + rng.choice(WORDS[target]) + data[at:]
        elif kind == 5:
            found = list(NUMBER.finditer(data))
            if found:
                place = rng.choice(found)
                data = data[: place.start()] + rng.choice(NUMBERS) + data[place.end() :]
        elif kind == 6:
            other = rng.choice(pool)
            data = data[:at] + other[rng.randrange(len(other)) :]
        else:
            data = data[:at] if rng.random() < 0.3 else data + rng.choice(pool)
    return data[: LIMITS.max_file_bytes]


def _with_json(glb: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A GLB whose JSON is changed and whose lengths are right again."""
    length = struct.unpack_from("<I", glb, 12)[0]
    text = change(glb[20 : 20 + length].rstrip())
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + glb[20 + length :]
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def check(target: str, data: bytes, folder: Path) -> str:
    """Read one input: "mesh" or "refused". Raises whatever must not happen."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        if target == "mtl":
            (folder / "m.mtl").write_bytes(data)
            mesh = load_mesh(folder / "m.obj", limits=LIMITS)
        else:
            mesh = load_mesh(data, name="a", file_type=target, limits=LIMITS)
    except InputError:
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert 0 < mesh.num_faces <= LIMITS.max_faces
    assert np.isfinite(mesh.vertices).all() and int(mesh.faces.max()) < len(mesh.vertices)
    for values in (mesh.uvs, mesh.normals, mesh.colors, mesh.emissive_uvs):
        assert values is None or bool(np.isfinite(values).all())
    return "mesh"


def prepare(folder: Path) -> None:
    """What MTL files are read with, and the limits of this process."""
    (folder / "m.obj").write_bytes(OBJ_OF_MTL)
    for name in ("tex.png", "t.png", "a.png"):
        (folder / name).write_bytes((CASES / "tr1_meshlab" / "t.png").read_bytes())
    signal.signal(signal.SIGPROF, _too_long)
    warnings.simplefilter("ignore")


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s of CPU time")


def peak_mib() -> float:
    """Of this process. Linux hands the getrusage figure of the process that started this one on to it."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1024)


def run(target: str, first: int, count: int, folder: Path, show: bool) -> int:
    """Inputs ``first`` to ``first + count``; 1 and the input's number where one fails."""
    pool, outcomes, started = seeds(target), Counter[str](), time.monotonic()
    for number in range(first, first + count):
        data = mutated(target, number, pool)
        if show:
            sys.stdout.buffer.write(data)
        try:
            outcomes[check(target, data, folder)] += 1
        except BaseException:
            print(f"{target}: input {number} fails", file=sys.stderr, flush=True)
            raise
        if peak_mib() > MIB:
            print(f"{target}: input {number} brings the process to {peak_mib():.0f} MiB", file=sys.stderr)
            return 1
    seconds = time.monotonic() - started
    found = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    print(f"{target}: {count} executions, {found}; {seconds:.0f} s, at most {peak_mib():.0f} MiB")
    return 0


def run_atheris(target: str, arguments: list[str], folder: Path) -> None:
    """Does not come back: libFuzzer ends the process."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate(seeds(target)):
        (corpus / str(i)).write_bytes(data)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MIB}", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *arguments, str(corpus)], lambda data: check(target, data, folder))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=sorted(WORDS))
    parser.add_argument("--executions", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="write the inputs to stdout")
    parser.add_argument("--atheris", nargs=argparse.REMAINDER, help="arguments of libFuzzer")
    args = parser.parse_args()
    memory = Path("/dev/shm")  # opening files is most of the time elsewhere
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        prepare(Path(name))
        if args.atheris is not None:
            run_atheris(args.targets[0], args.atheris, Path(name))
        return max(run(t, args.first, args.executions, Path(name), args.show) for t in args.targets)


if __name__ == "__main__":
    raise SystemExit(main())
