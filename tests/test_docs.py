"""The documentation is true: its commands parse, its links lead somewhere, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_readme import help_of, illustrations

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = sorted({command for page in PAGES for command in illustrations(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_are_shown(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "diff2to3":
        depth = 3 if words[1] in ("data", "models") else 2
        shown = help_of(sys.executable, "-m", "diff2to3.cli", *words[1:depth])
    else:
        script = next(word for word in words if word.endswith(".py"))
        shown = help_of(sys.executable, str(ROOT / script))
    for word in words:
        if word.startswith("--") and word != "--nproc-per-node":
            assert word in shown, word
        if word.startswith(("configs/", "eval/", "train/", "examples/")):
            assert (ROOT / word).is_file(), word


def test_links_and_names_of_files_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        for path in re.findall(r"`((?:diff2to3|kernels|train|eval|configs|tests|docs)/[\w./-]*\w)`", text):
            assert (ROOT / path).exists() or "*" in path, f"{page.name}: {path}"


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip('needs the docs extra: pip install "diff2to3[docs]"')
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    models = (tmp_path / "api" / "models" / "index.html").read_text(encoding="utf-8")
    assert "save_pretrained" in models and "from_pretrained" in models


def test_files_for_hosts_can_be_read() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert any(".ci/run" in str(step.get("run")) for step in workflow["jobs"]["check"]["steps"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in text
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())["body"]
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]:
        assert hook["entry"].split()[0] == "ruff"


def test_versions_agree() -> None:
    import diff2to3

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{diff2to3.__version__}"' in text
    assert f"## {diff2to3.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def example(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_examples_run(tmp_path: Path) -> None:
    printed = example("generate.py", "eval/examples/suv.png", str(tmp_path / "out"))
    assert "asset.glb asset.ply asset.spz from_the_photo.png" in printed and "above the horizon" in printed
    printed = example("render_a_turn.py", str(tmp_path / "out" / "asset.ply"), str(tmp_path / "turn.png"))
    assert float(re.findall(r"gradient of the mean colour: ([\d.]+)", printed)[0]) > 0
    assert (tmp_path / "turn.png").stat().st_size > 5000


def test_the_example_of_reconstruction_runs(tmp_path: Path) -> None:
    pytest.importorskip("embreex", reason="needs the data extra")
    printed = example("reconstruct.py", "eval/examples/house.glb", str(tmp_path))
    assert float(re.findall(r"PSNR of 12 views: ([\d.]+) dB", printed)[0]) > 25
