"""Time that a busy machine does not change much."""

import time
from collections.abc import Callable


def cpu_seconds(action: Callable[[], object], *, num_tries: int = 3) -> float:
    """The least CPU time of this process that a call of `action` takes, of several."""

    def measure() -> float:
        started = time.process_time()
        action()
        return time.process_time() - started

    return min(measure() for _ in range(num_tries))
