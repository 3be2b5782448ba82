"""What the processes of a job do side by side, however long it takes one of them: a slow one is no lost one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import reduce as sum_over_ranks

from captioner.cli import UserError

LOOK_SECONDS = 1.0  # far below any timeout of the process group

Outcome = TypeVar("Outcome")


@contextmanager
def refused_together() -> Iterator[None]:
    """Within, what one process refuses is refused by all, with its words: otherwise they would wait for it.

    All processes must enter, each may take its time, and within none may wait for another. Raises the UserError or
    OSError of this process, and UserError for that of another one.
    """
    failure = None
    with waiting_for_all():
        try:
            yield
        except (UserError, OSError) as error:
            failure = error
    failures = [text for text in gather_object([str(failure) if failure else None]) if text]
    if failure:
        raise failure
    if failures:
        raise UserError(failures[0])


def in_main(action: Callable[[], Outcome]) -> Outcome:
    """What the main process's `action` returns, in all processes; its UserError or OSError is raised in all."""
    found: list[Any] = [None]
    with refused_together():
        if PartialState().is_main_process:
            found = [action()]
    return broadcast_object_list(found)[0]


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
