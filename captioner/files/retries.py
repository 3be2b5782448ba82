"""Requests to servers, retried after failures that may pass; the log has one line a minute about them."""

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from captioner.errors import UserError

PATIENCE_SECONDS = 20.0
FIRST_PAUSE_SECONDS = 0.3  # upper bound of the first random pause; each next bound is twice as long
LONGEST_PAUSE_SECONDS = 10.0
LOG_SECONDS = 60.0  # between two lines of a process
ANSWERS = (FileNotFoundError, FileExistsError)
FINAL = (*ANSWERS, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError, ValueError)
NO_CREDENTIALS = frozenset(("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"))  # botocore's
UNAUTHORIZED = 401

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class StorageError(UserError, OSError):
    """A server failed, or cannot be used; retrying did not help."""


class RefusedError(StorageError):
    """The server works, but refuses this request for this file."""


def retry(action: Callable[[], Result], location: str, patience_seconds: float | None = None) -> Result:
    """The result of `action`, a request for `location`, which is repeated while it fails for reasons that may pass.

    It is repeated for `patience_seconds` (PATIENCE_SECONDS by default), and at least once. Raises FileNotFoundError and
    FileExistsError as they are, and any other failure as StorageError.
    """
    patience = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    attempts = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(2) & stop_after_delay(patience),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS),
        before_sleep=partial(_log_failure, location, patience),
        reraise=True,
    )
    try:
        return attempts(action)
    except ANSWERS:
        raise
    except Exception as error:  # each filesystem has its own errors: aiohttp's, botocore's, TimeoutError
        status = _status(error)
        is_refusal = isinstance(error, ValueError) or (is_refused(status) and status != UNAUTHORIZED)
        message = f"{location}: {type(error).__name__} {' '.join(str(error).split())}".rstrip()
        raise (RefusedError if is_refusal else StorageError)(message) from error


def _log_failure(location: str, patience_seconds: float, state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    message = "process %d: failed requests: %s; last %s: retried for up to %.0f s"
    log.warning(message, os.getpid(), _kind(error), location, patience_seconds)


def is_refused(status: object) -> bool:
    """Whether a web server's status says that repeating the request will not help."""
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


def _may_pass(error: BaseException) -> bool:
    is_final = isinstance(error, FINAL) or type(error).__name__ in NO_CREDENTIALS or is_refused(_status(error))
    return isinstance(error, Exception) and not is_final


def _status(error: BaseException) -> Any:
    return getattr(error, "status", None)  # aiohttp's


def _kind(error: BaseException | None) -> str:
    """The status of a server's answer, else the class of the error that s3fs and botocore have wrapped."""
    while isinstance(
        reason := getattr(error, "__cause__", None) or getattr(error, "kwargs", {}).get("error"), Exception
    ):
        error = reason
    answer = getattr(error, "response", None)  # botocore's
    metadata = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
    status = getattr(error, "status", None) or metadata.get("HTTPStatusCode")
    return f"status {status}" if status else type(error).__name__


class RateLimit(logging.Filter):
    """Passes one record about failed requests a minute, with the number of each kind of failure since the last one."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record, whose second argument, a kind of failure, becomes a list of kinds."""
        if self._pid != os.getpid():  # forked, perhaps while another thread held the lock
            self.__init__()
        process, kind, *others = record.args or ()
        with self._lock:
            self._failures[str(kind)] += 1
            if time.monotonic() - self._last < LOG_SECONDS:
                return False
            self._last = time.monotonic()
            kinds = ", ".join(f"{number} x {kind}" for kind, number in self._failures.most_common())
            self._failures.clear()
        record.args = (process, kinds, *others)
        return True


log.addFilter(RateLimit())
