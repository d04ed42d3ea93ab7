"""A look at where the time of a few steps goes."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from diff2to3.files import write_atomic
from diff2to3.training.distributed import World

_WARM_UP, _STEPS, _ROWS = 3, 3, 10


class Profiler:
    """Called after every step; profiles the main process's steps 4 to 6 of this start.

    <out>/profile/trace.json.gz    for https://ui.perfetto.dev
    <out>/profile/top.txt          the ten operations that take longest
    """

    def __init__(self, out: Path, world: World) -> None:
        self.folder, self.world, self._done = out / "profile", world, 0
        self._profile: profile | None = None

    def __call__(self) -> None:
        self._done += 1
        if not self.world.main:
            return
        if self._done == _WARM_UP:
            kinds = [ProfilerActivity.CPU]
            if self.world.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=kinds, record_shapes=True, profile_memory=True)
            self._profile.start()
        elif self._done == _WARM_UP + _STEPS and self._profile is not None:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            self._profile.stop()
            self._write(self._profile)
            self._profile = None

    def _write(self, found: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = self.folder / ".trace.json"
        found.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(self.folder / ".trace.json.gz", "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        os.replace(self.folder / ".trace.json.gz", self.folder / "trace.json.gz")
        key = "self_cuda_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=_ROWS, max_name_column_width=40)
        write_atomic(self.folder / "top.txt", f"{_STEPS} steps\n{table}\n")
        print(f"{table}\nprofile: {self.folder}", flush=True)
