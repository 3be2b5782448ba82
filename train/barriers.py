"""Barriers that wait for a slow rank as long as it lives, beyond the timeout of the process group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import reduce as sum_over_ranks

from captioner.errors import UserError

HEARTBEAT_SECONDS = 1.0  # far below any timeout of the process group

Outcome = TypeVar("Outcome")


@contextmanager
def raising_on_all_ranks() -> Iterator[None]:
    """Raise an error in the block of one rank on all ranks, which would otherwise wait for that rank.

    All ranks must enter; each may take as long as it needs, and none may use the process group in the block. Raises
    this rank's own UserError or OSError, or else another rank's, as a UserError.
    """
    failure = None
    with barrier_for_slow_ranks():
        try:
            yield
        except (UserError, OSError) as error:
            failure = error
    sent = failure if failure is None or isinstance(failure, UserError) else UserError(str(failure))
    failures = [error for error in gather_object([sent]) if error]
    if failure:
        raise failure
    if failures:
        raise failures[0]


def on_main_rank(action: Callable[[], Outcome]) -> Outcome:
    """Call `action` in the main process; returns its result, or raises its UserError or OSError, on all ranks."""
    result: list[Any] = [None]
    with raising_on_all_ranks():
        if PartialState().is_main_process:
            result = [action()]
    return broadcast_object_list(result)[0]


@contextmanager
def barrier_for_slow_ranks() -> Iterator[None]:
    """A barrier at the end of the block. All ranks must enter it, and none may use the process group in it.

    In each rank a thread exchanges heartbeats every second, so that the process group does not time out. Raises
    RuntimeError if a rank is lost: at once if its connection closes, else after the process group's timeout.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    done, failed = Event(), Event()
    failures: list[RuntimeError] = []

    def exchange_heartbeats() -> None:
        device = torch.device(state.device or "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread is on device 0
        try:
            while not failed.is_set():
                num_done = sum_over_ranks(torch.tensor(float(done.is_set()), device=device), reduction="sum")
                if int(num_done.item()) == state.num_processes:
                    return
                done.wait(HEARTBEAT_SECONDS)
        except RuntimeError as error:
            failures.append(error)

    thread = Thread(target=exchange_heartbeats, daemon=True)
    thread.start()
    try:
        yield
        done.set()
        thread.join()
    except BaseException:
        failed.set()
        thread.join(2 * HEARTBEAT_SECONDS)
        raise
    if failures:
        raise failures[0]
