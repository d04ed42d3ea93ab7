"""The engine's part of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from diff2to3.config import MISSING
from diff2to3.training.schedules import SCHEDULES

PRECISIONS = ("fp32", "bf16", "fp16")
PARALLEL = ("ddp", "fsdp2")
LOGGERS = ("console", "tensorboard", "wandb")


@dataclass
class TrainConfig:
    """How a task is trained.

    out                run folder; the same command resumes what is in it
    seed               of the initial weights, the order of assets and every draw of the losses
    steps              optimiser steps in all
    init_from          bundle or run folder whose weights training begins with; null for new ones

    lr                 peak learning rate of AdamW
    schedule           constant, linear, cosine or wsd (constant, then linear decay over ``decay``)
    warmup             steps of linear warm-up
    decay              wsd: share of the steps that the decay at the end takes
    min_lr             the schedule's end, as a share of ``lr``
    betas, eps         of AdamW
    weight_decay       of tensors with two or more axes; biases, norms and scales have none
    clip               largest norm of the whole gradient; null for no limit
    ema                decay of the averaged weights; 0 for the current ones
    ema_warmup         begin with a lower decay, min(ema, (1 + step) / (10 + step))

    precision          fp32, bf16 or fp16: the dtype of autocast; weights are always float32
    accumulate         parts of a batch that each process takes one after another. A step is dealt in (processes x
                       accumulate) parts: where that product stays the same, so do the batches, exactly
    parallel           ddp or fsdp2 (weights, gradients and optimiser state sharded); for several processes
    find_unused        ddp: some weights have no gradient in some steps
    checkpoint_blocks  compute the blocks' activations again in the backward pass instead of keeping them
    compile            torch.compile the blocks, which takes minutes at the start. Holds, in whole graphs, for the
                       2to3-VAE's blocks of both types and for SMDiT's, also with checkpoint_blocks
    device             cpu, cuda, mps; null for the best there is
    kernels            native: training on a GPU needs the compiled kernels; auto: it may take the slow reference
    conv_backend       of sparse convolutions: auto, native, reference or spconv; null for auto
    attention_backend  auto, sdpa, varlen, xformers or flash_attn; null as the network's configuration says
    timeout            minutes that a process waits for another within a step before the run fails
    threads            CPU threads a process; null as torch decides

    save_every         steps between checkpoints, which is the most that a killed run loses
    keep               newest checkpoints kept; at least 2, so that a damaged one has one before it
    keep_every         also keep the checkpoints of every so many steps; null for none
    save_in_background write checkpoints while training goes on
    log_every          steps between records of the log
    sample_every       steps between pictures; null for none
    validate_every     steps between validations; null for none
    export_every       steps between bundles; null for one at the end
    loggers            console, tensorboard, wandb; log.jsonl is always written
    wandb_project      of the wandb logger
    wandb_mode         online or offline
    """

    out: str = MISSING
    seed: int = 0
    steps: int = 10000
    init_from: str | None = None

    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    decay: float = 0.2
    min_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float = 0.9999
    ema_warmup: bool = True

    precision: str = "fp32"
    accumulate: int = 1
    parallel: str = "ddp"
    find_unused: bool = False
    checkpoint_blocks: bool = False
    compile: bool = False
    device: str | None = None
    kernels: str = "native"
    conv_backend: str | None = None
    attention_backend: str | None = None
    timeout: float = 10.0
    threads: int | None = None

    save_every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    save_in_background: bool = True
    log_every: int = 50
    sample_every: int | None = None
    validate_every: int | None = None
    export_every: int | None = None
    loggers: list[str] = field(default_factory=lambda: ["console"])
    wandb_project: str = "diff2to3"
    wandb_mode: str = "online"

    def __post_init__(self) -> None:
        for name, choices in (
            ("schedule", tuple(SCHEDULES)),
            ("precision", PRECISIONS),
            ("parallel", PARALLEL),
            ("kernels", ("native", "auto")),
            ("wandb_mode", ("online", "offline")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("steps", "accumulate", "save_every", "log_every", "keep_every", "threads", "timeout"):
            _positive(name, getattr(self, name))
        for name in ("sample_every", "validate_every", "export_every", "clip", "lr"):
            _positive(name, getattr(self, name))
        for name in ("min_lr", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected 0 <= ema < 1, got {self.ema}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.keep < 2:
            raise ValueError(f"keep: expected at least 2 checkpoints, got {self.keep}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected a number of steps, got {self.warmup}")
        for name in self.loggers:
            if name not in LOGGERS:
                raise ValueError(f"loggers: expected some of {', '.join(LOGGERS)}, got {name!r}")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
