"""Serve captions over HTTP on this machine, and a page to drop images on.

    python infer/serve.py --model runs/coco/model                    # then open http://127.0.0.1:8000
    curl -F image=@dog.jpg -F image=@cat.jpg http://127.0.0.1:8000/caption
    python infer/serve.py --model runs/coco/model --gallery gallery  # corrections are saved in the gallery's folder

POST /caption answers with a JSON list of one row for each file, with the keys of captions.jsonl: a caption, or an
error. Images of all clients are captioned together. GET /health says what the server does. It needs
pip install -c constraints.txt -e '.[serve]'. It opens no URL, and no file but those of --model and --gallery. Stop it
with Ctrl-C or SIGTERM: requests that have arrived are answered first. Exit code 0: stopped by SIGTERM; 2: an error to
fix, printed in one line; 130: stopped by Ctrl-C.
"""

import logging
import signal
import socket
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from captioner import cli
from captioner.errors import UserError
from captioner.flags import Count, File, Location, int_flag
from captioner.model.onnx import is_onnx_folder
from captioner.workers import count_processors
from infer.gallery import is_gallery
from infer.reading import prepare
from infer.settings import CaptionSettings

CPU_BATCH_SIZE, GPU_BATCH_SIZE = 32, 128
BACKLOG = 1024  # connections that are not accepted yet
GRACE_SECONDS = 60  # for requests that have arrived, when the server is stopped

Port = Annotated[int, int_flag(at_least=0, at_most=65_535)]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The model, the address, and the limits."""

    model: Location = "runs/coco/model"
    """Model folder that train/main.py wrote, or ONNX folder that infer/export.py wrote, or its URL."""
    gallery: File | None = None
    """Folder that infer/main.py --gallery wrote: it is served at /gallery/, and corrections are saved in it."""
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is reached from this machine only, 0.0.0.0 by everyone in its networks."""
    port: Port = 8000
    """Port to listen on; 0 takes a free one."""
    batch_size: Count | None = None
    """Waiting images that are captioned together, at most. The default is 128 on a GPU, 32 on a CPU."""
    max_bytes: Count = 64 << 20
    """Bytes of one request, at most; larger ones are answered with 413."""
    max_pixels: Count = 100_000_000
    """Pixels of an image, at most; a larger one gets an error row."""
    max_queue: Count = 256
    """Images that wait, at most; further requests are answered with 429."""


def main(settings: ServeSettings) -> None:
    """Load the model and answer requests until a signal."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"the server needs {error.name}: pip install -c constraints.txt -e '.[serve]' installs it"
        ) from error
    if settings.gallery is not None and not is_gallery(settings.gallery):
        raise UserError(
            f"--gallery {settings.gallery} holds no gallery: give a folder that infer/main.py --gallery wrote"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when it has ended
    prepare(with_torch=not is_onnx_folder(settings.model), may_fork=True)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # the client gets the reason
    listener = listen(settings.host, settings.port)
    from infer.captioning import load_captioner
    from infer.serving.app import make_app
    from infer.serving.service import Service

    captioner = load_captioner(CaptionSettings(model=settings.model))
    if captioner.bundle.uses_torch:
        import torch

        torch.set_num_threads(count_processors())  # one batch at a time is captioned
    on_cpu = captioner.bundle.is_on_cpu
    service = Service(
        captioner,
        batch_size=settings.batch_size or (CPU_BATCH_SIZE if on_cpu else GPU_BATCH_SIZE),
        num_workers=count_processors(),
        max_pixels=settings.max_pixels,
    )
    with service:
        app = make_app(
            service,
            host=settings.host,
            max_bytes=settings.max_bytes,
            max_queue=settings.max_queue,
            gallery_folder=settings.gallery,
        )
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=GRACE_SECONDS
        )
        announce(listener, settings)
        uvicorn.Server(config).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, and whose connections send at once. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host} port {port} ({reason}): give another --port or --host") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer waits 40 ms for an acknowledgement
    return listener


def announce(listener: socket.socket, settings: ServeSettings) -> None:
    """Print where the server is reached, and by whom."""
    address, port = listener.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    cli.console.print(f"open {url}/, or send images to {url}/caption", markup=False)
    if settings.gallery is not None:
        cli.console.print(f"correct captions at {url}/gallery/", markup=False)
    if not ip_address(address).is_loopback:
        cli.console.print("everyone who reaches this address may use it: there is no password", markup=False)
    sys.stdout.flush()


def run() -> None:
    """The console entry."""
    cli.run(main, ServeSettings, description=__doc__ or "")


if __name__ == "__main__":
    run()
