"""As much of ComfyUI's V3 interface as our nodes use, with its names, arguments and checks as documented.

Facts from docs.comfy.org (custom nodes, V3) and from the public classes io.Schema, io.*.Input and Types.SPLAT.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Socket:
    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None


@dataclass
class Widget(Socket):
    default: Any = None


@dataclass
class Number(Widget):
    min: float | None = None
    max: float | None = None
    step: float | None = None
    control_after_generate: bool | None = None


@dataclass
class Choice(Widget):
    options: list[str] = field(default_factory=list)


@dataclass
class Out:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False


def comfy_type(name: str, inputs: type = Socket) -> Any:
    """A type with Input and Output of its own, so that a test can tell an IMAGE from a MASK."""
    made = {
        "io_type": name,
        "Input": type("Input", (inputs,), {"io_type": name}),
        "Output": type("Output", (Out,), {"io_type": name}),
    }
    return type(name, (), made)


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False

    def __post_init__(self) -> None:
        ids = [item.id for item in self.inputs]
        assert len(set(ids)) == len(ids), "inputs with the same id"
        for item in self.inputs:
            if isinstance(item, Choice):
                assert item.default in item.options
            if isinstance(item, Number):
                assert item.min <= item.default <= item.max


class ComfyNode:
    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args = args
        self.result = args


class ComfyExtension:
    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


class SPLAT:
    def __init__(
        self,
        positions: torch.Tensor,
        scales: torch.Tensor,
        rotations: torch.Tensor,
        opacities: torch.Tensor,
        sh: torch.Tensor,
        counts: torch.Tensor | None = None,
    ) -> None:
        batch, count = positions.shape[:2]
        assert positions.shape == scales.shape == (batch, count, 3) and rotations.shape == (batch, count, 4)
        assert opacities.shape == (batch, count, 1) and sh.shape[:2] == (batch, count) and sh.ndim == 4
        assert counts is None or counts.shape == (batch,)
        self.positions, self.scales, self.rotations = positions, scales, rotations
        self.opacities, self.sh, self.counts = opacities, sh, counts


class File3D:
    def __init__(self, source: Any, file_format: str = "") -> None:
        self.source, self.format = source, file_format

    def get_bytes(self) -> bytes:
        self.source.seek(0)
        return bytes(self.source.read())


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class Comfy:
    """The running program: the bar's positions, and whether Cancel was pressed."""

    def __init__(self) -> None:
        self.bars: list[tuple[int, list[int]]] = []
        self.cancelled = False

    def bar(self, total: int) -> Any:
        positions: list[int] = []
        self.bars.append((total, positions))
        return types.SimpleNamespace(update_absolute=positions.append)

    def check(self) -> None:
        if self.cancelled:
            raise Interrupted


@contextmanager
def installed() -> Iterator[Comfy]:
    """The modules in sys.modules."""
    comfy = Comfy()
    io = types.SimpleNamespace(
        Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput, Custom=comfy_type,
        Image=comfy_type("IMAGE"), Mask=comfy_type("MASK"), Splat=comfy_type("SPLAT"),
        File3DPLY=comfy_type("FILE_3D_PLY"), String=comfy_type("STRING", Widget),
        Boolean=comfy_type("BOOLEAN", Widget), Int=comfy_type("INT", Number), Float=comfy_type("FLOAT", Number),
        Combo=comfy_type("COMBO", Choice),
    )  # fmt: skip
    made: dict[str, dict[str, Any]] = {
        "comfy_api": {},
        "comfy_api.latest": {
            "io": io,
            "ComfyExtension": ComfyExtension,
            "Types": types.SimpleNamespace(SPLAT=SPLAT, File3D=File3D),
        },
        "comfy": {},
        "comfy.utils": {"ProgressBar": comfy.bar},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "throw_exception_if_processing_interrupted": comfy.check,
        },
    }
    before = {name: sys.modules.get(name) for name in made}
    for name, content in made.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield comfy
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
