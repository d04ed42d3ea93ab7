"""Running a script under Blender's Python, in a process of its own.

Blender (GPL, one Python version, an older numpy) does not share our environment: it gets a script file and a
folder with a job, and leaves its results in that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from diff2to3.errors import InputError, MissingDependencyError

JOB_NAME, RESULT_NAME = "job.json", "result.json"

_HOW = "python3.11 -m venv bl && bl/bin/pip install bpy==5.0.1, then set blender.python=bl/bin/python"


def run_script(
    interpreter: str, script: Path, job: dict[str, Any], folder: Path, seconds: float
) -> dict[str, Any]:
    """Run ``script`` on ``job`` in ``folder`` and return what it writes as its result.

    ``interpreter`` is a Python that can ``import bpy``, or a Blender executable. The script is called with
    the folder as its argument, reads job.json there and writes result.json last.

    Raises MissingDependencyError when there is no such interpreter or it has no bpy, and InputError when the
    script fails or takes longer than ``seconds``.
    """
    program = shutil.which(interpreter)
    if program is None:
        raise MissingDependencyError(f"Blender (no program {interpreter!r})", hint=_HOW)
    (folder / JOB_NAME).write_text(json.dumps(job), "utf-8")
    result = folder / RESULT_NAME
    result.unlink(missing_ok=True)
    command = [program, "-I", str(script), str(folder)]
    if "blender" in os.path.basename(os.path.realpath(program)).lower():
        command = [program, "--background", "--factory-startup", "--python", str(script), "--", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"Blender took longer than the limit of {seconds:g} s") from None
    if not result.is_file():
        if "No module named 'bpy'" in done.stderr:
            raise MissingDependencyError(f"bpy (in {interpreter})", hint=_HOW)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise InputError(f"Blender failed: {reason}")
    content: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return content
