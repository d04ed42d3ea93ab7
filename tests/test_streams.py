"""Commands without a place to write to, and with one that knows few characters."""

import io
import subprocess
import sys

import pytest

from diff2to3 import cli
from diff2to3.streams import make_usable


def ascii_stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


@pytest.mark.parametrize(
    "words", [["--help"], *([name, "--help"] for name in ("generate", "render", "doctor"))]
)
def test_help_in_ascii(monkeypatch, words):
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    out.flush()
    assert caught.value.code == 0 and b"usage: diff2to3" in out.buffer.getvalue()


def test_names_outside_the_encoding_are_escaped(monkeypatch):
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    make_usable()
    print("Schäfchen \udcff 椅子.ply")
    out.flush()
    assert out.buffer.getvalue() == b"Sch\\xe4fchen \\udcff \\u6905\\u5b50.ply\n"


@pytest.mark.parametrize("how", ["none", "closed"])
def test_streams_that_are_not_there(monkeypatch, how):
    """None under pythonw."""
    for name in ("stdout", "stderr"):
        stream = ascii_stream()
        stream.close()
        monkeypatch.setattr(sys, name, None if how == "none" else stream)
    make_usable()
    print("out")
    print("err", file=sys.stderr)
    sys.stdout.flush()
    assert cli.main(["render", "missing.ply", "-o", "x.png"]) == 2


def test_closed_descriptors_are_not_given_to_files(tmp_path):
    """As cron's ``>&- 2>&-``: the next file that is opened would be number 1, and get what libraries print."""
    program = (
        "import os; from diff2to3.streams import make_usable; make_usable(); "
        f"file = open({str(tmp_path / 'a')!r}, 'w'); print('printed'); os.write(1, b'by a library'); "
        "file.write(str(file.fileno()))"
    )
    words = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program]
    assert subprocess.run(words, timeout=60).returncode == 0
    assert int((tmp_path / "a").read_text()) > 2
