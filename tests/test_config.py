"""The configuration loader: precedence, round trips, and what is said about each kind of mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diff2to3.config import MISSING, config_from_dict, config_to_dict, load_config, save_config
from diff2to3.errors import InputError
from diff2to3.files import write_atomic


@dataclass
class Camera:
    count: int = 4
    fov: float = 40.0
    near: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: expected a positive number, got {self.count}")


@dataclass
class Run:
    source: str = MISSING
    camera: Camera = field(default_factory=Camera)
    sets: dict[str, Camera] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [32, 64])


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "source: a\ncamera:\n  fov: 30\nsets:\n  one: {count: 2}\n")
    run = load_config(Run, path, ["camera.fov=1e1", "sets.two.near=0.5", "sizes=[8]", "source=x=y"])
    assert run == Run("x=y", Camera(4, 10.0), {"one": Camera(2), "two": Camera(near=0.5)}, [8])
    assert load_config(Run, None, ["source=b"]) == Run("b")
    assert load_config(Run, write(tmp_path, ""), ["source=b"]) == Run("b")


@pytest.mark.parametrize(
    "text, overrides, said",
    [
        (
            "source: a\ncamera: {cuont: 3}",
            [],
            r"run\.yaml: unknown key 'camera\.cuont'; did you mean 'count'\?",
        ),
        ("source: a\nzzz: 3", [], r"unknown key 'zzz'; known are source, camera, sets, sizes"),
        ("source: a", ["sets.one.fv=3"], r"unknown key 'sets\.one\.fv'; did you mean 'fov'"),
        ("source: a", ["camera.count=many"], r"camera\.count.*'many'.*Integer"),
        ("source: a", ["camera.count=0"], r"count: expected a positive number, got 0"),
        ("source: a", ["camera=3"], r"'camera=3'"),
        ("camera: {count: 3}", [], r"no value for source; .*source=VALUE"),
        ("source: a", ["nonsense"], r"'nonsense': expected key=value"),
        ("source: a", ["=3"], r"expected key=value"),
        ("source: [", [], r"run\.yaml: not valid YAML: line"),
        ("- a\n- b", [], r"expected keys with values"),
        ("source: a\nsource: b", [], r"run\.yaml: not valid YAML: .*duplicate"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_config(Run, write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        load_config(Run, tmp_path / "none.yaml")


@given(
    source=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])).filter(
        lambda s: "${" not in s
    ),
    count=st.integers(1, 10**9),
    fov=st.floats(allow_nan=False, allow_infinity=False),
    near=st.none() | st.floats(0, 1e30),
)
def test_saved_configurations_load_to_the_same_values(
    tmp_path_factory: pytest.TempPathFactory, source: str, count: int, fov: float, near: float | None
) -> None:
    run = Run(source, Camera(count, fov, near), {"a": Camera()}, [])
    path = tmp_path_factory.mktemp("config") / "saved.yaml"
    save_config(run, path)
    assert load_config(Run, path) == run
    assert config_from_dict(Run, config_to_dict(run)) == run


def test_a_tuple_is_saved_as_the_list_that_is_read_back(tmp_path: Path) -> None:
    @dataclass
    class Interval:
        ends: tuple[float, float] = (0.0, 1.0)

    path = tmp_path / "interval.yaml"
    save_config(Interval((0.25, 0.5)), path)
    loaded = load_config(Interval, path)
    assert config_to_dict(loaded) == config_to_dict(Interval((0.25, 0.5))) == {"ends": [0.25, 0.5]}


def test_atomic_writing_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(OSError):
        write_atomic(tmp_path / "no-folder" / "file", b"")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]
