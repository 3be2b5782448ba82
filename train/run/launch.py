"""How a job starts and stops: Accelerate as it was launched, preemption by SIGTERM, and lost processes."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import set_seed
from torch.distributed import DistNetworkError, DistStoreError

from captioner.errors import EXIT_PREEMPTED, UserError
from captioner.peers import peer_timeout
from captioner.workers import count_processors

PRECISIONS = ("no", "bf16", "fp16")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")  # what torchrun and `accelerate launch` set
LAUNCHER_POLL_SECONDS = 1.0
LOST_PEER = (
    "gloo/transport/tcp/(pair|buffer|unbound_buffer)|caused pair closure"
    "|ncclRemoteError|Watchdog caught collective operation timeout"
)


def start_accelerator(*, seed: int, thaws_later: bool = False) -> Accelerator:
    """The Accelerator of this launch. Raises UserError when there are fewer processes than the environment announces.

    From now on the end of the launcher counts as SIGTERM. `thaws_later` says that frozen parameters will be trained
    later in the run. Each rank draws its own random numbers; data-parallel training starts with rank 0's weights.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:
        raise UserError(f"--mixed_precision {precision} is not supported: launch with {', '.join(PRECISIONS)}")
    end_with_launcher()
    accelerator = Accelerator(
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=thaws_later),
            InitProcessGroupKwargs(backend=None, timeout=peer_timeout()),
        ]
    )
    # `accelerate launch --cpu --num_processes N` sets MASTER_ADDR, announces nothing else, and starts one process
    announced = os.environ.get("WORLD_SIZE", "several" if "MASTER_ADDR" in os.environ else "1")
    if announced != str(accelerator.num_processes):
        raise UserError(
            f"the environment announces {announced} processes (WORLD_SIZE, MASTER_ADDR), but Accelerate sees "
            f"{accelerator.num_processes}: on a machine without GPUs start several with ACCELERATE_USE_CPU=true "
            "torchrun --nproc_per_node N train/main.py; unset both variables to train with one"
        )
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves a lone CPU process one thread
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))  # set by torchrun
        torch.set_num_threads(max(1, count_processors() // num_local))
    set_seed(seed, device_specific=True)
    torch.set_float32_matmul_precision("high")
    return accelerator


def end_with_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it has died.

    A launcher killed by kill -9 leaves its processes running. A process started without a launcher may outlive its
    parent, as under nohup.
    """
    if any(name in os.environ for name in LAUNCHERS):
        Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_POLL_SECONDS)
    print(f"the launcher (process {launcher}) is gone: this process stops as on SIGTERM", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def ending_without_peers(*, remedy: str) -> Iterator[None]:
    """Within, losing contact with another process of the job exits with code 75 and one line that ends in `remedy`.

    On GPUs NCCL's own watchdog usually notices first, and aborts the process.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        reason = str(error).partition("\n")[0].partition(". This is")[0]  # without gloo's guesses
        print(
            f"lost contact with another process of this job ({reason}): see its log; {remedy}",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_PREEMPTED) from None


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error means that another process is gone or silent. Gloo's are plain RuntimeErrors."""
    if isinstance(error, DistNetworkError | DistStoreError):
        return "failed to listen" not in str(error)  # the port is taken
    return bool(re.search(LOST_PEER, str(error)))


class Preemption:
    """SIGTERM, which schedulers send before they take a machine: ends the run with exit code 75, resumable.

    Between steps the loop reads `requested`, saves and calls `leave`; elsewhere the signal ends the process at once.
    `remedy` says how to continue.
    """

    def __init__(self, *, remedy: Callable[[], str] = str) -> None:
        self.requested = False
        self._remedy = remedy
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
        if self.requested:  # since the last step, after which it was saved
            self.leave()

    def leave(self) -> None:
        """Exit with code 75."""
        print(f"stopped by SIGTERM: {self._remedy()}", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if not self._deferred:
            self.leave()
