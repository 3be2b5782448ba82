"""A wire with faults before any TCP server: what happens between machines, and seldom between processes of one."""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 20  # as much is under way at once, so that latency alone does not make the wire slow
RETRANSMISSION_SECONDS = 0.2  # Linux waits at least so long for an acknowledgement
REACH = 5.5  # decimal digits of the bytes after which a connection fails: from in mid-request to far in an answer
STATUSES = (500, 502, 503, 504)
TOLD = re.compile(r"^process \d+: failed requests[^:]*: (.*?); last ", re.MULTILINE)
REQUEST = re.compile(rb"[A-Z]+ \S+ HTTP/1\.[01]\r\n")


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How often which fault comes. A turn is what a client says after it was answered: over HTTP, a request."""

    latency_seconds: float = 0.0
    """By which each chunk is late, both ways, on average; at most twice as much."""
    loss: float = 0.0
    """Share of chunks that come a retransmission later, which doubles when it is lost too; their order is kept."""
    reset: float = 0.0
    """Share of turns some bytes after whose beginning both connections are reset (RST)."""
    half_open: float = 0.0
    """Share of turns some bytes after whose beginning nothing comes through, though both connections stay open."""
    status: float = 0.0
    """Share of HTTP requests that are answered with one of STATUSES and go no further."""


class Wire:
    """Leads from `address` to an HTTP or other TCP server; `weather` may be changed at any time.

    `faults` counts what was done, by kind: "latency" and "loss" in chunks, "reset", "half-open", "5xx". `num_requests`
    counts HTTP requests. One seed gives one sequence of draws, but which connection meets which depends on time.
    """

    def __init__(self, upstream: str, weather: Weather, *, seed: int = 0) -> None:
        place = urlsplit(upstream)
        self._upstream = (place.hostname, place.port)
        self.weather = weather
        self.faults: Counter[str] = Counter()
        self.num_requests = 0
        self._rng = random.Random(seed)
        self._clients: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "Wire":
        self._thread.start()
        serving = asyncio.start_server(self._serve, sock=self._socket, limit=CHUNK_BYTES)
        asyncio.run_coroutine_threadsafe(serving, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._socket.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for writer in self._clients:
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, until an end of it is closed."""
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._upstream, limit=CHUNK_BYTES)
        except OSError:
            _reset(writer)
            return
        self._clients.add(writer)
        link = _Link(self, client=writer, server=server_writer)
        ways = [
            asyncio.ensure_future(link.carry(reader, server_writer, asks=True)),
            asyncio.ensure_future(link.carry(server_reader, writer, asks=False)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        self._clients.remove(writer)
        writer.close()
        server_writer.close()

    def lateness_seconds(self) -> float:
        """Of the next chunk."""
        late = 0.0
        if self.weather.latency_seconds:
            self.faults["latency"] += 1
            late = self._rng.uniform(0, 2 * self.weather.latency_seconds)
        wait = RETRANSMISSION_SECONDS
        while self._rng.random() < self.weather.loss:
            self.faults["loss"] += 1
            late += wait
            wait *= 2
        return late

    def fate(self) -> tuple[str, int]:
        """What becomes of the next turn: "reset" or "half-open" after so many bytes, a status at once, or ""."""
        draw, weather = self._rng.random(), self.weather
        for kind, share in (("reset", weather.reset), ("half-open", weather.half_open), ("5xx", weather.status)):
            if draw < share:
                return kind, int(10 ** self._rng.uniform(0, REACH))
            draw -= share
        return "", 0

    def status(self) -> int:
        """One of those that are answered."""
        return self._rng.choice(STATUSES)


class _Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, wire: Wire, *, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._wire = wire
        self._client, self._server = client, server
        self._is_turn = True  # what the client says next begins one
        self._is_dead = False  # nothing comes through any longer
        self._fate, self._left = "", 0  # bytes until it comes

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, asks: bool) -> None:
        """Bring what comes from one end to the other, until either is closed."""
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if asks and self._is_turn:
                    self._begin_turn(data)
                self._is_turn = not asks
                if not self._is_dead:
                    await asyncio.sleep(self._wire.lateness_seconds())
                if not self._is_dead:
                    self._pass(data, writer)
                    await writer.drain()
        if self._is_dead and not asks:
            await asyncio.Event().wait()  # the client does not hear that its server closed the connection

    def _begin_turn(self, data: bytes) -> None:
        is_request = REQUEST.match(data) is not None
        self._wire.num_requests += is_request
        if self._fate or self._is_dead:
            return
        self._fate, self._left = self._wire.fate()
        if self._fate == "5xx":
            self._fate = ""
            if is_request:
                self._refuse()

    def _refuse(self) -> None:
        self._wire.faults["5xx"] += 1
        self._is_dead = True  # what the client still sends is swallowed until it closes
        head = f"HTTP/1.1 {self._wire.status()} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        self._client.write(head.encode())

    def _pass(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        if not self._fate or len(data) < self._left:
            self._left -= len(data)
            writer.write(data)
            return
        self._wire.faults[self._fate] += 1
        writer.write(data[: self._left])
        self._is_dead = True
        if self._fate == "reset":
            _reset(self._client)
            _reset(self._server)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def told_in(log: str) -> Counter[str]:
    """How many failures a client's log tells of, by kind."""
    counted: Counter[str] = Counter()
    for kinds in TOLD.findall(log):
        for text in kinds.split(", "):
            number, _, kind = text.partition(" x ")
            counted[kind] += int(number)
    return counted
