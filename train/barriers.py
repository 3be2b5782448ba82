"""Barriers for work that takes one rank longer than the others, without a timeout of the process group."""

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
    """Within, an error on one rank is raised on all: otherwise they would wait for it.

    All ranks must enter; each may take as long as it needs, and none may use the process group inside. Raises the
    UserError or OSError of this rank, or else that of another rank as a UserError.
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
    """The result of `action` in the main process, on all ranks; its UserError or OSError is raised on all."""
    found: list[Any] = [None]
    with raising_on_all_ranks():
        if PartialState().is_main_process:
            found = [action()]
    return broadcast_object_list(found)[0]


@contextmanager
def barrier_for_slow_ranks() -> Iterator[None]:
    """A barrier at the exit; all ranks must enter, and none may use the process group inside.

    A thread of each exchanges a heartbeat every second, so that a slow rank does not count as lost. Raises
    RuntimeError if one is lost: at once if its connection closes, else after the process group's timeout.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    done, left = Event(), Event()
    failures: list[RuntimeError] = []

    def exchange_heartbeats() -> None:
        device = torch.device(state.device or "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        try:
            while not left.is_set():
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
        left.set()
        thread.join(2 * HEARTBEAT_SECONDS)
        raise
    if failures:
        raise failures[0]
