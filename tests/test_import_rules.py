"""The package keeps to its own rules: who imports whom, and what no module does. Read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: What each folder or module may import of the package, besides itself. Every one is listed; a module that is not is an
#: error.
BASE = {"types", "errors", "files", "streams", "tensors", "worker", "hub", "blender", "nn", "kernels"}
STAGES = {"assets", "views", "voxels", "photo", "vae", "flow", "gaussians", "metrics"}
SHARED = BASE | STAGES | {"formats", "mesh", "checkpoint", "config", "machine", "networks"}
LAYERS: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "kernels": {"errors"},
    "streams": set(),
    "files": {"errors"},
    "worker": {"errors"},
    "hub": {"errors", "files"},
    "tensors": {"errors", "files"},
    "blender": {"types", "errors", "files"},
    "machine": {"errors", "kernels"},
    "nn": {"kernels", "types", "errors", "files"},
    "checkpoint": {"errors", "files", "tensors"},
    "config": {"errors", "files"},
    **{stage: BASE for stage in STAGES},
    "networks": BASE | STAGES | {"checkpoint", "config"},
    "data": SHARED,
    "training": SHARED | {"data"},
    "pipeline": SHARED | {"web"},  # the viewer that an asset is written with
    "web": SHARED | {"pipeline"},
    "evaluation": SHARED | {"data", "pipeline"},
    "doctor": {"kernels", "nn", "errors", "machine"},
    "commands": SHARED | {"data", "pipeline", "web", "doctor"},
    "cli": {"commands", "errors", "streams"},
    "__init__": SHARED | {"pipeline"},  # what ``import diff2to3`` offers, imported when it is asked for
    "formats": {"gaussians", "types", "errors", "files"},
    "mesh": {"formats", "gaussians", "kernels", "types", "errors", "files"},
}
#: The one package from outside that a module of kernels/ is there to call, inside functions.
ADAPTERS = {"diff2to3.kernels.rasterize_gsplat": {"gsplat"}}

#: Import names of the required dependencies in pyproject.toml.
REQUIRED = {"torch", "numpy", "omegaconf", "PIL", "safetensors", "tqdm", "yaml"}
#: The only modules that may use diffusers and transformers (inside functions).
PROVIDERS = (
    "diff2to3.voxels.providers",
    "diff2to3.voxels.hub",
    "diff2to3.flow.conditioners",
    "diff2to3.metrics.features",
)

#: Calls that no module makes: they ignore the caller's device, unpickle, run strings or touch the global RNG.
FORBIDDEN_CALLS = {
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "eval",
    "exec",
    "torch.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
    "torch.set_default_dtype",
    "torch.set_default_device",
}


def sources() -> dict[str, str]:
    """Module name (with ``__init__`` for packages) -> source, as installed: kernels/ is diff2to3.kernels."""
    found = {}
    for folder, prefix in ((ROOT / "diff2to3", "diff2to3"), (ROOT / "kernels", "diff2to3.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts))] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of everything imported anywhere in ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base] if base else package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import, without those that only type checkers read."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def layer(module: str) -> str:
    """``nn`` for diff2to3.nn.attention."""
    return module.split(".")[1]


def layer_violations(module: str, source: str) -> list[str]:
    own = layer(module)
    if own not in LAYERS:
        return [f"{module}: {own} is not in LAYERS"]
    names = (name for name in imports(module, ast.parse(source)) if name.startswith("diff2to3."))
    used = {layer(name) for name in names} - {"__version__", own}
    return [f"{module} imports {name}" for name in sorted(used - LAYERS[own])]


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module → modules of the package that it imports anywhere, in functions and for type checkers too."""
    plain = {name.removesuffix(".__init__"): name for name in sources}
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        found = set()
        for name in imports(module, ast.parse(source)):
            while name and name not in plain:
                name = name.rpartition(".")[0]
            if name and plain[name] != module:
                found.add(plain[name])
        graph[module] = found
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first again at the end; nothing where there are none."""
    done: set[str] = set()
    path: list[str] = []

    def search(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph[module]):
            if found := search(other):
                return found
        path.pop()
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module))), [])


def outside_violations(module: str, source: str) -> list[str]:
    """Packages from outside that a module may not import, at module level or at all."""
    tree = ast.parse(source)
    ours_and_standard = {"diff2to3", *sys.stdlib_module_names}
    always = {name.split(".")[0] for name in imports(module, module_level(tree))} - ours_and_standard
    everywhere = {name.split(".")[0] for name in imports(module, tree)} - ours_and_standard
    bad = [f"{module} imports {name} at module level" for name in sorted(always - REQUIRED)]
    if layer(module) == "kernels":
        bad += [
            f"{module} imports {name}"
            for name in sorted(everywhere - {"torch", "numpy"} - ADAPTERS.get(module, set()))
        ]
    if not module.startswith(PROVIDERS):
        bad += [f"{module} imports {name}" for name in sorted(everywhere & {"diffusers", "transformers"})]
    return bad


def call_violations(module: str, source: str) -> list[str]:
    bad = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"):
            bad.append(f"{module}:{node.lineno} calls {name}")
    return bad


def uses_distributed(module: str, source: str) -> bool:
    tree = ast.parse(source)
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return "torch.distributed" in attributes or any(
        name.startswith("torch.distributed") for name in imports(module, tree)
    )


def reads_environment(module: str, source: str) -> bool:
    tree = ast.parse(source)
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= set(imports(module, tree))
    return bool(names & {"os.environ", "os.getenv", "os.putenv", "os.environb"})


MODULES = sources()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_keeps_to_the_rules(module: str) -> None:
    source = MODULES[module]
    found = layer_violations(module, source) + outside_violations(module, source)
    assert found + call_violations(module, source) == []


def missing_names(sources: dict[str, str]) -> list[str]:
    """Names that a module takes from another of the package, which has none such."""
    plain = {name.removesuffix(".__init__"): name for name in sources}
    defined: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = {"__version__", "__file__", "__doc__", "__name__"}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        defined[name] = found
    bad = []
    for module, source in sources.items():
        for name in imports(module, ast.parse(source)):
            owner, _, own = name.rpartition(".")
            if name.startswith("diff2to3.") and name not in plain:
                if owner not in plain or (
                    own not in defined[plain[owner]] and "__getattr__" not in defined[plain[owner]]
                ):
                    bad.append(f"{module} imports {name}")
    return bad


#: What is done in one place → the modules that may.
ONE_PLACE = {
    "hf_hub_download": {"diff2to3.hub"},
    "sched_getaffinity": {"diff2to3.kernels.build"},
    "cpu_count": {"diff2to3.kernels.build", "diff2to3.doctor"},  # which says how many the machine has, too
    "load_file": {"diff2to3.tensors"},
    "backends.mps.is_available": {"diff2to3.machine", "diff2to3.doctor"},
}


def test_what_has_one_place_is_done_there_alone() -> None:
    for words, places in ONE_PLACE.items():
        found = {
            name
            for name, source in MODULES.items()
            if words in ast.unparse(ast.parse(source)).replace(f"'{words}'", "")
        }
        assert found <= places, (words, found - places)


def test_what_is_imported_exists() -> None:
    """Of imports in functions too, which fail only when they are reached."""
    assert missing_names(MODULES) == []
    planted = {
        "diff2to3.a": "X = 1",
        "diff2to3.b": "def f():\n    from diff2to3.a import Y\n    from diff2to3.a import X",
    }
    assert missing_names(planted) == ["diff2to3.b imports diff2to3.a.Y"]


def test_no_module_imports_itself_through_others() -> None:
    assert circle(import_graph(MODULES)) == []


def test_layers_go_one_way_but_for_the_viewer() -> None:
    graph = {own: others & LAYERS.keys() for own, others in LAYERS.items()}
    assert circle(graph) == ["pipeline", "web", "pipeline"]
    graph["pipeline"] = graph["pipeline"] - {"web"}
    assert circle({own: others - (STAGES if own in STAGES else set()) for own, others in graph.items()}) == []


def test_a_circle_is_found() -> None:
    """In a function, by a relative name, through a package."""
    planted = {
        "diff2to3.a": "from diff2to3 import b",
        "diff2to3.b": "def f():\n    from diff2to3.c.d import g",
        "diff2to3.c.__init__": "",
        "diff2to3.c.d": "from . import e",
        "diff2to3.c.e": "if TYPE_CHECKING:\n    from ..a import A",
    }
    names = ["diff2to3.a", "diff2to3.b", "diff2to3.c.d", "diff2to3.c.e", "diff2to3.a"]
    assert circle(import_graph(planted)) == names
    planted["diff2to3.c.e"] = "import torch"
    assert circle(import_graph(planted)) == []


def test_distributed_and_environment_have_one_place() -> None:
    distributed = [name for name, source in MODULES.items() if uses_distributed(name, source)]
    assert len(distributed) <= 1, distributed
    readers = {name for name, source in MODULES.items() if reads_environment(name, source)}
    assert readers <= {"diff2to3.cli", *distributed}


def test_required_dependencies_are_those_of_the_project_file() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [")[1].split("]")[0]
    names = {line.strip().strip('",').split(">")[0] for line in block.splitlines() if line.strip()}
    assert names == {{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name) for name in REQUIRED}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diff2to3.types", "from diff2to3.errors import InputError"),
        ("diff2to3.nn.attention", "from diff2to3.voxels import voxelise"),
        ("diff2to3.vae.encoder", "import diff2to3.flow.smdit"),
        ("diff2to3.vae.encoder", "def f():\n    from ..flow import smdit"),
        ("diff2to3.kernels.rasterize", "from diff2to3.types import Gaussians"),
        ("diff2to3.training.tasks.flow", "def f():\n    from diff2to3.pipeline import ImageTo3D"),
        ("diff2to3.training.run", "from diff2to3.evaluation import scores"),
        ("diff2to3.pipeline.load", "from diff2to3.commands import generate"),
        ("diff2to3.unknown", ""),
    ],
)
def test_wrong_layers_are_found(module: str, source: str) -> None:
    assert layer_violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("diff2to3.assets.load", "import trimesh"),
        ("diff2to3.assets.load", "try:\n    import trimesh\nexcept ImportError:\n    trimesh = None"),
        ("diff2to3.kernels.patchify", "def f():\n    import einops"),
        ("diff2to3.vae.encoder", "def f():\n    from diffusers import AutoencoderKL"),
    ],
)
def test_wrong_packages_are_found(module: str, source: str) -> None:
    assert outside_violations(module, source)


def test_allowed_imports_pass() -> None:
    assert (
        layer_violations("diff2to3.vae.encoder", "from diff2to3.nn import norm\nfrom .blocks import Block")
        == []
    )
    assert layer_violations("diff2to3.kernels.patchify", "from . import library") == []
    assert layer_violations("diff2to3.kernels.__init__", "from .patchify import patchify") == []
    lazy = "if TYPE_CHECKING:\n    import trimesh\ndef f():\n    import trimesh"
    assert outside_violations("diff2to3.assets.load", lazy) == []
    assert outside_violations("diff2to3.voxels.providers", "def f():\n    import diffusers") == []


@pytest.mark.parametrize(
    "code", ["x = y.cuda()", "torch.load(p)", "torch.manual_seed(0)", "np.random.seed(1)"]
)
def test_forbidden_calls_are_found(code: str) -> None:
    assert call_violations("diff2to3.vae.encoder", code)
    assert call_violations("diff2to3.vae.encoder", "torch.cuda.is_available()") == []


def test_environment_and_distributed_are_found() -> None:
    assert reads_environment("m", "import os\nos.environ['A']")
    assert reads_environment("m", "from os import environ")
    assert uses_distributed("m", "import torch\ntorch.distributed.barrier()")
    assert uses_distributed("m", "import torch.distributed as dist")
    assert not uses_distributed("m", "import torch\ntorch.device('cpu')")
