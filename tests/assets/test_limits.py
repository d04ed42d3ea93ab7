"""Bounds of one asset."""

from __future__ import annotations

import pytest

from diff2to3.assets import Limits


def test_bad_limits():
    with pytest.raises(ValueError, match="max_faces"):
        Limits(max_faces=0)
