"""The files of a multipart request, read as they arrive; large ones are kept in temporary files."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import HTTPException, Request
from python_multipart.multipart import File, FormParser, parse_options_header

MAX_NAME_BYTES = 1000
EXAMPLE = "curl -F image=@photo.jpg"


@asynccontextmanager
async def read_files(request: Request, *, max_files: int) -> AsyncIterator[list[tuple[str, Any]]]:
    """The name of each file in a request's body, and the file open for reading, until the block ends.

    Raises HTTPException: 415 for a body of another kind, 413 for too many files, 400 for a body that is cut or
    malformed, or has no file, or fields that are none. The caller limits the bytes of the body.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPException(415, f"send the images as multipart/form-data, such as {EXAMPLE} does")
    form = _Form(options[b"boundary"], max_files=max_files)
    try:
        async for chunk in request.stream():
            form.write(chunk)
        yield form.named_files()
    finally:
        form.close()


class _Form:
    """The files of a body, as far as it has arrived."""

    def __init__(self, boundary: bytes, *, max_files: int) -> None:
        self._max_files = max_files
        self._files: list[File] = []
        self._is_complete = False
        try:
            self._parser = FormParser(
                "multipart/form-data", self._refuse_field, self._add_file, self._end, boundary=boundary
            )
        except ValueError as error:  # of a boundary that is too long
            raise HTTPException(400, f"the body cannot be read ({error})") from error

    def write(self, chunk: bytes) -> None:
        """Parse the next bytes. Raises HTTPException."""
        try:
            self._parser.write(chunk)
        except HTTPException:
            raise
        except Exception as error:  # some damage ends in an AssertionError of the parser
            raise HTTPException(400, f"the body is no multipart/form-data as it should be ({error})") from error

    def named_files(self) -> list[tuple[str, Any]]:
        """The names and the open files, once the body has ended. Raises HTTPException."""
        if not self._is_complete:
            raise HTTPException(400, "the body ends before its last boundary: send it again")
        chosen = [file for file in self._files if file.file_name or file.size]  # a form sends an empty one for none
        if not chosen:
            raise HTTPException(400, f"the request has no file: send one as {EXAMPLE} does")
        for file in chosen:
            file.file_object.seek(0)
        return [(_text(file.file_name or b""), file.file_object) for file in chosen]

    def close(self) -> None:
        """Remove the temporary files."""
        for file in self._files:
            file.close()

    def _add_file(self, file: File) -> None:
        self._files.append(file)
        if len(self._files) > self._max_files:
            raise HTTPException(413, f"more than {self._max_files} files: send fewer in one request")

    def _refuse_field(self, field: Any) -> None:
        raise HTTPException(400, f"the field {_text(field.field_name)!r} is no file: send files alone")

    def _end(self) -> None:
        self._is_complete = True


def _text(name: bytes) -> str:
    return name[:MAX_NAME_BYTES].decode(errors="surrogateescape")
