"""Requests that fail: what is retried and for how long, and what the log says."""

import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import pytest

from captioner.errors import UserError
from captioner.files import retries
from captioner.files.retries import RefusedError, StorageError, retry


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retries.log, "filters", [retries.RateLimit()])


class StatusError(Exception):
    """A status, as aiohttp raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def failing(errors: Iterable[Exception]) -> tuple[Callable[[], str], list[int]]:
    """A request that raises these errors, then succeeds; and a list with an item for each attempt."""
    calls: list[int] = []
    remaining = iter(errors)

    def action() -> str:
        calls.append(1)
        for error in remaining:
            raise error
        return "done"

    return action, calls


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"),
        TimeoutError(),
        ConnectionResetError(),
        RuntimeError("two\nlines"),
        *map(StatusError, (429, 500, 503)),
    ],
)
def test_a_failure_that_may_pass_is_retried_until_patience_ends(error: Exception) -> None:
    action, calls = failing([error] * 6)
    assert retry(action, "s3://b/x") == "done"
    assert len(calls) == 7
    action, calls = failing(itertools.repeat(error))
    started = time.monotonic()
    with pytest.raises(StorageError, match="s3://b/x: ") as caught:
        retry(action, "s3://b/x", 0.2)
    assert 0.2 <= time.monotonic() - started < 2
    assert len(calls) > 2
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("x"), FileNotFoundError),
        (FileExistsError("x"), FileExistsError),
        *((error, StorageError) for error in (PermissionError("x"), NotImplementedError(), StatusError(401))),
        *((error, RefusedError) for error in (ValueError("x"), StatusError(400), StatusError(403))),
    ],
)
def test_a_refusal_is_final(error: Exception, expected: type[Exception]) -> None:
    action, calls = failing([error])
    with pytest.raises(expected) as caught:
        retry(action, "s3://b/x")
    assert type(caught.value) is expected
    assert len(calls) == 1


def test_a_slow_failure_is_retried_once() -> None:
    action, calls = failing(itertools.repeat(OSError("x")))
    with pytest.raises(StorageError):
        retry(action, "s3://b/x", 0.0)
    assert len(calls) == 2


def test_the_first_failure_is_logged_at_once_and_then_one_line_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry(failing([StatusError(503), *[TimeoutError()] * 7])[0], "s3://b/x")
    monkeypatch.setattr(retries, "LOG_SECONDS", 0.0)
    retry(failing([StatusError(503)])[0], "s3://b/y")
    start = f"process {os.getpid()}: failed requests"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"{start}: 1 x status 503; last s3://b/x: retried for up to 20 s"),
        ("WARNING", f"{start}: 7 x TimeoutError, 1 x status 503; last s3://b/y: retried for up to 20 s"),
    ]


def test_answers_are_not_logged_as_failures(caplog: pytest.LogCaptureFixture) -> None:
    retry(failing([])[0], "s3://b/x")
    for error in (FileNotFoundError("x"), StatusError(403), PermissionError("x")):
        with suppress(OSError):
            retry(failing([error])[0], "s3://b/x")
    assert not caplog.records


def test_a_process_forked_while_a_thread_logs_does_not_wait_for_it() -> None:
    limit = retries.RateLimit()
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%d %s", (1, "OSError"), None)
    with limit._lock:
        child = multiprocessing.get_context("fork").Process(target=limit.filter, args=(record,))
        child.start()
        child.join(10)
    assert child.exitcode == 0
