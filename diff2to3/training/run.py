"""A training program: ``raise SystemExit(main(VaeTask, VaeRunConfig))``.

python train/vae.py configs/vae/mini.yaml key=value ...                          one process
torchrun --nproc-per-node 8 train/vae.py configs/vae/large.yaml key=value ...    one process a GPU

The same command resumes the run in its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diff2to3.config import config_to_dict, load_config, save_config
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.kernels.library import library_for
from diff2to3.machine import device_name
from diff2to3.nn.backends import use_backends
from diff2to3.streams import make_usable
from diff2to3.training import activations, distributed, estimate, resume
from diff2to3.training.checkpoints import CheckpointError, Checkpoints
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World
from diff2to3.training.ema import Averager
from diff2to3.training.faults import NotFiniteError, StopRequest, stop_on_signals
from diff2to3.training.loggers import Console, JsonLines, Logger, TensorBoard, Wandb
from diff2to3.training.loop import Trainer
from diff2to3.training.precision import DTYPES, LossScale
from diff2to3.training.profiler import Profiler
from diff2to3.training.records import Records
from diff2to3.training.results import Results, averaged, export
from diff2to3.training.state import TrainState, adamw
from diff2to3.training.task import Task, seeded

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
#: What ends a run for reasons outside the code: said in one line, without a traceback.
FAILURES = (
    NotFiniteError, CheckpointError, FloatingPointError, MemoryError, OSError, distributed.ElsewhereError
)  # fmt: skip


def build_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description="Train, or go on with what is in the run folder (train.out)."
    )
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that differ: train.lr=1e-4")
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume although the configuration has changed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, print parameters and estimates of memory and speed, and end",
    )
    parser.add_argument(
        "--gpu",
        choices=sorted(estimate.GPUS),
        default="h100",
        help="what --dry-run estimates for (default: %(default)s)",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=8, help="how many of them, for --dry-run (default: %(default)s)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also profile a few steps: a trace and the ten longest operations",
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write the newest checkpoint as a bundle, and end"
    )
    return parser


def main(task_class: Callable[[Any], Task], config_class: type, argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns the exit code: 0 when done, or stopped by SIGTERM after saving; 1 when training failed; 2 for bad
    input; 130 after Ctrl-C.
    """
    make_usable()
    args = build_parser(Path(sys.argv[0]).name).parse_intermixed_args(argv)
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled"
    )  # a process alone is no mistake
    try:
        with stop_on_signals() as stop:
            config: Any = load_config(config_class, args.config, args.overrides)
            task = task_class(config)
            if args.dry_run:
                print(estimate.report(task, config.train, args.gpu, args.num_gpus))
                return 0
            with distributed.joined(config.train.device, config.train.timeout) as world:
                if args.export is not None:
                    export_newest(task, config.train, world, args.export)
                else:
                    train(task, config, world, stop, allow_changes=args.allow_changes, profile=args.profile)
        return 130 if stop.interrupted else 0
    except (InputError, MissingDependencyError) as error:
        _complain(error)
        return EXIT_BAD_INPUT
    except FAILURES as error:
        _complain(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def _complain(error: Exception) -> None:
    rank = distributed.own_rank()
    print(f"rank {rank}: error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)


def train(
    task: Task,
    config: Any,
    world: World,
    stop: StopRequest,
    *,
    allow_changes: bool = False,
    profile: bool = False,
) -> None:
    """One run of a task, from where its folder stands."""
    options: TrainConfig = config.train
    out = Path(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with resume.only_process(out, world), contextlib.ExitStack() as stack:
        distributed.together(lambda: check_kernels(options, world), world)
        distributed.together(lambda: resume.check_config(out, config, allow_changes), world)
        checkpoints = Checkpoints(out / "checkpoints", world, options.keep, options.keep_every)
        stack.callback(checkpoints.wait)
        info = checkpoints.newest()
        state, module = build(task, options, world, fresh=info is None)
        if info is not None:
            state.load(checkpoints.path(info["step"]), info)
        if world.main:
            save_config(config, out / "config.yaml")
        loaders = build_loaders(task, options, state, world)
        records = stack.enter_context(records_of(config, out, state, world))
        note_start(records, state, info, options, world)
        results = Results(task, options, world, records)
        trainer = Trainer(options, state, module, loaders, world, checkpoints, records, results, stop)
        if trainer.fit(Profiler(out, world) if profile else None):
            results.make(state, {"export"})
        else:
            records.put("event", state.step, {"event": f"stopped by {stop.name}"})


def build(
    task: Task, config: TrainConfig, world: World, *, fresh: bool = True
) -> tuple[TrainState, nn.Module]:
    """The state of step 0 (with the weights of ``init_from`` if ``fresh``), and the module that training
    calls."""
    with seeded(config.seed):
        objective = task.objective()
    if fresh and config.init_from is not None:
        resume.initialize(objective, Path(config.init_from), world)
    objective.to(world.device).train()
    use_backends(objective, convolution=config.conv_backend, attention=config.attention_backend)
    blocks = task.blocks(objective)
    if config.compile:
        activations.compile_blocks(blocks)
    if config.checkpoint_blocks:
        activations.recompute(blocks)
    module = distributed.parallelize(
        objective, blocks, config.parallel, world, config.find_unused, DTYPES[config.precision]
    )
    weights = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    if not weights:
        raise InputError("the objective has nothing to train: no parameter requires a gradient")
    averager = None
    if config.ema:
        shards = {name: distributed.local(value.detach()) for name, value in weights.items()}
        averager = Averager(shards, config.ema, config.ema_warmup)
    scale = LossScale(config.precision == "fp16")
    return TrainState(objective, adamw(weights, config), averager, scale, world), module


def check_kernels(config: TrainConfig, world: World) -> None:
    """InputError where a GPU has no compiled kernels and the run does not say that it may do without: one such process
    would hold up all others, rasterising in Python.
    """
    if world.device.type != "cuda" or config.kernels == "auto":
        return
    if library_for(world.device) is None:
        raise InputError(
            f"rank {world.rank}: no CUDA kernels (the reason is above; 'diff2to3 doctor' says what is missing); "
            "train.kernels=auto trains with the slow reference"
        )


def build_loaders(task: Task, config: TrainConfig, state: TrainState, world: World) -> list[Any]:
    """A loader for each of this process's parts of a step, at the state's place."""
    parts = world.size * config.accumulate
    loaders = []
    for i in range(config.accumulate):
        loader = task.loader(config.seed, world.rank * config.accumulate + i, parts)
        if state.loader:
            loader.load_state_dict(state.loader)
        loaders.append(loader)
    return loaders


def note_start(
    records: Records, state: TrainState, info: dict[str, Any] | None, config: TrainConfig, world: World
) -> None:
    """An event in the log, and a warning if steps now have more or fewer parts than before."""
    parts = world.size * config.accumulate
    records.put(
        "event",
        state.step,
        {
            "event": "started" if info is None else "resumed",
            "processes": world.size,
            "parts": parts,
            "parameters": sum(value.numel() for value in state.trained().values()),
            "device": device_name(world.device),
            "torch": torch.__version__,
        },
    )
    if info is not None and parts != info["parts"] and world.main:
        print(
            f"warning: a step had {info['parts']} parts (processes x accumulate) and now has {parts}: unless the "
            "parts' sizes change with it, the batch is another; set train.accumulate to keep it",
            file=sys.stderr,
        )


def export_newest(task: Task, config: TrainConfig, world: World, folder: Path) -> None:
    """Write the averaged weights of the run's newest checkpoint as a bundle."""
    checkpoints = Checkpoints(Path(config.out) / "checkpoints", world)
    info = checkpoints.newest()
    if info is None:
        raise InputError(f"{config.out}: the run has no checkpoint yet")
    state, _ = build(task, config, world, fresh=False)
    state.load(checkpoints.path(info["step"]), info)
    with averaged(state, task, config) as objective:
        if objective is not None:
            export(task, objective, folder)
            print(f"step {state.step}: {folder}")


@contextlib.contextmanager
def records_of(config: Any, out: Path, state: TrainState, world: World) -> Iterator[Records]:
    """The run's loggers, on the main process."""
    options: TrainConfig = config.train
    loggers: list[Logger] = []
    with contextlib.ExitStack() as stack:
        makers: list[Callable[[], Logger]] = [lambda: JsonLines(out / "log.jsonl", state.step)]
        if "console" in options.loggers:
            makers.append(lambda: Console(state.step, options.steps))
        if "tensorboard" in options.loggers:
            makers.append(lambda: TensorBoard(out, state.step))
        if "wandb" in options.loggers:
            project, mode = options.wandb_project, options.wandb_mode
            makers.append(lambda: Wandb(out, config_to_dict(config), project, mode))
        for make in makers if world.main else []:
            loggers.append(make())
            stack.callback(loggers[-1].close)
        yield Records(loggers, world)
