"""Gaussian .ply files: round trips, the layout as other programs expect it, and files that are not right."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diff2to3.commands.render import fit_unit_box
from diff2to3.errors import InputError
from diff2to3.formats.ply import ply_bytes, ply_columns, read_ply, write_ply
from diff2to3.types import Gaussians


def random_gaussians(count, degree=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=g),
        torch.nn.functional.normalize(torch.randn(count, 4, generator=g), dim=1),
        torch.rand(count, 3, generator=g) * 0.02 + 1e-3,
        torch.rand(count, generator=g) * 0.98 + 0.01,
        torch.randn(count, (degree + 1) ** 2, 3, generator=g),
    )


def plain_reader(data):
    """A reader of its own, by the letter of the .ply format, for little-endian floats only."""
    header, body = data.split(b"end_header\n", 1)
    names = [line.split()[-1] for line in header.decode().splitlines() if line.startswith("property float")]
    count = next(int(x.split()[-1]) for x in header.decode().splitlines() if x.startswith("element vertex"))
    assert len(body) == 4 * count * len(names)
    rows = [struct.unpack_from(f"<{len(names)}f", body, 4 * len(names) * i) for i in range(count)]
    return names, rows


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(0, 100))
def test_round_trip(tmp_path_factory, count, degree, seed):
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    before = random_gaussians(count, degree, seed)
    write_ply(path, before, {"seed": seed, "screen_filter": 0.1})
    after, metadata = read_ply(path)
    assert metadata["seed"] == seed and metadata["frame"] == "right-handed, z up"
    for name in ("means", "quats", "sh"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    torch.testing.assert_close(after.scales, before.scales, rtol=2e-6, atol=0)
    torch.testing.assert_close(after.opacities, before.opacities, rtol=0, atol=1e-6)


def test_layout_is_the_one_of_the_original_code():
    g = random_gaussians(5, 1)
    names, rows = plain_reader(ply_bytes(g))
    assert names == [
        "x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(9)),
        "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
    ]  # fmt: skip
    row = dict(zip(names, rows[3], strict=True))
    assert [row[k] for k in "xyz"] == g.means[3].tolist()
    assert row["nx"] == row["ny"] == row["nz"] == 0
    assert row["f_dc_1"] == float(g.sh[3, 0, 1])
    # f_rest: all coefficients of red, then of green, then of blue
    assert [row[f"f_rest_{i}"] for i in range(9)] == g.sh[3, 1:].T.reshape(-1).tolist()
    p = float(g.opacities[3])
    assert row["opacity"] == pytest.approx(np.log(p / (1 - p)), rel=1e-6)
    assert row["scale_2"] == pytest.approx(np.log(float(g.scales[3, 2])), rel=1e-6)
    assert row["rot_0"] == float(g.quats[3, 0])


def test_extreme_values_stay_finite(tmp_path):
    g = random_gaussians(3)
    g = Gaussians(g.means, g.quats, torch.zeros(3, 3), torch.tensor([0.0, 1.0, 0.5]), g.sh)
    write_ply(tmp_path / "a.ply", g)
    after, _ = read_ply(tmp_path / "a.ply")
    assert after.opacities.tolist() == pytest.approx([0.0, 1.0, 0.5], abs=2e-6)
    assert torch.isfinite(after.scales).all() and after.scales.max() < 1e-10


def ascii_file(g, names=None, order="ascii"):
    all_names, rows = plain_reader(ply_bytes(g))
    names = names or all_names
    header = ["ply", f"format {order} 1.0", "comment made elsewhere", f"element vertex {len(rows)}"]
    header += [f"property float {n}" for n in names] + ["end_header"]
    pick = [all_names.index(n) for n in names]
    rows = [[row[i] for i in pick] for row in rows]
    if order == "ascii":
        return "\n".join(header + [" ".join(map(repr, row)) for row in rows]).encode()
    packed = b"".join(struct.pack(f">{len(names)}f", *row) for row in rows)
    return "\n".join([*header, ""]).encode() + packed


@pytest.mark.parametrize("order", ["ascii", "binary_big_endian"])
def test_files_of_other_programs(tmp_path, order):
    g = random_gaussians(6, 2)
    names, _ = plain_reader(ply_bytes(g))
    shuffled = [n for n in reversed(names) if not n.startswith("n")]  # any order, no normals
    (tmp_path / "a.ply").write_bytes(ascii_file(g, shuffled, order))
    after, metadata = read_ply(tmp_path / "a.ply")
    assert metadata == {}
    torch.testing.assert_close(after.sh, g.sh)
    torch.testing.assert_close(after.means, g.means)


def test_mixed_property_types(tmp_path):
    header = ["ply", "format binary_little_endian 1.0", "element vertex 2"]
    fields = [("x", "double"), ("y", "float"), ("z", "float"), ("flag", "uchar"), ("opacity", "float")]
    fields += [(n, "float") for n in ("f_dc_0", "f_dc_1", "f_dc_2", "scale_0", "scale_1", "scale_2")]
    fields += [(f"rot_{i}", "float") for i in range(4)]
    kinds = {"double": "<f8", "float": "<f4", "uchar": "u1"}
    table = np.zeros(2, [(name, kinds[kind]) for name, kind in fields])
    table["x"], table["opacity"] = [1.5, -2.5], [0.0, 1.0]
    header += [f"property {kind} {name}" for name, kind in fields] + ["end_header", ""]
    (tmp_path / "a.ply").write_bytes("\n".join(header).encode() + table.tobytes())
    g, _ = read_ply(tmp_path / "a.ply")
    assert g.means[:, 0].tolist() == [1.5, -2.5]
    assert g.opacities.tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-1.0))])


def damaged():
    good = ply_bytes(random_gaussians(4))
    header, body = good.split(b"end_header\n", 1)
    rows = np.frombuffer(body, "<f4").reshape(4, -1).copy()
    rows[:, 0] = np.nan
    mesh = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
    return {
        "truncated: 4 vertices expected, 3 found": good[:-1],
        "the header has no end": header,
        "not a .ply file": b"GLB" + good,
        "NaN or infinite positions in every one of its 4": header + b"end_header\n" + rows.tobytes(),
        "no property opacity": mesh + b"end_header\n0 0 0\n",
        "no vertices; it holds the elements face": b"ply\nformat ascii 1.0\nelement face 1\nend_header\n",
        "truncated: 1 vertices expected, 0 found": b"ply\nformat ascii 1.0\n"
        b"element chunk 1\nproperty float min_x\nelement vertex 1\nproperty uint packed_position\nend_header\n",
        "the vertices hold lists": mesh + b"property list uchar int k\nend_header\n",
        "unknown .ply format": good.replace(b"binary_little_endian", b"morse"),
        "unsupported .ply layout": good.replace(b"property float nx", b"property float16 nx"),
        "a property occurs twice": good.replace(b"property float nx", b"property float x"),
        "1 properties f_rest_": good.replace(b"property float nx", b"property float f_rest_0"),
        "not a row of numbers": ascii_file(random_gaussians(1)).rsplit(b" ", 1)[0] + b" x",
        "truncated: 1000000000 vertices expected": good.replace(
            b"element vertex 4", b"element vertex 1000000000"
        ),
    }


@pytest.mark.parametrize("message", damaged())
def test_damaged_files_are_one_clear_error(tmp_path, message):
    path = tmp_path / "a.ply"
    path.write_bytes(damaged()[message])
    with pytest.raises(InputError, match=r"a\.ply: ") as caught:
        read_ply(path)
    assert message in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 700), st.integers(0, 80))
def test_any_bytes_give_gaussians_or_an_input_error(tmp_path_factory, noise, at, removed):
    data = ply_bytes(random_gaussians(4))
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    path.write_bytes(data[:at] + noise + data[at + removed :])
    try:
        g, _ = read_ply(path)
    except InputError:
        return
    assert all(torch.isfinite(x).all() for x in (g.means, g.quats, g.scales, g.opacities, g.sh))


def with_element_before(g, order, lists):
    """A file of another program: cameras, or faces with lists of two lengths, come before the vertices."""
    header, body = ply_bytes(g).split(b"element vertex", 1)
    header = header.replace(b"binary_little_endian", order.encode())
    kind = b"list uchar int indices" if lists else b"float focal"
    header += b"element other 2\nproperty " + kind + b"\nproperty uchar flag\nelement vertex"
    vertices, table = body.split(b"end_header\n", 1)
    if order == "ascii":
        rows = np.frombuffer(table, "<f4").reshape(len(g), -1).tolist()
        table = "\n".join(" ".join(map(repr, row)) for row in rows).encode()
        other = b"3 0 1 2 9\n1 7 9\n" if lists else b"1.5 9\n2.5 9\n"
    else:
        end = "<" if "little" in order else ">"
        table = np.frombuffer(table, "<f4").astype(f"{end}f4").tobytes()
        if lists:
            other = struct.pack(f"{end}B3iBBiB", 3, 0, 1, 2, 9, 1, 7, 9)
        else:
            other = struct.pack(f"{end}fBfB", 1.5, 9, 2.5, 9)
    return header + vertices + b"end_header\n" + other + table


@pytest.mark.parametrize("order", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("lists", [False, True])
def test_elements_before_the_vertices_are_skipped(tmp_path, order, lists):
    g = random_gaussians(5, 1)
    (tmp_path / "a.ply").write_bytes(with_element_before(g, order, lists))
    after, _ = read_ply(tmp_path / "a.ply")
    assert torch.equal(after.means, g.means) and torch.equal(after.sh, g.sh)


def with_values(path, g, **changes):
    """Write ``g`` with single values, {property: (row, value)}, replaced as they stand in the file."""
    data = ply_bytes(g)
    names, _ = plain_reader(data)
    header, body = data.split(b"end_header\n", 1)
    table = np.frombuffer(body, "<f4").reshape(len(g), -1).copy()
    for name, (row, value) in changes.items():
        table[row, names.index(name)] = value
    path.write_bytes(header + b"end_header\n" + table.tobytes())


def test_infinite_logits_and_logarithms_are_values(tmp_path):
    """Other programs write what is opaque as the logit of 1, and what is flat as the logarithm of 0."""
    g = random_gaussians(4)
    with_values(tmp_path / "a.ply", g, opacity=(1, np.inf), scale_2=(2, -np.inf))
    after, metadata = read_ply(tmp_path / "a.ply")
    assert len(after) == 4 and "notes" not in metadata
    assert float(after.opacities[1]) == 1 and float(after.scales[2, 2]) == 0
    with_values(tmp_path / "b.ply", g, opacity=(3, -np.inf))
    assert float(read_ply(tmp_path / "b.ply")[0].opacities[3]) == 0


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("x", np.nan, "positions"), ("y", np.inf, "positions"), ("rot_2", np.inf, "rotations"),
        ("scale_0", np.inf, "scales"), ("scale_0", 200.0, "scales"), ("opacity", np.nan, "opacities"),
        ("f_dc_1", np.inf, "colours"), ("f_rest_4", np.nan, "colours"),
    ],
)  # fmt: skip
def test_a_bad_row_is_left_out_with_a_note(tmp_path, name, value, what):
    g = random_gaussians(6, 1)
    with_values(tmp_path / "a.ply", g, **{name: (2, value)})
    after, metadata = read_ply(tmp_path / "a.ply")
    assert metadata["notes"] == [f"a.ply: 1 of 6 Gaussians left out: NaN or infinite {what}"]
    assert torch.equal(after.quats, g.quats[[0, 1, 3, 4, 5]])


def test_positions_of_georeferenced_files_stay_apart(tmp_path):
    """Metres on a map in double precision: float32 would round them to 0.5."""
    g = random_gaussians(50)
    columns = {name: values for name, values in ply_columns(g).items() if not name.startswith("n")}
    columns["x"] = columns["x"] + 4_400_000.0
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(g)}"]
    header += [f"property double {name}" for name in columns] + ["end_header", ""]
    table = np.stack(list(columns.values()), 1)
    (tmp_path / "a.ply").write_bytes("\n".join(header).encode() + table.tobytes())
    precise = read_ply(tmp_path / "a.ply", means_dtype=torch.float64)[0]
    fitted, expected = fit_unit_box(precise), fit_unit_box(g)
    assert fitted.means.dtype == torch.float32
    torch.testing.assert_close(fitted.means, expected.means, rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted.scales, expected.scales)


def test_missing_file_and_bad_gaussians(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_ply(tmp_path / "none.ply")
    g = random_gaussians(2)
    bad = Gaussians(g.means * torch.nan, g.quats, g.scales, g.opacities, g.sh)
    with pytest.raises(ValueError, match="gaussians: NaN or infinite values in x, y, z"):
        write_ply(tmp_path / "a.ply", bad)
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_one_ascii_comment_line():
    data = ply_bytes(random_gaussians(1), {"prompt": "ein Schäfchen\nzwei"})
    header = data.split(b"end_header")[0].decode("ascii")
    line = next(x for x in header.splitlines() if x.startswith("comment"))
    assert json.loads(line.split("diff2to3", 1)[1])["prompt"] == "ein Schäfchen\nzwei"
