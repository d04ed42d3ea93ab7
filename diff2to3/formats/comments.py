"""The line in which a .ply says what it is: JSON behind our name in a comment, which other programs skip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diff2to3.formats.frames import FRAMES

COMMENT = "diff2to3"
#: What every file of ours says about itself, beside what the caller adds.
CONVENTIONS = {
    "frame": FRAMES["native"].text,
    "color_space": "sRGB-encoded",
}


def comment_line(metadata: Mapping[str, Any]) -> str:
    """The header's line of metadata, with our conventions where it states no others."""
    return f"comment {COMMENT} {json.dumps({**CONVENTIONS, **metadata}, ensure_ascii=True)}"
