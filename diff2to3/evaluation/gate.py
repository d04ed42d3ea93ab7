"""A result against an earlier one: worse by more than its noise fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diff2to3.errors import InputError
from diff2to3.evaluation.summary import METRICS


@dataclass(frozen=True)
class Verdict:
    """One metric. ``change`` is towards better; ``allowed`` is how much worse passes."""

    metric: str
    before: float
    after: float | None
    change: float
    allowed: float
    passed: bool
    how: str

    def line(self) -> str:
        heading, _, factor, digits = METRICS[self.metric]
        after = "missing" if self.after is None else f"{self.after * factor:.{digits}f}"
        change, allowed = (f"{v * factor:+.{digits + 1}f}" for v in (self.change, -self.allowed))
        return (
            f"{'ok  ' if self.passed else 'FAIL'} {heading}: {self.before * factor:.{digits}f} -> {after} "
            f"(change {change}, allowed {allowed}; {self.how})"
        )


def compare_results(
    baseline: Mapping[str, Any], result: Mapping[str, Any], *, sigmas: float = 3.0, floor: float = 1e-4
) -> list[Verdict]:
    """A verdict on every metric of ``baseline``.

    A metric fails when it is worse by more than ``sigmas`` standard errors plus ``floor`` times its value, when it
    is missing from ``result``, or is not a number. The standard error is that of the paired differences where
    both have the metric for the same assets; else the two results' own noise, added in squares.

    Raises:
        InputError: the results are of different tasks, protocols or assets, and cannot be compared.
    """
    for key, what in (("task", "tasks"), ("protocol_sha256", "protocols"), ("weights", "weights")):
        if baseline[key] != result[key]:
            raise InputError(f"the results have different {what}; a gate compares like with like")
    missing = sorted(set(baseline["assets"]) - set(result["assets"]))
    if missing:
        raise InputError(
            f"{len(missing)} assets of the baseline have no scores in the result, first {missing[0]!r}"
            + (f": {result['errors'][missing[0]]}" if missing[0] in result.get("errors", {}) else "")
        )
    return [
        _verdict(name, baseline, result, sigmas, floor) for name in baseline["metrics"] if name in METRICS
    ]


def _verdict(
    name: str, baseline: Mapping[str, Any], result: Mapping[str, Any], sigmas: float, floor: float
) -> Verdict:
    before, held = baseline["metrics"][name], result["metrics"].get(name)
    sign = 1.0 if METRICS[name][1] else -1.0
    if held is None or held["value"] is None or not math.isfinite(held["value"]):
        return Verdict(name, before["value"], None, -math.inf, 0.0, False, "the result lacks it")
    slack = floor * abs(before["value"])
    pairs = [
        (row.get(name), result["assets"][asset_id].get(name)) for asset_id, row in baseline["assets"].items()
    ]
    if any((a is None) != (b is None) for a, b in pairs):
        return Verdict(
            name,
            before["value"],
            held["value"],
            -math.inf,
            0.0,
            False,
            "defined for other assets than before",
        )
    differences = [sign * (b - a) for a, b in pairs if a is not None]
    if len(differences) >= 2:
        change = float(np.mean(differences))
        error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
        how = f"paired over {len(differences)} assets"
    else:
        change = sign * (held["value"] - before["value"])
        error = math.hypot(before["noise"] or 0.0, held["noise"] or 0.0)
        how = "noise of both results" if error else "no noise known"
    allowed = sigmas * error + slack
    return Verdict(name, before["value"], held["value"], change, allowed, change >= -allowed, how)
