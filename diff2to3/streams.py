"""stdout and stderr that can be written to, whatever a command was started by."""

from __future__ import annotations

import io
import os
import sys


def make_usable() -> None:
    """Replace what is closed (by pythonw, some schedulers, ``>&-``) with nothing, and let what is open escape the
    characters that its encoding lacks.

    Python itself raises AttributeError or UnicodeEncodeError there, in the middle of a batch. A closed descriptor of
    the system is taken up, too: else the next file that is opened gets its number, and libraries print into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
