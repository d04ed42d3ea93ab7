"""Running the stages: what is to be done, doing it on an executor, and joining the results to shards.

The result depends on the source and the configuration alone. The plan fixes which assets a shard holds and in
which order; a worker's result is a part in the staging folder; a shard is its parts in order. So the number
and kind of workers, job arrays, and interruptions at any moment change nothing but the time it takes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diff2to3.config import save_config
from diff2to3.data import shards
from diff2to3.data.executors import Executor, Outcome, Task, Work
from diff2to3.data.plan import PlannedAsset, extend_plan, read_plan, shards_of, write_plan
from diff2to3.data.schema import DataConfig
from diff2to3.data.shards import Part, ShardIndex, part_path
from diff2to3.data.source import AssetSource
from diff2to3.data.stages import Clock, Stage, make_stage, make_stages
from diff2to3.data.store import OpenFiles, open_in_shard
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.files import write_atomic

#: A part that vanished between its worker and the shard (somebody cleaned up) is made again this often.
_ROUNDS = 3


@dataclass
class StageReport:
    """What one run did in one stage."""

    name: str
    num_assets: int = 0
    num_made: int = 0
    num_bytes: int = 0
    wall_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # by step, summed over assets and workers
    failed: dict[str, str] = field(default_factory=dict)  # asset id -> reason, of all that failed so far
    repaired: list[str] = field(default_factory=list)  # shards found damaged


@dataclass(frozen=True)
class Context:
    """What travels to a worker with every task, and is the same for all tasks of a stage."""

    config: DataConfig
    stage: str
    inputs: tuple[str, ...]


def prepare(
    config: DataConfig,
    executor: Executor,
    *,
    part: tuple[int, int] = (0, 1),
    checksum: bool = True,
    retry_failed: bool = False,
    progress: bool = False,
) -> list[StageReport]:
    """Bring the dataset at ``config.out`` up to date; what is done stays as it is.

    Args:
        config: what to make of which assets.
        executor: where the work runs.
        part: (i, n): only every n-th shard beginning with the i-th, for job arrays.
        checksum: verify finished shards by SHA-256; False looks at their sizes only.
        retry_failed: try the assets again that failed in an earlier run.
        progress: bars on stderr.

    Raises:
        InputError: a source or configuration that cannot work, or a dataset made with other settings.
    """
    if not 0 <= part[0] < part[1]:
        raise InputError(f"shard: expected i/n with 0 <= i < n, got {part[0]}/{part[1]}")
    root = Path(config.out)
    stages = make_stages(config)
    plan = extend_plan(read_plan(root), AssetSource(config).list(), config.shard_size)
    if not plan:
        raise InputError(f"{config.source}: no asset passes the filters")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            _claim(root, stage)
        write_plan(root, plan)
        save_config(config, root / "dataset.yaml")
        log = _Log(root / "logs" / f"prepare-{part[0]}-of-{part[1]}.jsonl")
        mine = shards_of(plan, part)
        return [
            _StageRun(config, stage, mine, checksum, retry_failed, log).run(executor, progress)
            for stage in stages
        ]
    except OSError as error:
        raise InputError(f"{config.out}: {error.strerror or error}") from error


def run_task(context: Context, task: Task, slot: int) -> Outcome:
    """Make one asset, in a worker; the result is a part in the staging folder."""
    torch.set_num_threads(1)  # one process an asset; and the number of threads can change the rounding
    clock = Clock()
    cpu = time.process_time()
    try:
        with clock("setup"):
            stage = _ready_stage(context, slot)
    except (InputError, MissingDependencyError) as error:
        return Outcome(task, clock.seconds, fatal=str(error))
    setup_seconds = clock.seconds.pop("setup")
    cpu = time.process_time() if setup_seconds > 0.1 else cpu
    details = None
    root, files = Path(context.config.out), OpenFiles()
    with clock("total"):
        try:
            asset = task.asset
            inputs = {
                name: open_in_shard(root, name, asset.shard, asset.key, files) for name in context.inputs
            }
            part = stage.process(asset, inputs, clock)
        except MissingDependencyError as error:
            return Outcome(task, clock.seconds, fatal=str(error))
        except MemoryError:
            part = Part(failed="needs more memory than the limit")
        except Exception as error:
            part = Part(failed=_reason(error, task.asset.id))
            details = None if isinstance(error, InputError) else traceback.format_exc()
        with clock("write"):
            _write(context, task, part)
    clock.seconds["cpu"] = time.process_time() - cpu
    if setup_seconds > 0.1:
        clock.seconds["setup"] = setup_seconds
    return Outcome(task, clock.seconds, part.failed, traceback=details)


def record_failure(context: Context, task: Task, reason: str) -> None:
    """Write the failure of a task whose process could not write it itself."""
    _write(context, task, Part(failed=_without_prefix(reason, task.asset.id)))


def _write(context: Context, task: Task, part: Part) -> None:
    path = part_path(Path(context.config.out), context.stage, task.asset.shard, task.asset.key)
    shards.write_part(path, task.asset.key, part, task.stamp)


#: The stage that this worker process has set up, and for what.
_ready: tuple[tuple[DataConfig, str], Stage] | None = None


def _ready_stage(context: Context, slot: int) -> Stage:
    global _ready
    wanted = (context.config, context.stage)
    if _ready is None or _ready[0] != wanted:
        stage = make_stage(context.config, context.stage)
        stage.setup(slot)
        _ready = (wanted, stage)
    return _ready[1]


class _StageRun:
    """One stage of one run."""

    def __init__(
        self,
        config: DataConfig,
        stage: Stage,
        assets: Mapping[int, list[PlannedAsset]],
        checksum: bool,
        retry_failed: bool,
        log: _Log,
    ) -> None:
        self.config, self.stage, self.assets = config, stage, assets
        self.checksum, self.retry_failed, self.log = checksum, retry_failed, log
        self.root = Path(config.out)
        self.settings = json.dumps(stage.settings(), sort_keys=True)
        self.report = StageReport(stage.name, sum(map(len, assets.values())))
        self.stamps: dict[str, str] = {}  # by key

    def run(self, executor: Executor, progress: bool) -> StageReport:
        """Make what is missing or damaged, shard by shard as their assets finish."""
        start = time.perf_counter()
        pending: dict[int, list[PlannedAsset]] = {}
        checking = f"{self.stage.name}: checking what is there"
        for shard in tqdm(self.assets, checking, leave=False, unit="shard", delay=2, disable=not progress):
            todo = self._check(shard)
            if todo is not None:
                pending[shard] = todo
        num_done = self.report.num_assets - sum(map(len, pending.values()))
        with _bar(self.stage.name, self.report.num_assets, num_done, progress) as bar:
            for _ in range(_ROUNDS):
                pending = self._make(pending, executor, bar)
                if not pending:
                    break
            else:
                raise InputError(f"{self.root}: finished parts keep vanishing; is another run cleaning up?")
        staging = self.root / ".staging" / self.stage.name
        for folder in (staging, staging.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self.report.wall_seconds = time.perf_counter() - start
        return self.report

    def _check(self, shard: int) -> list[PlannedAsset] | None:
        """None if the shard is done; else its assets without a valid part, after saving what can be saved."""
        shards.remove_leftovers(self.root, self.stage.name, shard)
        upstream = {name: _index(self.root, name, shard) for name in self.stage.inputs}
        stamps = self._stamps_of(shard, upstream)
        self.stamps |= stamps
        index = self._index_of(shard)
        if index is not None:
            intact = shards.is_intact(self.root, index, self.checksum)
            if not intact:
                self.report.repaired.append(f"{self.stage.name}/{shard:05d}")
            retry = {e.key for e in index.entries if e.failed is not None} if self.retry_failed else set()
            if intact and not retry and {e.key: e.stamp for e in index.entries} == stamps:
                self._count(index)
                shards.remove_parts(self.root, self.stage.name, shard)
                return None
            shards.salvage(self.root, index, {k: s for k, s in stamps.items() if k not in retry})
            for key in retry:
                part_path(self.root, self.stage.name, shard, key).unlink(missing_ok=True)
        self._pass_on_failures(shard, upstream)
        return [a for a in self.assets[shard] if self._read_part(a) is None]

    def _stamps_of(self, shard: int, upstream: Mapping[str, ShardIndex]) -> dict[str, str]:
        """Key -> hash of what the asset's result here follows from: the settings, and its results before."""
        results: dict[str, list[str]] = {asset.key: [self.settings] for asset in self.assets[shard]}
        for index in upstream.values():
            for entry in index.entries:
                if entry.key in results:
                    results[entry.key].append(
                        entry.sha256 if entry.failed is None else f"failed {entry.failed}"
                    )
        return {k: hashlib.sha256(json.dumps(r).encode()).hexdigest()[:16] for k, r in results.items()}

    def _index_of(self, shard: int) -> ShardIndex | None:
        """The shard's index, None when there is none that can be read."""
        path = shards.index_path(self.root, self.stage.name, shard)
        try:
            return shards.read_index(path)
        except InputError:
            if path.exists():
                self.report.repaired.append(f"{self.stage.name}/{shard:05d}")
            return None

    def _pass_on_failures(self, shard: int, upstream: Mapping[str, ShardIndex]) -> None:
        """An asset that failed before fails here for that reason: it is never left out without a word."""
        reasons: dict[str, str] = {}
        for name, index in upstream.items():
            for entry in index.entries:
                if entry.failed is not None:
                    first = (
                        entry.failed
                        if entry.failed.startswith("failed in ")
                        else f"failed in {name}: {entry.failed}"
                    )
                    reasons.setdefault(entry.key, first)
        for key, reason in reasons.items():
            path = part_path(self.root, self.stage.name, shard, key)
            shards.write_part(path, key, Part(failed=reason), self.stamps[key])

    def _read_part(self, asset: PlannedAsset) -> Any:
        path = part_path(self.root, self.stage.name, asset.shard, asset.key)
        return shards.read_part(path, asset.key, self.stamps[asset.key])

    def _make(
        self, pending: Mapping[int, list[PlannedAsset]], executor: Executor, bar: tqdm
    ) -> dict[int, list[PlannedAsset]]:
        """Make the assets of ``pending`` and join their shards; returns what vanished meanwhile."""
        left = {shard: len(assets) for shard, assets in pending.items()}
        vanished: dict[int, list[PlannedAsset]] = {}
        for shard in [s for s, count in left.items() if count == 0]:
            self._join(shard, vanished)
        tasks = [
            Task(self.stage.name, asset, self.stamps[asset.key])
            for assets in pending.values()
            for asset in assets
        ]
        for outcome in self._outcomes(executor, tasks):
            self._note(outcome, bar)
            shard = outcome.task.asset.shard
            left[shard] -= 1
            if left[shard] == 0:
                self._join(shard, vanished)
        return vanished

    def _outcomes(self, executor: Executor, tasks: Sequence[Task]) -> Iterator[Outcome]:
        # Only stages that read files from strangers: a limit on memory gets in the way of GPU drivers.
        memory = None if self.stage.inputs else self.config.limits.memory_gib
        work = Work(
            Context(self.config, self.stage.name, self.stage.inputs),
            run_task,
            record_failure,
            self.config.limits.seconds,
            None if memory is None else int(memory * 2**30),
        )
        return executor.map(work, tasks) if tasks else iter(())

    def _join(self, shard: int, vanished: dict[int, list[PlannedAsset]]) -> None:
        assets = self.assets[shard]
        wanted = [(asset.id, asset.key, self.stamps[asset.key]) for asset in assets]
        made = shards.assemble(self.root, self.stage.name, shard, wanted)
        if isinstance(made, ShardIndex):
            self._count(made)
        else:
            vanished[shard] = [asset for asset in assets if asset.key in made]

    def _count(self, index: ShardIndex) -> None:
        self.report.num_bytes += index.size
        self.report.failed |= {e.id: e.failed for e in index.entries if e.failed is not None}

    def _note(self, outcome: Outcome, bar: tqdm) -> None:
        self.log.write(outcome)
        if outcome.fatal is not None:
            raise InputError(f"{self.stage.name}: {outcome.fatal}")
        self.report.num_made += 1
        for name, seconds in outcome.seconds.items():
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + seconds
        bar.update()
        if outcome.failed is not None:
            bar.write(f"{self.stage.name}: {outcome.task.asset.id}: {outcome.failed}", file=sys.stderr)


