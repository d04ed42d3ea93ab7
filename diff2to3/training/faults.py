"""What ends a run early: signals, and losses that are not finite."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from diff2to3.errors import Diff2to3Error
from diff2to3.files import write_atomic
from diff2to3.tensors import save_tensors
from diff2to3.training.batches import tensors_in
from diff2to3.training.state import TrainState


class NotFiniteError(Diff2to3Error, RuntimeError):
    """A loss or gradient is NaN or infinite. The message has the step, the assets and the saved batch."""


class StopRequest:
    """Set by SIGTERM (a job's end) and SIGINT (Ctrl-C); the loop then saves and ends after its step."""

    def __init__(self) -> None:
        self.requested = False
        self.signal: signal.Signals | None = None

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self.signal == signal.SIGINT

    @property
    def name(self) -> str:
        return self.signal.name if self.signal is not None else "another process"

    def set(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.signal = True, signal.Signals(number)
        print(f"{self.signal.name}: saving after this step", file=sys.stderr, flush=True)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Signals become a request for as long as this lasts."""
    request = StopRequest()
    before = {number: signal.signal(number, request.set) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_not_finite(
    out: Path,
    state: TrainState,
    batches: list[Any],
    losses: list[dict[str, Tensor]],
    norm: float,
    rank: int,
) -> None:
    """Save this process's part of the step's batch and raise :class:`NotFiniteError`."""
    folder = out / "nonfinite" / f"step-{state.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    bad_names = [n for n, p in state.trained().items() if p.grad is not None and not _finite(p.grad)]
    bad_ids: list[str] = []
    for i, (batch, values) in enumerate(zip(batches, losses, strict=True)):
        ids = list(batch.ids)
        per_item = {name: value.cpu().tolist() for name, value in values.items()}
        bad_ids += [
            asset for j, asset in enumerate(ids) if not all(math.isfinite(v[j]) for v in per_item.values())
        ]
        path = folder / f"rank{rank}-part{i}"
        save_tensors(path.with_suffix(".safetensors"), {n: t.clone() for n, t in tensors_in(batch).items()})
        report = {
            "step": state.step,
            "ids": ids,
            "losses": {name: [repr(v) for v in value] for name, value in per_item.items()},
            "gradient_norm": repr(norm),
            "not_finite_gradients": bad_names,
        }
        write_atomic(path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    if bad_ids:
        what = f"the loss of {', '.join(bad_ids)}"
    elif bad_names:
        what = f"the gradient of {bad_names[0]}" + (
            f" and {len(bad_names) - 1} more" if bad_names[1:] else ""
        )
    else:
        what = "a value of another process"
    ids = [asset for batch in batches for asset in batch.ids]
    raise NotFiniteError(
        f"step {state.step}: {what} is not finite; assets {', '.join(ids)}; the batch is saved in {folder}; "
        "the last checkpoint is untouched"
    )


def _finite(tensor: Tensor) -> bool:
    from diff2to3.training.distributed import local

    return bool(local(tensor).isfinite().all())
