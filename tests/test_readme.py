"""Every command that the README shows works. Long ones run in a form that only checks them."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: An inline `code span` that starts with one of these is a command.
PROGRAMS = ("pip ", "pytest", "diff2to3 ", "python ", "ruff ", ".ci/", "DIFF2TO3_")


def commands(text: str) -> list[str]:
    """Lines of ```bash blocks, split at &&, and inline code that starts with a program's name."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith(PROGRAMS)]
    return list(dict.fromkeys(part.strip() for line in [*lines, *spans] for part in line.split("&&")))


def illustrations(text: str) -> list[str]:
    """Commands in ```text blocks, without the remarks behind #: they name files that a user has."""
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.split(" # ")[0].strip() for line in lines]
    return [line for line in lines if line.startswith(("diff2to3 ", "python ", "torchrun "))]


def project_extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def check_pip(words: list[str]) -> None:
    """Every extra that a pip command names exists."""
    named = re.findall(r"\[([\w,]+)\]", " ".join(words))
    ours = " ".join(words).count("diff2to3[") + " ".join(words).count(".[")
    assert not ours or {extra for group in named for extra in group.split(",")} <= project_extras()


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", commands(README))
def test_command(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z0-9_]+=", word)]
    program = words[0]
    if program == "pip":
        check_pip(words)
    elif program == "pytest":
        run(sys.executable, "-m", "pytest", *words[1:], "--collect-only", "-q", "tests/test_readme.py")
    elif words[:2] in (["diff2to3", "serve"], ["diff2to3", "view"]):  # one never ends, one opens a browser
        shown = help_of(sys.executable, "-m", "diff2to3.cli", words[1])
        assert all(word in shown for word in words if word.startswith("--"))
    elif program == "diff2to3":
        for option in ("-o", "--turntable"):  # files are made, but not in the checkout
            if option in words:
                words[words.index(option) + 1] = str(tmp_path / words[words.index(option) + 1])
        script = Path(sys.executable).with_name("diff2to3")  # the installed one, whatever the current folder
        run(*([str(script)] if script.exists() else [sys.executable, "-m", "diff2to3.cli"]), *words[1:])
    elif words[:2] == ["python", "-m"]:
        run(sys.executable, *words[1:], "--help")
    elif program == "python" and words[1].endswith(".py"):
        help_of(sys.executable, str(ROOT / words[1]))
    elif program == "ruff":
        pytest.importorskip("ruff", reason="ruff is not installed")
        run(sys.executable, "-m", "ruff", *words[1:], "--diff", "setup.py")
    elif program.startswith(".ci/"):
        run("bash", "-n", program)
    else:
        pytest.fail(f"teach this test how to run: {command}")


@functools.cache
def help_of(*program: str) -> str:
    """What a program prints for --help; asked once, for starting it takes seconds."""
    done = subprocess.run(
        [*program, "--help"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", illustrations(README))
def test_illustration(command: str) -> None:
    """Its program has the options that it uses, and its files in the repository exist."""
    words = shlex.split(command)
    if words[0] == "diff2to3":
        depth = 3 if words[1] in ("data", "models") else 2
        program = [sys.executable, "-m", "diff2to3.cli", *words[1:depth]]
    else:
        script = next(word for word in words if word.endswith(".py"))
        program = [sys.executable, str(ROOT / script)]
    shown = help_of(*program)
    for word in words:
        if word.startswith("--") and word != "--nproc-per-node":
            assert word in shown, word
        if word.startswith(("configs/", "eval/protocol/", "eval/examples/", "train/")):
            assert (ROOT / word).is_file(), word


def test_commands_are_found() -> None:
    text = "```bash\npip install . && diff2to3 doctor\n```\n`pytest --slow` and `coords`\n```\nlayout/\n```\n"
    assert commands(text) == ["pip install .", "diff2to3 doctor", "pytest --slow"]
    assert len(commands(README)) > 5


def test_first_two_blocks_install_and_test() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks[0].startswith("pip install ") and "pytest" in blocks[1]


def test_files_and_extras_that_it_names_exist() -> None:
    extras = re.findall(r"^\| `(.+?)` \|", README.split("## Installing")[1], re.MULTILINE)
    named = {name for cell in extras for name in cell.split("`, `")}
    assert named == project_extras()
    for folder in re.findall(r"^(\w+)/ ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
