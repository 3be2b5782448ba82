"""The steps of one epoch: progress, curves, checkpoints, and the look at losses that were left on the device.

Shapes: S steps since the last look.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from captioner import cli
from captioner.streaming import StreamingLoader
from train.data.batches import Batch
from train.run.launch import Preemption
from train.run.tracking import Tracker
from train.step.step import StepLoss, check_finite

LOG_STEPS = 10
ASK_SECONDS = 5.0  # longest time between agreements on stopping, or one step if that takes longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What all ranks' steps brought: their loss, images, cut captions, seconds, and the share of them spent waiting."""

    loss: StepLoss = field(default_factory=partial(StepLoss, 0.0, 0))
    num_images: int = 0
    num_cut: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0

    def __add__(self, other: "Reading") -> "Reading":
        loss = StepLoss(self.loss.loss_sum + other.loss.loss_sum, self.loss.num_targets + other.loss.num_targets)
        return Reading(
            loss=loss,
            num_images=self.num_images + other.num_images,
            num_cut=self.num_cut + other.num_cut,
            seconds=self.seconds + other.seconds,
            waiting_seconds=self.waiting_seconds + other.waiting_seconds,
        )

    def __str__(self) -> str:
        return f"{self.loss}, {self.seconds:.1f} s, {self.num_cut:,} captions cut"

    def values(self) -> dict[str, float]:
        """By the names of the curves."""
        found = {
            "train/loss": self.loss.per_token,
            "train/perplexity": self.loss.perplexity,
            "train/tokens_per_second": self.loss.num_targets / self.seconds,
            "train/images_per_second": self.num_images / self.seconds,
            "train/waiting_share": self.waiting_seconds / self.seconds,
        }
        if torch.cuda.is_initialized():  # a run on the CPU does not load it
            found["train/gpu_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        return found


@dataclass(kw_only=True)
class Meter:
    """The steps since the last reading. Their losses stay on the device until then, so that it never waits for them."""

    accelerator: Accelerator
    records: list[Tensor] = field(default_factory=list)
    num_images: int = 0
    num_cut: int = 0
    waiting_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def add(self, record: Tensor, parts: Sequence[Batch], *, waiting_seconds: float) -> None:
        """Count a step."""
        self.records.append(record)
        self.num_images += sum(part.num_samples for part in parts)
        self.num_cut += sum(part.num_cut for part in parts)
        self.waiting_seconds += waiting_seconds

    def read(self, *, last_step: int) -> Reading:
        """What all ranks' steps brought; all ranks must call it. Raises UserError for a loss that is not a number."""
        records_S3 = torch.stack(self.records)
        own = [float(self.num_images), float(self.num_cut), self.waiting_seconds]
        sums = torch.cat((records_S3[:, :2].flatten(), torch.tensor(own, device=records_S3.device)))
        sums = self.accelerator.reduce(sums, reduction="sum").cpu()
        records_S3 = torch.cat((sums[:-3].view(-1, 2), records_S3[:, 2:].cpu()), dim=1)
        check_finite(records_S3, last_step=last_step, scaled=self.accelerator.scaler is not None)
        num_images, num_cut, waiting_seconds = sums[-3:].tolist()
        loss_sum, num_targets, _ = records_S3.double().sum(dim=0).tolist()
        return Reading(
            loss=StepLoss(loss_sum, round(num_targets)),
            num_images=round(num_images),
            num_cut=round(num_cut),
            seconds=time.monotonic() - self.started,
            waiting_seconds=waiting_seconds / self.accelerator.num_processes,
        )


@dataclass(kw_only=True)
class Agreement:
    """Agreement of all ranks on whether to stop; all of them vote at the same steps."""

    accelerator: Accelerator
    num_steps: int = 0
    started: float = field(default_factory=time.monotonic)
    steps_until_asked: int = 1

    def wants_stop(self, stop: bool, *, now: bool) -> bool:
        """After a step of all ranks: whether one wants to stop, if this is a step to ask at, or they ask `now`."""
        if self.accelerator.num_processes == 1:
            return stop
        self.num_steps += 1
        if self.num_steps < self.steps_until_asked and not now:
            return False
        own = torch.tensor([float(stop), time.monotonic() - self.started], device=self.accelerator.device)
        stops, seconds = self.accelerator.reduce(own, reduction="sum").tolist()
        fitting = int(ASK_SECONDS * self.num_steps * self.accelerator.num_processes / seconds)
        self.num_steps, self.started, self.steps_until_asked = 0, time.monotonic(), max(1, min(fitting, LOG_STEPS))
        return stops > 0


def train_epoch(
    loader: StreamingLoader,
    take_step: Callable[[Sequence[Batch], int], Tensor],
    *,
    num_epochs: int,
    checkpoint_steps: int,
    schedule: LRScheduler,
    save: Callable[[], None],
    tracker: Tracker,
    stop: Preemption,
    accelerator: Accelerator,
) -> Reading:
    """The optimizer steps of the epoch that the loader stands in, to its end, and what they brought.

    `take_step` gets the parts of this rank's samples of a global batch, and the step's number in the whole run, from 1.
    All ranks read the losses, save and stop at the same steps.
    """
    epoch, epoch_steps = loader.epoch, len(loader)
    before = epoch * epoch_steps
    title, total_steps = f"epoch {epoch + 1} of {num_epochs}", num_epochs * epoch_steps
    meter, total, agreement = Meter(accelerator=accelerator), Reading(), Agreement(accelerator=accelerator)
    quiet, done = not accelerator.is_main_process, before + loader.steps_done
    with cli.progress_bar(title, total=total_steps, unit="steps", quiet=quiet, done=done) as bar:
        for step, (batch, waiting_seconds) in enumerate(timed(loader), start=done + 1):
            num_left = loader.split.num_samples - (step - 1 - before) * loader.batch_size
            parts = batch[:num_left]  # of fewer samples than parts: the others are fillers on all ranks
            meter.add(take_step(parts, step), parts, waiting_seconds=waiting_seconds)
            due = step % checkpoint_steps == 0 or step == before + epoch_steps
            stopping, note = agreement.wants_stop(stop.requested, now=due), ""
            if due or stopping or step % LOG_STEPS == 0:
                reading = meter.read(last_step=step)
                rate = {"epoch": step / epoch_steps, "train/learning_rate": float(schedule.get_last_lr()[0])}
                tracker.log(step, rate | reading.values())
                meter = Meter(accelerator=accelerator)
                total, note = total + reading, str(reading.loss)
            bar.advance(note=note)
            if due or stopping:
                save()
            if stopping:
                stop.leave()
    return total


def timed(batches: Iterable[list[Batch]]) -> Iterator[tuple[list[Batch], float]]:
    """Each batch with the seconds that it was waited for."""
    iterator = iter(batches)
    while True:
        started = time.monotonic()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.monotonic() - started
