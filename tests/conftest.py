"""Tests run beside each other on small machines: one torch thread is as fast for tiny models, and repeatable."""

import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from uuid import uuid4

import pytest
from browser import Browser, run_chromium
from servers import Bucket, run_nginx, run_s3, use_s3

os.environ.setdefault("OMP_NUM_THREADS", "1")

# All processes of a pytest process are forked from one server, which imports this whichever test starts it.
forkserver.set_forkserver_preload(["torch", "accelerate", "train.main", "infer.main", "sharding.make_shards"])
forkserver.set_forkserver_preload = lambda modules_names: None

SERVERS = {"s3", "nginx", "chromium", "controller"}  # fixtures that start other programs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use one of `SERVERS`, or name one as a parameter, as external."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = {*getattr(item, "fixturenames", ()), *(value for value in parameters if isinstance(value, str))}
        if SERVERS & names:
            item.add_marker(pytest.mark.external)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server."""
    with run_s3() as address:
        yield address


@pytest.fixture
def bucket(s3: str) -> Iterator[Bucket]:
    """An empty bucket that `s3://` leads to, also in the processes that the test starts."""
    with use_s3(s3):
        yield Bucket(s3, f"test-{uuid4()}")


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a web server and the folder that it serves, empty at first."""
    root = tmp_path_factory.mktemp("web")
    with run_nginx(root, root.parent / f"{root.name}-nginx") as address:
        yield address, root


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with one tab."""
    with run_chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser without any trace of earlier tests; what a page complains of fails the test."""
    chromium.problems.clear()
    yield chromium
    chromium.call("Emulation.setEmulatedMedia", features=[])
    chromium.call("Emulation.clearDeviceMetricsOverride")
    chromium.run("localStorage.clear()")
    assert chromium.problems == []
