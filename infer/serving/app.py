"""The application: POST /caption, GET /health, a page to drop images on at /, and the gallery at /gallery/."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import Body, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as HttpError
from starlette.requests import ClientDisconnect

from captioner.errors import UserError
from captioner.pages import load_template
from infer import gallery
from infer.corrections import CorrectionFile, parse_line
from infer.serving.guard import Guard
from infer.serving.service import Service
from infer.serving.uploads import read_files

HERE = Path(__file__).parent
STATIC = {"gallery.css": HERE.parent, "drop.css": HERE, "drop.js": HERE}
GALLERY_FILES = (gallery.INDEX, gallery.DATA, *gallery.STATIC)
RETRY_SECONDS = 1
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


class Json(JSONResponse):
    """JSON in ASCII, as file names may hold what UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        """The bytes of a response."""
        return json.dumps(content, allow_nan=False).encode()


class QueueLimit:
    """Counts the images that wait for their rows, refuses more than `max_queue`, and counts what became of them."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.num_waiting = 0
        self.outcomes: Counter[str] = Counter()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Count more images as waiting while the block runs. Raises HTTPException 429 if they are too many."""
        if self.num_waiting + count > self.max_queue:
            message = f"{self.num_waiting} images are waiting, {self.max_queue} may: send it again later"
            raise HTTPException(429, message, headers={"Retry-After": str(RETRY_SECONDS)})
        self.num_waiting += count
        try:
            yield
        finally:
            self.num_waiting -= count


def make_app(service: Service, *, host: str, max_bytes: int, max_queue: int, gallery_folder: Path | None) -> FastAPI:
    """The application. `gallery_folder` is one that infer/main.py wrote; its corrections.jsonl is kept there."""
    app = FastAPI(title="Captioner", version=version("captioner"), docs_url=None, redoc_url=None)
    app.add_middleware(Guard, host=host, max_bytes=max_bytes)
    limit = QueueLimit(max_queue)
    _answer_errors(app, limit)
    _serve_captions(app, service, limit)
    _serve_page(app, max_bytes=max_bytes, has_gallery=gallery_folder is not None)
    if gallery_folder is not None:
        _serve_gallery(app, gallery_folder)
    return app


def _answer_errors(app: FastAPI, limit: QueueLimit) -> None:
    """Answer errors as rows do, with the keys `error` and `message`."""

    @app.exception_handler(HttpError)
    async def answer(_: Request, error: HttpError) -> Json:
        limit.outcomes[f"refused with {error.status_code}"] += 1
        content = {"error": HTTPStatus(error.status_code).phrase.lower(), "message": error.detail}
        return Json(content, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, error: RequestValidationError) -> Json:
        return await answer(request, HTTPException(400, "; ".join(problem["msg"] for problem in error.errors())))

    @app.exception_handler(ClientDisconnect)
    async def forget(_: Request, __: ClientDisconnect) -> Response:
        limit.outcomes["cut by the client"] += 1
        return Response(status_code=400)  # for nobody


def _serve_captions(app: FastAPI, service: Service, limit: QueueLimit) -> None:
    bundle = service.captioner.bundle
    started = time.monotonic()

    @app.post("/caption", openapi_extra=UPLOAD)
    async def caption(request: Request) -> Json:
        """A row for each file of the request, in its order: a caption, or an error."""
        with limit.hold(1):
            async with read_files(request, max_files=limit.max_queue) as files:
                with limit.hold(len(files) - 1):
                    waiting = [asyncio.wrap_future(service.submit(name, file)) for name, file in files]
                    await asyncio.wait(waiting)  # for all: they read from the files
                    try:
                        rows = [row.result() for row in waiting]
                    except Exception as error:
                        logging.getLogger(__name__).exception("captioning failed")
                        raise HTTPException(500, f"captioning failed: {error}") from error
        limit.outcomes.update(row.get("error", "captioned") for row in rows)
        return Json(rows)

    @app.get("/health")
    async def health() -> Json:
        """What the server does."""
        health = {
            "status": "ok",
            "model": bundle.name,
            "device": str(getattr(bundle, "device", "cpu")),  # an ONNX folder has none
            "seconds": round(time.monotonic() - started),
            "waiting": limit.num_waiting,
            "max_queue": limit.max_queue,
            "images": dict(limit.outcomes),
        }
        return Json(health)


def _serve_page(app: FastAPI, *, max_bytes: int, has_gallery: bool) -> None:
    page = load_template(HERE / "drop.html.j2").render(max_bytes=max_bytes, has_gallery=has_gallery)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    for name, folder in STATIC.items():
        _serve_file(app, f"/{name}", folder / name)


def _serve_gallery(app: FastAPI, folder: Path) -> None:
    """Serve the gallery's own files, by their names, and its corrections."""
    corrections = CorrectionFile(folder / gallery.CORRECTIONS)
    for name in GALLERY_FILES:
        _serve_file(app, f"/gallery/{'' if name == gallery.INDEX else name}", folder / name)

    @app.get("/gallery/thumbnails/{name}", include_in_schema=False)
    async def thumbnail(name: str) -> FileResponse:
        return _send_file(folder / gallery.THUMBNAILS / name if gallery.is_thumbnail(name) else None)

    @app.get("/gallery/corrections")
    def get_corrections() -> Json:
        """The lines of corrections.jsonl."""
        return Json(corrections.read().lines())

    @app.put("/gallery/corrections")
    def put_corrections(changes: list[dict[str, Any]] = Body()) -> Json:  # noqa: B008
        """Add lines to corrections.jsonl, or replace those of the same images; one without a caption is taken back."""
        try:
            corrections.change(map(parse_line, changes))
        except ValueError as error:
            raise HTTPException(400, f"no correction: {error}") from error
        return Json({"saved": len(changes)})

    @app.exception_handler(UserError)
    @app.exception_handler(OSError)
    async def answer_unsaved(_: Request, error: UserError | OSError) -> Json:
        return Json({"error": "not saved", "message": str(error)}, 500)


def _serve_file(app: FastAPI, url: str, file: Path) -> None:
    @app.get(url, include_in_schema=False)
    async def get() -> FileResponse:
        return _send_file(file)


def _send_file(file: Path | None) -> FileResponse:
    if file is None or not file.is_file():
        raise HTTPException(404, "there is no such file")
    return FileResponse(file, headers={"Cache-Control": "no-cache"})
