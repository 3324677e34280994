"""The training loop, for pretraining and fine-tuning alike. Read `train` from top to bottom."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

from emssl_hf.data.store import Batch
from emssl_hf.engine import checkpoint
from emssl_hf.engine.config import FinetuneConfig, PretrainConfig, TrainConfig
from emssl_hf.engine.optim import absolute_lr, build_optimizer, lr_at, set_lr
from emssl_hf.engine.run_folder import MetricsWriter, RunFolder
from emssl_hf.errors import EmsslError
from emssl_hf.randomness import step_seed

T = TypeVar("T")
C = TypeVar("C", PretrainConfig, FinetuneConfig)


class Job(Protocol):
    """What pretraining and fine-tuning do differently."""

    @property
    def config(self) -> PretrainConfig | FinetuneConfig:
        """The settings of the run."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    depth: int
    """Blocks of the vision transformer, for layer decay."""
    samples: int
    """Training images."""
    data_key: str
    """Says which images these are; a resumed run must have the same."""
    state: dict[str, Any]
    """What else a resumed run needs, as JSON."""

    def batches(self, epoch: int, rank: int, world: int) -> Iterator[Batch]:
        """This process's share of every global batch of the epoch, in order."""

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch on the device, and further figures worth logging."""

    def after_step(self, progress: float) -> None:
        """Called once after every optimizer step."""

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Called on every process after an epoch that is evaluated; figures for metrics.jsonl."""


def train(job: Job, accelerator: Accelerator, folder: RunFolder) -> dict[str, float]:
    """Train `job.model` in place, resuming from the run folder's newest checkpoint; returns the closing figures.

    Raises EmsslError where the loss stops being finite.
    """
    config, optim = job.config.train, job.config.optim
    rank, world = accelerator.process_index, accelerator.num_processes
    steps_per_epoch = job.samples // config.batch_size
    total, warmup = config.epochs * steps_per_epoch, round(optim.warmup_epochs * steps_per_epoch)
    peak = absolute_lr(optim, config.batch_size)

    # Model and optimizer on the device, and where the run stands.
    core = job.model.to(accelerator.device)
    model, wrapped = accelerator.prepare(core, build_optimizer(core, optim, job.depth))
    optimizer = wrapped.optimizer
    done, stored = checkpoint.restore(folder.path, core, optimizer, data=job.data_key)
    job.state.update(stored.get("extra", {}))
    if stored.get("scaler") and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(stored["scaler"])
    _announce(job, accelerator, peak, total, done)
    watch = _Watch(job, accelerator, folder, total, done)

    step = done.step
    for epoch in range(done.epoch, config.epochs):
        core.train()
        for batch in job.batches(epoch, rank, world):
            # One optimizer step: a learning rate, `accumulation` micro-steps, an update.
            lr = lr_at(step, total, warmup, peak, optim.min_lr)
            set_lr(optimizer, lr)
            for number, micro in enumerate(_micro_batches(batch, config.accumulation, accelerator.device)):
                with accelerator.accumulate(model):
                    torch.manual_seed(step_seed(job.config.seed, step * config.accumulation + number, rank))
                    loss, figures = job.loss(model, micro, epoch)
                    accelerator.backward(loss)
                    if optim.clip_grad is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), optim.clip_grad)
                    wrapped.step()
                    wrapped.zero_grad()
                    watch.collect(loss, figures)
            step += 1
            job.after_step(step / total)
            watch.after_step(step, epoch, lr)

        # The epoch's end: figures on held-out images, and a checkpoint.
        last = epoch + 1 == config.epochs
        if config.eval_every and ((epoch + 1) % config.eval_every == 0 or last):
            watch.require_finite(core)
            core.eval()
            with watch.paused():
                watch.log_evaluation(step, epoch, job.evaluate(epoch))
        if config.save_every and ((epoch + 1) % config.save_every == 0 or last):
            watch.require_finite(core)
            with watch.paused():
                _save(job, accelerator, folder, core, optimizer, checkpoint.Progress(epoch + 1, step))
        watch.after_epoch(epoch)
    return watch.close()


