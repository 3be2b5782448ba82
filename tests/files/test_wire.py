"""Packing and streaming over a wire with every fault at random: nothing is lost or repeated, and the log says why."""

import http.client
import os
import random
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import consumer
import pytest
from consumer import Job, finish, seen
from faulty_wire import RETRANSMISSION_SECONDS, STATUSES, Weather, Wire, told_in
from servers import Bucket, use_s3
from tiny import write_coco, write_shards

from captioner.files import retries, storage
from captioner.files.storage import StorageError
from captioner.streaming import cache
from sharding import make_shards
from sharding.settings import ShardSettings

pytestmark = [pytest.mark.slow, pytest.mark.external]

STORM = Weather(latency_seconds=0.003, loss=0.01, reset=0.05, half_open=0.03, status=0.08)
STALL_SECONDS = 1.0
SIZES = (5, 11, 1, 9, 14, 0, 8, 3, 12)
rank_as_it_is = consumer._rank


class Storm(Wire):
    """A wire on which each kind of failure comes to the first turns, and any at random to the others."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, STORM, seed=1)
        self._first = iter([("5xx", 0), ("half-open", 50), ("reset", 50)])

    def fate(self) -> tuple[str, int]:
        return next(self._first, None) or super().fate()


def check_told(log: str, faults: Counter[str]) -> None:
    """The log names what a client cannot but notice, and no more of it than there was."""
    counts = told_in(log)
    assert 1 <= sum(number for kind, number in counts.items() if kind.startswith("status 5")) <= faults["5xx"]
    assert counts["SocketTimeoutError"] >= 1
    assert "retried for up to" in log


# ---- the wire ---------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that says what it hears."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                while data := self.request.recv(65536):
                    self.request.sendall(data)
            except OSError:
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield "http://{}:{}".format(*server.server_address)
        server.shutdown()


def connect(wire: Wire) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(wire.address.rpartition(":")[2])), timeout=0.3)


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += connection.recv(size)
    return data


@pytest.mark.parametrize("weather", [Weather(), Weather(latency_seconds=0.02, loss=0.4)])
def test_what_is_late_comes_whole_and_in_order(echo: str, weather: Weather) -> None:
    with Wire(echo, weather) as wire, connect(wire) as connection:
        connection.settimeout(10)
        started = time.monotonic()
        for number in range(6):
            data = random.Random(number).randbytes(20_000)
            connection.sendall(data)
            assert read(connection, len(data)) == data
        seconds = time.monotonic() - started
    assert (seconds > wire.faults["loss"] * RETRANSMISSION_SECONDS > 0) == (weather.loss > 0)
    assert (wire.faults["latency"] >= 12) == (weather.latency_seconds > 0)
    assert wire.num_requests == 0


def test_a_connection_is_reset_in_the_middle(echo: str) -> None:
    with Wire(echo, Weather(reset=1.0)) as wire, connect(wire) as connection:
        wire.fate = lambda: ("reset", 1500)  # of 1,000 bytes and their echo
        connection.sendall(bytes(1000))
        with pytest.raises(ConnectionResetError):
            read(connection, 1000)
    assert wire.faults == {"reset": 1}


def test_a_half_open_connection_stays_and_is_silent(echo: str) -> None:
    with Wire(echo, Weather(half_open=1.0)) as wire, connect(wire) as connection:
        wire.fate = lambda: ("half-open", 1500)
        connection.sendall(bytes(1000))
        assert read(connection, 500) == bytes(500)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.sendall(bytes(100_000))
    assert wire.faults == {"half-open": 1}


def test_a_request_is_answered_with_a_status_and_goes_no_further(nginx: tuple[str, Path]) -> None:
    address, root = nginx
    (root / "x").write_bytes(b"123")
    with Wire(address, Weather(status=1.0)) as wire:
        client = http.client.HTTPConnection(wire.address.removeprefix("http://"), timeout=10)
        client.request("GET", "/x")
        assert client.getresponse().status in STATUSES
        wire.weather = Weather()
        client.request("GET", "/x")
        assert client.getresponse().read() == b"123"
        client.close()
    assert wire.faults == {"5xx": 1}
    assert wire.num_requests == 2


# ---- waits are bounded --------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short timeouts, and every failure logged."""
    monkeypatch.setattr(storage, "STALL_SECONDS", STALL_SECONDS)
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(retries, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(retries.log, "filters", [retries.RateLimit()])  # without what other tests left unlogged


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("num_bytes", [0, 100, 200_000], ids=["at once", "in the head", "in the body"])
def test_an_upload_over_a_half_open_connection_ends_soon(
    bucket: Bucket, s3: str, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time limit as a whole is 52 seconds."""
    with Wire(s3, Weather()) as wire, use_s3(wire.address):
        assert not storage.exists(f"s3://{bucket.name}/x")
        monkeypatch.setattr(retries, "_may_pass", lambda error: False)
        wire.fate = lambda: ("half-open", num_bytes)
        started = time.monotonic()
        with pytest.raises(StorageError):
            storage.write_atomic(f"s3://{bucket.name}/x", bytes(5_000_000))
        assert time.monotonic() - started < 20
    assert wire.faults == {"half-open": 1}


@pytest.mark.usefixtures("hasty")
@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs a system that knows TCP_USER_TIMEOUT")
def test_an_upload_to_a_server_that_takes_nothing_ends_soon(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a machine that is gone: what is sent fills the buffers and is never acknowledged."""
    monkeypatch.setattr(retries, "_may_pass", lambda error: False)
    with socket.create_server(("127.0.0.1", 0)) as deaf, use_s3(f"http://127.0.0.1:{deaf.getsockname()[1]}"):
        started = time.monotonic()
        with pytest.raises(StorageError):
            storage.write_atomic("s3://bucket/x", bytes(20_000_000))
        assert time.monotonic() - started < 30


# ---- all faults at random -----------------------------------------------------------------------------------


def told_here(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name == retries.log.name)


def pack(source: str, output: str) -> None:
    paths = {"images": source, "captions": f"{source}/annotations", "output": output}
    make_shards.main(ShardSettings(**paths, split="train", size=64, shard_megabytes=1, threshold=1, workers=1))


def test_a_pack_over_a_bad_wire_has_the_same_bytes(
    bucket: Bucket, s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    bucket.put_folder(write_coco(tmp_path, num_train=12, num_val=0), "data")
    pack(f"s3://{bucket.name}/data", f"s3://{bucket.name}/calm")
    assert not told_here(caplog)
    request.getfixturevalue("hasty")  # only now: on a busy machine, a calm wire too can be silent for a second
    started = time.monotonic()
    with Storm(s3) as wire, use_s3(wire.address):
        pack(f"s3://{bucket.name}/data", f"s3://{bucket.name}/stormy")
    assert time.monotonic() - started < 60
    assert bucket.read_all("stormy") == bucket.read_all("calm")
    assert {"latency", "reset", "half-open", "5xx"} <= set(wire.faults)
    check_told(told_here(caplog), wire.faults)


def hasty_rank(job: Job, *arguments: Any) -> None:
    """A rank with little patience, and its log in a file."""
    storage.STALL_SECONDS, retries.FIRST_PAUSE_SECONDS, retries.LOG_SECONDS = STALL_SECONDS, 0.02, 0.0
    cache.CHUNK_BYTES = 8192
    os.dup2(os.open(f"{job.run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    rank_as_it_is(job, *arguments)


@pytest.mark.parametrize("store", ["s3", "nginx"])
def test_two_ranks_stream_each_sample_once_over_a_bad_wire(
    store: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs, with a worker each; the ranks themselves compare their ledgers with the plan."""
    monkeypatch.setattr(consumer, "_rank", hasty_rank)
    if store == "s3":
        bucket, upstream = request.getfixturevalue("bucket"), request.getfixturevalue("s3")
        bucket.put_folder(Path(write_shards(tmp_path / "shards", SIZES)), "shards")
        folder = f"s3://{bucket.name}/shards"
    else:
        upstream, root = request.getfixturevalue("nginx")
        write_shards(root / "shards", SIZES)
        folder = "{}/shards"
    run = tmp_path / "run"
    with Storm(upstream) as wire, use_s3(wire.address):
        shards = (folder.format(wire.address),)
        finish(Job(shards=shards, run=run, epochs=2, workers=1, cache=tmp_path / "cache"), world_size=2)
    for epoch in range(2):
        rows = [row for row in seen(run) if row.epoch == epoch]
        assert sorted(place for row in rows for place in row.positions) == list(range(sum(SIZES)))
        assert len({key for row in rows for key in row.keys}) == sum(SIZES)
    assert {"latency", "reset", "half-open", "5xx"} <= set(wire.faults)
    check_told((tmp_path / "run.log").read_text(), wire.faults)
