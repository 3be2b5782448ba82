"""Refuses requests that come from other sites' pages, or are too large, before the application sees them.

A page of any site can make a browser send requests to a server on the same machine. It can read no answer, but for a
domain name that it first points to itself and then to 127.0.0.1 (DNS rebinding): so other names than ours are refused.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders

STALL_SECONDS = 30.0  # without a byte of an unfinished body
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware that limits who may ask, and the bytes of a body. `host` is the address that was bound."""

    def __init__(self, app: Any, *, host: str, max_bytes: int) -> None:
        self._app = app
        name = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), name, f"{name}.local"}
        self._max_bytes = max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        if problem := self._find_problem(scope["method"], headers):
            refusal = JSONResponse({"error": "forbidden", "message": problem}, status_code=403)
            await refusal(scope, receive, send_with_headers)  # type: ignore[bad-argument-type]
        else:
            await self._app(scope, limit_body(receive, headers, max_bytes=self._max_bytes), send_with_headers)

    def _find_problem(self, method: str, headers: Headers) -> str | None:
        """Why a request may come from another site's page; None if it cannot."""
        host = headers.get("host", "")
        if not is_own(host, self._names):
            return f"this server is not called {host!r}: use its IP address or localhost"
        origin = headers.get("origin")
        if method not in SAFE_METHODS and origin is not None and urlsplit(origin).netloc != host:
            return f"a page of {origin} may not send anything here"
        return None


def is_own(host: str, names: Iterable[str]) -> bool:
    """Whether the Host header holds one of the names, or an IP address, which cannot be another site's name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in names


def limit_body(receive: Receive, headers: Headers, *, max_bytes: int) -> Receive:
    """A function that receives the messages of a request.

    It raises HTTPException: 413 for more than `max_bytes`, 408 for a client that stalls.
    """
    num_bytes, has_more = 0, True
    too_large = HTTPException(413, f"the request has more than {max_bytes:,} bytes: send fewer or smaller files")

    async def receive_limited() -> Message:
        nonlocal num_bytes, has_more
        if not has_more:  # the client is waiting now
            return await receive()
        if int(headers.get("content-length", 0)) > max_bytes:
            raise too_large
        try:
            async with asyncio.timeout(STALL_SECONDS):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, f"no byte of the body arrived for {STALL_SECONDS:.0f} s") from error
        num_bytes += len(message.get("body", b""))
        has_more = message.get("more_body", False)
        if num_bytes > max_bytes:
            raise too_large  # uvicorn discards the rest: few clients read an answer before they have sent everything
        return message

    return receive_limited
