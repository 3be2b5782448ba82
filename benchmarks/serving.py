"""The server under clients that send one image after the other, beside batch captioning: latency and images/s.

    python benchmarks/serving.py --model runs/coco/model --images PHOTOS     # about 3 minutes
    python benchmarks/serving.py --model runs/coco/model --quick             # rough figures, drawn images

Batch captioning of a folder, and the server with 1, 8 and 64 clients, take turns on the same images; no two files have
the same bytes. Each client sends its next image as soon as it has the answer to the last one, over a connection that it
keeps. Figures are medians over the rounds, latencies also over their images: measure on an idle machine. Loading the
model is not timed. The clients run on the same cores as the server.

Exit codes: 0 measured, whether or not the bars hold; 2 an error that you can fix, in one line.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, Location
from captioning import write_different
from measuring.figures import (
    Cost,
    at_least,
    at_most,
    describe_run,
    finish,
    median_of,
    print_rows,
    print_run,
    take_turns,
    times_as_fast,
)
from measuring.photos import find_or_draw
from measuring.settings import ImageBenchmarkSettings

PACKAGES = ("torch", "fastapi", "uvicorn", "simplejpeg", "pillow", "pillow-simd")
NUM_CLIENTS = (1, 8, 64)
BATCH = "batch captioning"
BOUNDARY = "frontier"
SERVE = Path(__file__).resolve().parents[1] / "infer" / "serve.py"


@dataclass(frozen=True, kw_only=True)
class ServingSettings(ImageBenchmarkSettings):
    """The model, the images, and how often."""

    model: Location = "runs/coco/model"
    """Model folder that train/main.py wrote."""
    pictures: Count | None = None
    """Images of a turn, a quarter of it with one client: 1,000, with --quick 64."""
    rounds: Count | None = None
    """Turns of each contender: 3, with --quick 1."""


@dataclass
class Clients:
    """A number of clients of a server, and the seconds that each image of all turns took them."""

    number: int
    port: int
    files: list[Path]
    seconds: list[float] = field(default_factory=list)

    def turn(self, _round: int) -> Cost:
        """Send all images."""
        requests = iter([make_request(file) for file in self.files])
        started = time.perf_counter()
        asyncio.run(self._send_all(requests))
        return Cost(items=len(self.files), wall_seconds=time.perf_counter() - started)

    async def _send_all(self, requests: Iterator[bytes]) -> None:
        await asyncio.gather(*(self._send_some(requests) for _ in range(self.number)))

    async def _send_some(self, requests: Iterator[bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for request in requests:
            started = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            row = await reader.readexactly(int(length[1]) if length else 0)
            self.seconds.append(time.perf_counter() - started)
            if not head.startswith(b"HTTP/1.1 200") or b'"caption"' not in row:
                raise UserError(f"the server did not caption an image: {row[:200]!r}")
        writer.close()

    def percentile_ms(self, percent: int) -> float:
        """The milliseconds that this part of the images took at most."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[percent - 1]


def main(settings: ServingSettings) -> None:
    """Start the server, measure, and report."""
    from captioner.describe import Captioner
    from captioner.model.bundle import load_bundle
    from captioner.workers import count_processors
    from contenders.captioning import Job, ours, start

    rounds = settings.rounds or (1 if settings.quick else 3)
    count = settings.pictures or (64 if settings.quick else 1000)
    captioner = Captioner(load_bundle(settings.model, device=start()))
    beam_size = captioner.decoding.beam_size
    with tempfile.TemporaryDirectory(prefix="serving-") as temporary:
        scratch = Path(temporary)
        originals = find_or_draw(settings.images, scratch)
        files = write_different(scratch / "files", originals, count=count)
        run = describe_run(
            PACKAGES,
            model=f"{captioner.bundle.name}, beam {beam_size}",
            pictures=f"{len(originals)} {f'from {settings.images}' if settings.images else 'DRAWN'}, repeated",
        )
        print_run("serving", run)
        job = Job(files=files, num_alone=0, encoder="", captioner=captioner, scratch=scratch)
        with run_server(settings.model) as port:
            clients = {
                name_of(number): Clients(number, port, files[: count // 4] if number == 1 else files)
                for number in NUM_CLIENTS
            }
            for each in clients.values():
                each.turn(0)  # warms the server up
                each.seconds.clear()
            batch = ours(job, workers=count_processors(), beam_size=beam_size)
            costs = take_turns({BATCH: batch, **{name: each.turn for name, each in clients.items()}}, rounds=rounds)
    rows = [make_row(name, costs[name], clients.get(name)) for name in costs]
    print_rows("serving", rows)
    most = clients[name_of(NUM_CLIENTS[-1])]
    ratio = times_as_fast(costs[name_of(most.number)], costs[BATCH], clock="wall_ms")
    bars = [
        at_least(f"images/s of {most.number} clients, times those of batch captioning", ratio, 0.6),
        at_most("milliseconds of an image with 1 client (median)", clients[name_of(1)].percentile_ms(50), 100),
    ]
    finish(bars, json=settings.json, run=run, rows=rows)


def name_of(number: int) -> str:
    return f"server, {number} client{'s' if number > 1 else ''}"


def make_row(name: str, costs: list[Cost | None], clients: Clients | None) -> dict[str, Any]:
    """What a contender's turns came to."""
    wall_ms = median_of(costs, figure="wall_ms")
    return {
        "contender": name,
        "images_a_second": None if wall_ms is None else 1000 / wall_ms,
        "median_ms": clients and clients.percentile_ms(50),
        "p95_ms": clients and clients.percentile_ms(95),
    }


@contextmanager
def run_server(model: str) -> Iterator[int]:
    """The port of a server of this model. Raises UserError if it does not start."""
    command = [sys.executable, SERVE, "--model", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.readline() if process.stdout else ""
        found = re.search(r"http://127\.0\.0\.1:(\d+)", printed)
        try:
            if not found:
                raise UserError(f"{SERVE} did not start: see what it printed")
            yield int(found[1])
        finally:
            process.terminate()


def make_request(file: Path) -> bytes:
    """A request to caption a file."""
    disposition = f'Content-Disposition: form-data; name="image"; filename="{file.name}"'
    body = b"".join(
        (f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode(), file.read_bytes(), f"\r\n--{BOUNDARY}--\r\n".encode())
    )
    head = (
        f"POST /caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


if __name__ == "__main__":
    cli.run(main, ServingSettings, description=__doc__ or "")
