"""A training program: ``raise SystemExit(main(VaeTask, VaeRunConfig))``.

python train/vae.py configs/vae/mini.yaml key=value ...                      one process
torchrun --nproc-per-node 8 train/vae.py configs/vae/large.yaml key=value ...    one process a GPU

The same command resumes the run in its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from diff2to3.config import config_to_dict, load_config, save_config
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.training import distributed, resume
from diff2to3.training.checkpoints import CheckpointError, Checkpoints
from diff2to3.training.config import TrainConfig
from diff2to3.training.distributed import World
from diff2to3.training.ema import Averager
from diff2to3.training.faults import NotFiniteError, StopRequest, stop_on_signals
from diff2to3.training.loggers import Console, JsonLines, Logger, TensorBoard, Wandb
from diff2to3.training.loop import Trainer
from diff2to3.training.precision import LossScale
from diff2to3.training.records import Records
from diff2to3.training.results import Results
from diff2to3.training.state import TrainState, adamw
from diff2to3.training.task import Task, seeded

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1


def build_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description="Train, or go on with what is in the run folder.")
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that differ: train.lr=1e-4")
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume although the configuration has changed"
    )
    return parser


def main(task_class: Callable[[Any], Task], config_class: type, argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0 when done or stopped by SIGTERM after saving,
    1 when training failed, 2 for bad input."""
    args = build_parser(Path(sys.argv[0]).name).parse_args(argv)
    try:
        with stop_on_signals() as stop:
            config = load_config(config_class, args.config, args.overrides)
            with distributed.joined(config.train.device) as world:
                train(task_class(config), config, world, stop, allow_changes=args.allow_changes)
        return 0
    except (InputError, MissingDependencyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (NotFiniteError, CheckpointError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def train(task: Task, config: Any, world: World, stop: StopRequest, *, allow_changes: bool = False) -> None:
    """One run of a task, from where its folder stands."""
    options: TrainConfig = config.train
    out = Path(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if world.main:
        out.mkdir(parents=True, exist_ok=True)
        resume.check_config(out, config, allow_changes)
    distributed.total([0.0], world)
    checkpoints = Checkpoints(out / "checkpoints", world, options.keep, options.keep_every)
    state, module = build(task, options, world)
    info = checkpoints.newest()
    if info is not None:
        state.load(checkpoints.path(info["step"]), info)
    elif options.init_from is not None:
        resume.initialize(state, Path(options.init_from))
    if world.main:
        save_config(config, out / "config.yaml")
    loaders = build_loaders(task, options, state, world)
    with records_of(config, out, state, world) as records:
        results = Results(task, options, world, records)
        if info is not None:
            records.put("event", state.step, {"event": "resumed", "processes": world.size})
        trainer = Trainer(task, options, state, module, loaders, world, checkpoints, records, results, stop)
        if trainer.fit():
            results.make(state, {"export"})
        else:
            records.put(
                "event",
                state.step,
                {"event": f"stopped by {stop.signal.name if stop.signal else 'another process'}"},
            )


def build(task: Task, config: TrainConfig, world: World) -> tuple[TrainState, torch.nn.Module]:
    """The state of step 0, and the module that training calls."""
    with seeded(config.seed):
        objective = task.objective()
    objective.to(world.device).train()
    blocks = task.blocks(objective)
    module = distributed.parallelize(objective, blocks, config.parallel, world, config.find_unused)
    weights = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    if not weights:
        raise InputError("the objective has nothing to train: no parameter requires a gradient")
    averager = None
    if config.ema:
        shards = {name: distributed.local(value.detach()) for name, value in weights.items()}
        averager = Averager(shards, config.ema, config.ema_warmup)
    scale = LossScale(config.precision == "fp16")
    return TrainState(objective, adamw(weights, config), averager, scale, world), module


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


@contextlib.contextmanager
def records_of(config: Any, out: Path, state: TrainState, world: World) -> Iterator[Records]:
    """The run's loggers, on the main process."""
    options: TrainConfig = config.train
    loggers: list[Logger] = []
    if world.main:
        loggers.append(JsonLines(out / "log.jsonl", state.step))
        if "console" in options.loggers:
            loggers.append(Console(state.step, options.steps))
        if "tensorboard" in options.loggers:
            loggers.append(TensorBoard(out, state.step))
        if "wandb" in options.loggers:
            loggers.append(Wandb(out, config_to_dict(config), options.wandb_project, options.wandb_mode))
    records = Records(loggers, world)
    try:
        yield records
    finally:
        records.close()
