"""The captioning server as a process of its own, on a free port."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import warm

REPOSITORY = Path(__file__).resolve().parents[2]
HANG_SECONDS = 2.0  # until the server gives up an image at which its decoder hangs

# The command, with decoders that die or hang of the images that tests/support/crash.py names.
COMMAND = f"""
import crash
from captioner import workers
from infer import serve
from infer.serving import service
service.decode_upload, service.MAX_SECONDS, workers.POLL_SECONDS = crash.decoding_deadly_uploads, {HANG_SECONDS}, 0.1
serve.run()
"""


@dataclass(frozen=True)
class Served:
    """A server that listens at `url`, and its process."""

    url: str
    process: warm.Popen

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def run_server(*flags: object, port: int = 0) -> Iterator[Served]:
    """infer/serve.py with these flags, until the block ends; SIGTERM must end it with exit code 0."""
    command = [sys.executable, "-c", COMMAND, *map(str, flags), "--port", str(port)]
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests/support")))
    environment = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"}
    with warm.Popen(command, env=environment, text=True, stdout=-1) as process:
        try:
            assert process.stdout
            printed = process.stdout.readline()
            found = re.search(r"http://\S+:\d+", printed)
            assert found, f"the server ended: {printed}"
            threading.Thread(target=process.stdout.read, daemon=True).start()  # or a full pipe would stop it
            yield Served(found[0], process)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
