"""What the processes of a job do side by side, however long it takes one of them: a slow one is no lost one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils import reduce as sum_over_ranks

from captioner.cli import UserError

LOOK_SECONDS = 1.0  # far below any timeout of the process group

Outcome = TypeVar("Outcome")


def in_all(action: Callable[[], Outcome]) -> list[Outcome]:
    """What `action` returns in each process, by rank, in all of them; all must call it, and it may take unequal time.

    It must not use the process group. A UserError or OSError that it raises in one process is raised in all.
    """
    with waiting_for_all():
        outcome = _attempt(action)
    outcomes = gather_object([outcome])
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def in_main(action: Callable[[], Outcome]) -> Outcome:
    """What the main process's `action` returns, or the error that it raises, in all processes."""
    is_main = PartialState().is_main_process
    found: Any = in_all(lambda: action() if is_main else None)
    return found[0]


def in_main_of_each_machine_first(action: Callable[[], None]) -> None:
    """Run `action` in all processes: first in one of each machine, for the others to find what it leaves there."""
    is_first = PartialState().is_local_main_process
    in_all(lambda: action() if is_first else None)
    in_all(lambda: None if is_first else action())


def _attempt(action: Callable[[], Outcome]) -> tuple[Outcome | None, Exception | None]:
    try:
        return action(), None
    except (UserError, OSError) as error:
        return None, error


@contextmanager
def waiting_for_all() -> Iterator[None]:
    """Return from within when all processes do; all must enter it, and none may use the process group within.

    Every second they tell each other, in a thread, that they are alive, so that none takes a slow one for lost. Raises
    RuntimeError when one is: where it is known at once (a closed connection), else after the group's timeout.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    done, left = Event(), Event()
    failures: list[RuntimeError] = []

    def look() -> None:
        device = torch.device(state.device or "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        try:
            while not left.is_set():
                num_done = sum_over_ranks(torch.tensor(float(done.is_set()), device=device), reduction="sum")
                if int(num_done.item()) == state.num_processes:
                    return
                done.wait(LOOK_SECONDS)
        except RuntimeError as error:
            failures.append(error)

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
        done.set()
        thread.join()
    except BaseException:
        left.set()
        thread.join(2 * LOOK_SECONDS)
        raise
    if failures:
        raise failures[0]
