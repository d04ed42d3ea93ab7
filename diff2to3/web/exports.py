"""The files that the web app offers of an asset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diff2to3.formats import FORMATS, Format, encode
from diff2to3.web.jobs import Outcome
from diff2to3.web.viewer import viewer_page


@dataclass(frozen=True)
class Export:
    """A kind of file: its ending without the dot, what to call it, its media type, and what makes it."""

    ending: str
    label: str
    media_type: str
    make: Callable[[Outcome, str], bytes]


def splats(entry: Format) -> Export:
    """A file of Gaussians."""

    def make(outcome: Outcome, name: str) -> bytes:
        return encode(outcome.gaussians, entry, outcome.note)

    return Export(entry.name, entry.label, entry.media_type, make)


def html(outcome: Outcome, name: str) -> bytes:
    page = viewer_page(outcome.gaussians, name, photo=outcome.photo, home=outcome.home, note=outcome.note)
    return page.encode("utf-8")


def exports() -> dict[str, Export]:
    """By ending."""
    order = sorted(FORMATS, key=lambda name: name != "ply")  # the usual one first
    found = [
        *(splats(FORMATS[name]) for name in order if FORMATS[name].write is not None),
        Export("html", "page with viewer", "application/octet-stream", html),
    ]
    return {export.ending: export for export in found}