class _Log:
    """One JSON line a finished task, with times and tracebacks; beside the data, not part of it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, outcome: Outcome) -> None:
        line: dict[str, Any] = {"time": round(time.time(), 3), "stage": outcome.task.stage}
        line |= {"id": outcome.task.asset.id, "seconds": {k: round(v, 4) for k, v in outcome.seconds.items()}}
        for name in ("failed", "fatal", "traceback"):
            if getattr(outcome, name) is not None:
                line[name] = getattr(outcome, name)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _claim(root: Path, stage: Stage) -> None:
    """Note a stage's settings in its folder. InputError when the folder holds results of other settings."""
    path = root / stage.name / "settings.json"
    settings = json.loads(json.dumps(stage.settings()))
    if path.is_file():
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: damaged: {error}") from error
        if before != settings:
            differences = "; ".join(_differences(before, settings))
            raise InputError(
                f"{root}: {stage.name} was prepared with other settings ({differences}); "
                f"choose another out=, or delete {path.parent}"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings, indent=1) + "\n")


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    elif before != now:
        yield f"{prefix}: {before} there, {now} now"


def _index(root: Path, stage: str, shard: int) -> ShardIndex:
    try:
        return shards.read_index(shards.index_path(root, stage, shard))
    except InputError as error:
        raise InputError(f"{error}; prepare stage {stage} first") from error


def _bar(name: str, total: int, done: int, progress: bool) -> tqdm:
    # Where nobody watches (a log file), a line every half minute is enough.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=f"{name:>16}", total=total, initial=done, unit="asset", disable=not progress,
        mininterval=interval, maxinterval=2 * interval, smoothing=0.05, dynamic_ncols=True,
    )  # fmt: skip


def _reason(error: Exception, asset_id: str) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:500] if lines else ""
    if isinstance(error, InputError):
        return _without_prefix(text, asset_id)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _without_prefix(reason: str, asset_id: str) -> str:
    return reason.removeprefix(f"{asset_id}: ")
