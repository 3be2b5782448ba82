"""What servers fail at, logged in few lines: the first failure of a process at once, then one line a minute."""

import logging
import math
import os
import threading
import time
from collections import Counter

QUIET_SECONDS = 60.0  # between two lines about failures
MOST_SERVERS = 1000  # that are remembered
OUTAGE_SECONDS = 10.0  # of failures alone; then it is told when the server answers again

log = logging.getLogger(__name__)


class Troubles:
    """What goes wrong between this process and servers, in few lines: the first failure at once, then one a minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()  # by kind, not told yet
        self._told = -math.inf
        self._answered: dict[str, float] = {}  # when each server last did
        self._failing: dict[str, float] = {}  # since when each has done nothing else

    def failed(self, location: str, error: Exception, *, asked: float, action: str) -> None:
        """Note a failure of what was asked at that time, and tell of it or leave it for later."""
        now, server = time.monotonic(), _server(location)
        with self._lock:
            self._failing.setdefault(server, max(asked, self._answered.get(server, asked)))
            self._failures[_name_of(error)] += 1
            if now - self._told < QUIET_SECONDS:
                return
            kinds = ", ".join(f"{number} x {kind}" for kind, number in self._failures.most_common())
            span = "" if self._told == -math.inf else f" in {now - self._told:.0f} s"
            self._failures.clear()
            self._told = now
        log.warning("process %d: failed requests%s: %s; last %s: %s", os.getpid(), span, kinds, location, action)

    def answered(self, location: str) -> None:
        """Note that a server does what it is asked, and tell so when it had not for long."""
        now, server = time.monotonic(), _server(location)
        with self._lock:
            if len(self._answered) > MOST_SERVERS:
                self._answered.clear()
            self._answered[server] = now
            seconds = now - self._failing.pop(server, now)
        if seconds > OUTAGE_SECONDS:
            log.warning("process %d: %s answers again, after %.0f s of failures", os.getpid(), server, seconds)


_of_process: dict[int, Troubles] = {}  # by process, for a forked one has neither these failures nor this lock


def _own() -> Troubles:
    return _of_process.get(os.getpid()) or _of_process.setdefault(os.getpid(), Troubles())


def failed(location: str, error: Exception, *, asked: float, action: str) -> None:
    """Note a failure of what was asked at a time (monotonic), and what is done about it."""
    _own().failed(location, error, asked=asked, action=action)


def answered(location: str) -> None:
    """Note that a server does what it is asked."""
    _own().answered(location)


def _server(location: str) -> str:
    return "/".join(location.split("/", 3)[:3])


def _name_of(error: BaseException) -> str:
    """A failure's kind: the status of an answer, else the class of the error below those of s3fs and botocore."""
    while isinstance(reason := error.__cause__ or getattr(error, "kwargs", {}).get("error"), Exception):
        error = reason
    answer = getattr(error, "response", None)  # botocore's
    facts = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    status = getattr(error, "status", None) or facts.get("HTTPStatusCode")
    return f"status {status}" if status else type(error).__name__
