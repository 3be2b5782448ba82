"""How a run starts and stops: Accelerate as it was launched, and the signal that a machine is about to be taken."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed

from captioner.cli import UserError

EXIT_PREEMPTED = 75  # "try again later" (EX_TEMPFAIL of sysexits.h)


def start_accelerator(*, seed: int, thaws_later: bool = False) -> Accelerator:
    """Accelerate as it was launched. Raises UserError when it was not launched as the environment announced.

    `thaws_later` says that parameters will begin to learn in the middle of the run.
    """
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=thaws_later)])
    # `accelerate launch --cpu --num_processes N` sets MASTER_ADDR, announces nothing else, and starts one process
    announced = os.environ.get("WORLD_SIZE", "several" if "MASTER_ADDR" in os.environ else "1")
    if announced != str(accelerator.num_processes):
        raise UserError(
            f"the environment announces {announced} processes (WORLD_SIZE, MASTER_ADDR), but Accelerate sees "
            f"{accelerator.num_processes}: on a machine without GPUs start several with ACCELERATE_USE_CPU=true "
            "torchrun --nproc_per_node N train/main.py; unset both variables to train with one"
        )
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves a lone CPU process one thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    set_seed(seed)
    torch.set_float32_matmul_precision("high")
    return accelerator


class Preemption:
    """SIGTERM, which schedulers send before they take a machine away: ends the run with code 75, resumable.

    Between steps the loop asks `requested`, saves and calls `leave`; everywhere else the signal ends the process at
    once, since what was last saved is all there is.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the signal only sets `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested:  # since the last step, which was saved
            self.leave()

    def leave(self) -> None:
        """End the process."""
        print("stopped by SIGTERM: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            self.leave()