def make_accelerator(config: TrainConfig, project: str | os.PathLike[str]) -> Accelerator:
    """The Accelerator of a run: a GPU where there is one, else the CPU; its precision as configured."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    logging.disable_progress_bar()  # the run has its own
    on_cpu = not torch.cuda.is_available()
    precision: str = config.precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # what `accelerate launch` was told
        precision = "bf16" if not on_cpu and torch.cuda.is_bf16_supported() else launched
    if precision == "fp16" and on_cpu:
        raise EmsslError("fp16 needs a GPU: choose --train.precision bf16 or no on the CPU.")
    AcceleratorState._reset_state()  # one session may run several jobs, each with its own precision
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulation,
        log_with=config.tracker,
        project_dir=project,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def is_main_process() -> bool:
    """Whether this process speaks and writes for all."""
    return PartialState().is_main_process


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process alone and give its result to all; its EmsslError is raised on all of them."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except EmsslError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise EmsslError(outcome[1])
    return outcome[0]


def fit_batch(config: C, samples: int, accelerator: Accelerator) -> C:
    """The settings with a batch that these images can fill: a small set gets a smaller one, and a line that says so.

    The learning rate follows by the linear scaling rule. Raises EmsslError where a batch does not divide.
    """
    batch, parts = config.train.batch_size, accelerator.num_processes * config.train.accumulation
    if batch < 1 or batch % parts:
        raise EmsslError(
            f"A batch of {batch} does not divide into {accelerator.num_processes} processes x "
            f"{config.train.accumulation} micro-steps: choose a --train.batch_size that is a multiple of {parts}."
        )
    if samples >= batch:
        return config
    smaller = samples // parts * parts
    if not smaller:
        raise EmsslError(f"There are {samples} training images for {parts} processes x micro-steps: add images.")
    accelerator.print(f"{samples} training images are fewer than a batch of {batch}: the batch is {smaller}")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=smaller))


def _micro_batches(batch: Batch, accumulation: int, device: torch.device) -> Iterator[Batch]:
    size = len(batch.indices) // accumulation
    for start in range(0, size * accumulation, size):
        part = slice(start, start + size)
        tensors = (batch.images, batch.extents, batch.indices, batch.labels)
        images, extents, indices, labels = (tensor[part].to(device, non_blocking=True) for tensor in tensors)
        yield Batch(images, extents, indices, labels, batch.number)


def _announce(job: Job, accelerator: Accelerator, peak: float, total: int, done: checkpoint.Progress) -> None:
    config = job.config.train
    parameters = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    accelerator.print(
        f"{Path(job.config.data.path).name}: {job.samples:,} images, {parameters / 1e6:.1f} M trainable parameters, "
        f"{config.epochs} epochs = {total:,} steps\n"
        f"effective batch {config.batch_size} = {accelerator.num_processes} process(es) x "
        f"{config.batch_size // accelerator.num_processes // config.accumulation} images x {config.accumulation} "
        f"micro-step(s); learning rate {peak:.3g} (base {job.config.optim.base_lr:.3g} x {config.batch_size}/256); "
        f"{accelerator.device.type}, {accelerator.mixed_precision} mixed precision"
    )
    if done.step:
        accelerator.print(f"resuming after epoch {done.epoch}, step {done.step}")


def _save(
    job: Job,
    accelerator: Accelerator,
    folder: RunFolder,
    core: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: checkpoint.Progress,
) -> None:
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        checkpoint.save(
            folder.path,
            core,
            optimizer,
            progress,
            data=job.data_key,
            keep=job.config.train.keep,
            scaler=scaler,
            extra=job.state,
        )
    accelerator.wait_for_everyone()


class _Watch:
    """Progress bar, metrics.jsonl and trackers; the loss is read from the device only when a line is written."""

    def __init__(
        self, job: Job, accelerator: Accelerator, folder: RunFolder, total: int, done: checkpoint.Progress
    ) -> None:
        self.job, self.accelerator, self.config = job, accelerator, job.config.train
        main = accelerator.is_main_process
        self.writer = MetricsWriter(folder.path, done.step) if main else None
        quiet = os.environ.get("EMSSL_QUIET") == "1" or not main
        self.lines = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total * self.config.batch_size,
            initial=done.step * self.config.batch_size,
            unit="img",
            unit_scale=True,
            disable=quiet or self.lines,
            smoothing=0.1,
        )
        self.log_every = max(1, min(self.config.log_every, total // self.config.epochs))  # one line an epoch at least
        self.sums: dict[str, Tensor] = {}
        self.micro_steps = 0
        self.images = 0
        self.began = self.since = time.perf_counter()
        kept = self.writer.kept if self.writer else []
        self.before: float = kept[-1]["seconds"] if kept else 0.0
        self.last: dict[str, Any] = next(
            (line for line in reversed(kept) if line["kind"] == "train"), {"loss": math.nan}
        )
        self.now = (done.step, done.epoch, 0.0)

    def collect(self, loss: Tensor, figures: dict[str, Tensor]) -> None:
        for name, value in {"loss": loss, **figures}.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_steps += 1

    def after_step(self, step: int, epoch: int, lr: float) -> None:
        self.images += self.config.batch_size
        self.bar.update(self.config.batch_size)
        self.now = (step, epoch, lr)
        if step % self.log_every == 0:
            self.write_line(step, epoch, lr)

    def write_line(self, step: int, epoch: int, lr: float) -> None:
        values = self.means()
        seconds = time.perf_counter() - self.since
        line = {"kind": "train", "step": step, "epoch": epoch + 1, "lr": lr, **values}
        self.log({**line, "images_per_s": self.images / seconds, "seconds": self.elapsed()}, step)
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.images, self.since = 0, time.perf_counter()
        self.last = line
        if not math.isfinite(values["loss"]):
            raise EmsslError(
                f"The loss became {values['loss']} at step {step}: lower --optim.base_lr or set --optim.clip_grad 1. "
                "Earlier checkpoints are good."
            )

    def means(self) -> dict[str, float]:
        """Means over micro-steps and processes since the last line."""
        names = list(self.sums)
        stacked = torch.stack([self.sums[name] for name in names]) / self.micro_steps
        reduced = self.accelerator.reduce(stacked, "mean").tolist()
        self.sums, self.micro_steps = {}, 0
        return dict(zip(names, reduced, strict=True))

    def require_finite(self, model: nn.Module) -> None:
        """No checkpoint of a run that went wrong since the last line of metrics, be it in the last update."""
        values = [*model.parameters(), *([self.sums["loss"]] if self.sums else [])]
        if not bool(torch.stack([value.detach().isfinite().all() for value in values]).all()):
            raise EmsslError("The loss is not finite: lower --optim.base_lr. Earlier checkpoints are good.")

    def log_evaluation(self, step: int, epoch: int, values: dict[str, float]) -> None:
        if values:
            self.log({"kind": "eval", "step": step, "epoch": epoch + 1, **values, "seconds": self.elapsed()}, step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count in images per second."""
        pause = time.perf_counter()
        yield
        self.since += time.perf_counter() - pause

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return round(self.before + time.perf_counter() - self.began, 3)

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.writer is not None:
            self.writer.write(values)
        if self.config.tracker:
            self.accelerator.log({key: value for key, value in values.items() if key != "kind"}, step=step)

    def after_epoch(self, epoch: int) -> None:
        if self.lines and (epoch + 1) % max(1, self.config.epochs // 20) == 0:
            print(
                f"epoch {epoch + 1}/{self.config.epochs}: loss {self.last['loss']:.4f}, {self.elapsed():.0f} s",
                flush=True,
            )

    def close(self) -> dict[str, float]:
        """The closing figures; steps since the last line of metrics get one more."""
        if self.micro_steps:
            self.write_line(*self.now)
        self.bar.close()
        return {"seconds": self.elapsed(), "loss": self.last["loss"]}
