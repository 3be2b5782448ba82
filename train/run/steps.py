"""The optimizer steps of an epoch: progress, curves, checkpoints, and losses that stay on the device for some steps.

Shapes: S steps since the losses were last read.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from captioner import cli
from captioner.streaming import StreamingLoader
from train.data.batches import CaptionBatch
from train.run.launch import Preemption
from train.run.tracking import Tracker
from train.step.step import StepLoss, TrainStep, check_finite

LOG_STEPS = 10
VOTE_SECONDS = 5.0  # longest time between votes on stopping, or one step if that takes longer


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Sums over steps of all ranks; of the `seconds`, `data_seconds` were spent waiting for data.

    `total` is the sum of `quantity` over `count`: cross-entropy over target tokens, or scores over samples.
    """

    quantity: str
    total: float = 0.0
    count: int = 0
    num_images: int = 0
    num_cut: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def __add__(self, other: "StepMetrics") -> "StepMetrics":
        pairs = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        return StepMetrics(other.quantity, *(a + b for a, b in pairs))

    def __str__(self) -> str:
        return f"{self.mean}, {self.seconds:.1f} s, {self.num_cut:,} captions cut"

    @property
    def mean(self) -> str:
        """The mean of the quantity, in words."""
        if self.quantity == "loss":
            return str(StepLoss(self.total, self.count))
        return f"{self.quantity} {self.total / max(1, self.count):.3f}"

    def curves(self) -> dict[str, float]:
        """The values by the names of their curves."""
        found = {
            "train/images_per_second": self.num_images / self.seconds,
            "train/waiting_share": self.data_seconds / self.seconds,
        }
        if self.quantity == "loss":
            loss = StepLoss(self.total, self.count)
            found |= {"train/loss": loss.per_token, "train/perplexity": loss.perplexity}
            found["train/tokens_per_second"] = self.count / self.seconds
        else:
            found[f"train/{self.quantity}"] = self.total / max(1, self.count)
        if torch.cuda.is_initialized():  # a run on the CPU does not load it
            found["train/gpu_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        return found


class MetricsWindow:
    """This rank's steps since the metrics were last read; their losses stay on the device, so that no step waits."""

    def __init__(self, accelerator: Accelerator, quantity: str) -> None:
        self._accelerator, self._quantity = accelerator, quantity
        self._records: list[Tensor] = []
        self._counts = np.zeros(3)  # images, cut captions, seconds waiting for data
        self._started = time.monotonic()

    def add(self, record: Tensor, micro_batches: Sequence[CaptionBatch], *, data_seconds: float) -> None:
        """Count a step with its `TrainStep` record."""
        self._records.append(record)
        num_images = sum(batch.num_samples for batch in micro_batches)
        num_cut = sum(batch.num_cut for batch in micro_batches)
        self._counts += (num_images, num_cut, data_seconds)

    def reduce(self, *, last_step: int) -> StepMetrics:
        """The metrics of all ranks' steps; all ranks must call it. Raises UserError for a loss that is not finite."""
        records_S3 = torch.stack(self._records)
        counts = torch.from_numpy(self._counts).to(records_S3)
        sums = self._accelerator.reduce(torch.cat((records_S3[:, :2].flatten(), counts)), reduction="sum").cpu()
        records_S3 = torch.cat((sums[:-3].view(-1, 2), records_S3[:, 2:].cpu()), dim=1)
        check_finite(records_S3, last_step=last_step, scaled=self._accelerator.scaler is not None)
        num_images, num_cut, data_seconds = sums[-3:].tolist()
        total, count, _ = records_S3.double().sum(dim=0).tolist()
        return StepMetrics(
            self._quantity,
            total,
            round(count),
            round(num_images),
            round(num_cut),
            seconds=time.monotonic() - self._started,
            data_seconds=data_seconds / self._accelerator.num_processes,
        )


@dataclass(kw_only=True)
class StopVote:
    """A vote of all ranks on whether to stop, at the same steps on all of them."""

    accelerator: Accelerator
    num_steps: int = 0
    started: float = field(default_factory=time.monotonic)
    steps_until_vote: int = 1

    def wants_stop(self, stop: bool, *, now: bool) -> bool:
        """Whether a rank wants to stop; False after steps without a vote. With `now` there is one after this step."""
        if self.accelerator.num_processes == 1:
            return stop
        self.num_steps += 1
        if self.num_steps < self.steps_until_vote and not now:
            return False
        own = torch.tensor([float(stop), time.monotonic() - self.started], device=self.accelerator.device)
        stops, seconds = self.accelerator.reduce(own, reduction="sum").tolist()
        fitting = int(VOTE_SECONDS * self.num_steps * self.accelerator.num_processes / seconds)
        self.num_steps, self.started, self.steps_until_vote = 0, time.monotonic(), max(1, min(fitting, LOG_STEPS))
        return stops > 0


def run_epoch(
    loader: StreamingLoader,
    take_step: TrainStep,
    *,
    stop: Preemption,
    tracker: Tracker,
    save: Callable[[], None],
    num_epochs: int,
    checkpoint_steps: int,
) -> StepMetrics:
    """Take the steps of the loader's epoch from its position to the end, and return their metrics.

    All ranks read the losses, save and stop at the same steps.
    """
    accelerator, epoch, epoch_steps = take_step.accelerator, loader.epoch, len(loader)
    before = epoch * epoch_steps
    window, total = MetricsWindow(accelerator, take_step.quantity), StepMetrics(take_step.quantity)
    vote = StopVote(accelerator=accelerator)
    with (
        stop.deferred(),
        cli.progress_bar(
            f"epoch {epoch + 1} of {num_epochs}",
            total=num_epochs * epoch_steps,
            unit="steps",
            quiet=not accelerator.is_main_process,
            done=before + loader.steps_done,
        ) as bar,
    ):
        waiting_since = time.monotonic()
        for step, batches in enumerate(loader, start=before + loader.steps_done + 1):
            data_seconds = time.monotonic() - waiting_since
            num_left = loader.split.num_samples - (step - 1 - before) * loader.batch_size
            micro_batches = batches[:num_left]  # the last global batch may have fewer samples than micro-batches
            window.add(take_step(micro_batches, step), micro_batches, data_seconds=data_seconds)
            due = step % checkpoint_steps == 0 or step == before + epoch_steps
            stopping, note = vote.wants_stop(stop.requested, now=due), ""
            if due or stopping or step % LOG_STEPS == 0:
                metrics = window.reduce(last_step=step)
                rate = float(take_step.schedule.get_last_lr()[0])
                tracker.log(step, {"epoch": step / epoch_steps, "train/learning_rate": rate, **metrics.curves()})
                window = MetricsWindow(accelerator, take_step.quantity)
                total, note = total + metrics, metrics.mean
            bar.advance(note=note)
            if due or stopping:
                save()
            if stopping:
                stop.leave()
            waiting_since = time.monotonic()
    return total
