"""What the Dockerfile names exists, and what is sent to docker is what it copies. Building it is for .ci/run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


def test_copied_files_exist_and_are_sent() -> None:
    sent = {line[1:] for line in IGNORE if line.startswith("!")}
    copied: set[str] = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        copied |= set(line.split()[:-1])
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    assert IGNORE[0] == "*"  # nothing else: no secrets, no data


def test_every_variant_has_its_stage() -> None:
    assert "FROM compiler-${VARIANT}" in DOCKERFILE
    for variant in ("cpu", "cuda"):
        assert re.search(rf"^FROM \S+ AS compiler-{variant}$", DOCKERFILE, re.MULTILINE)
    assert "DIFF2TO3_CUDA_ARCHS" in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_it_runs_as_no_root() -> None:
    lines = DOCKERFILE.splitlines()
    assert lines.index("USER user") < lines.index('ENTRYPOINT ["diff2to3"]')
