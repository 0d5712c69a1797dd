"""What every request passes before the page sees it: ASGI middleware, one rule each.

Seen of gradio 6.31 without them: it reads a JSON body of any length, answers any Host header (so that a web page elsewhere can
reach it by DNS rebinding), prints a traceback for an event that does not exist, and gives an event any picture of this machine
whose path a request names, if the request leaves out the mark of a file (`meta`).
"""

import asyncio
import base64
import binascii
import hmac
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpo.durable import DamagedFile, decode

BODY = 64 * 2**10  # bytes of a request that is no upload: a prompt, a vote, some numbers
LONGEST_READ = 2**24  # bytes read of a body that is refused: a client that is cut off while it sends cannot read why
PATIENCE = 30.0  # seconds for a body to arrive
CLOSED = (  # of gradio's routes, those that fetch from elsewhere, watch, or store at a third party; this page uses none
    "/monitoring", "/gradio_api/proxy=", "/gradio_api/file=http", "/gradio_api/file/http", "/gradio_api/run-history",
    "/gradio_api/dev", "/gradio_api/deep_link", "/gradio_api/vibe",
)  # fmt: skip
# gradio compiles its components in the browser, so scripts of the page itself are let be; nothing comes from elsewhere, and
# nothing goes there.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; media-src 'self' data: blob:; "
        "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = logging.getLogger(__name__)


@dataclass
class Quiet:
    """A request that gradio cannot make sense of costs one line of the log, and the server lives on. Its client has been
    answered with 500 by then."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            _log.warning("%s %r failed: %s", scope.get("method"), scope.get("path"), type(error).__name__)
            _log.debug("its traceback", exc_info=True)


@dataclass
class Guarded:
    """HEADERS on every answer."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers)


@dataclass
class SameOrigin:
    """A page of another origin, open in the same browser, may not speak to this one."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
                return await refuse(403, "this page answers only itself", scope, receive, send)
        await self.app(scope, receive, send)


@dataclass
class Password:
    """HTTP Basic authentication (RFC 7617) before anything is answered, pictures and style sheets included. Any user name."""

    app: ASGIApp
    password: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not hmac.compare_digest(_given(Headers(scope=scope)), self.password.encode()):
            wanted = {"WWW-Authenticate": 'Basic realm="ddpo", charset="UTF-8"'}
            return await refuse(401, "this page wants its password; any user name will do", scope, receive, send, wanted)
        await self.app(scope, receive, send)


def _given(headers: Headers) -> bytes:
    """The password of a request; empty, which is never right, if there is none."""
    kind, _, encoded = headers.get("authorization", "").partition(" ")
    try:
        pair = base64.b64decode(encoded, validate=True) if kind.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return b""
    return pair.partition(b":")[2]


@dataclass
class Closed:
    """The routes in CLOSED are not there."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].lower().startswith(CLOSED):
            return await refuse(404, "Not Found", scope, receive, send)
        await self.app(scope, receive, send)


@dataclass
class Bodies:
    """A request's body is a little JSON, or an upload of a size that was told before.

    Args:
        upload: bytes of an upload, all its files together. Other bodies have BODY.
        folder: where uploads are kept: the only files that a request may name.
    """

    app: ASGIApp
    upload: int
    folder: Path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        uploads = scope["path"].rstrip("/") == "/gradio_api/upload"
        try:
            receive = self._told(scope, receive) if uploads else await _small(receive, self.folder)
        except Refusal as why:
            return await refuse(why.status, why.detail, scope, receive, send, {"Connection": "close"})
        await self.app(scope, receive, send)

    def _told(self, scope: Scope, receive: Receive) -> Receive:
        """The server holds a client to the length that it announced."""
        announced = Headers(scope=scope).get("content-length", "")
        if not announced.isdecimal():
            raise Refusal(411, "say how long the upload is, in Content-Length")
        if int(announced) > self.upload:
            raise Refusal(413, f"the upload is longer than {self.upload:,} bytes; choose a smaller picture")
        return receive


class Refusal(Exception):
    """Why a request is not passed on."""

    def __init__(self, status: int, detail: str):
        self.status, self.detail = status, detail


async def refuse(
    status: int, detail: str, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    """Answer as gradio does: its page shows `detail` to the user."""
    await JSONResponse({"detail": detail}, status, headers)(scope, receive, send)


async def _small(receive: Receive, folder: Path) -> Receive:
    """What gives the body, which was read and looked at, and then whatever else comes.

    Raises:
        Refusal: too long, too slow, no JSON, or JSON that no event of this page takes.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            body = await _read(receive)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {PATIENCE:g} s") from None
    if body:
        try:
            _check(decode(body, "its body"), folder)
        except (ValueError, DamagedFile, RecursionError) as error:
            raise Refusal(400, f"the request cannot be used: {error}") from None
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        first = next(messages, None)
        return await receive() if first is None else first

    return replay


async def _read(receive: Receive) -> bytes:
    body, length, more = bytearray(), 0, True
    while more:
        message = await receive()
        piece, more = message.get("body", b""), message.get("more_body", False)
        length += len(piece)
        if length <= BODY:
            body += piece
        if length > LONGEST_READ:
            break
    if length > BODY:
        raise Refusal(413, f"the body is longer than {BODY:,} bytes")
    return bytes(body)


def _check(value: Any, folder: Path) -> None:
    """Raises ValueError where text could not be stored or shown, or a file is named that was not uploaded."""
    for key, text in _texts(value):
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("a text holds characters that are not text (NUL, or half of a surrogate pair); type it anew")
        if key == "path" and not Path(os.path.realpath(text)).is_relative_to(os.path.realpath(folder)):
            raise ValueError("it names a file or an address; pictures are read only where they were uploaded, so upload it")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, keys included, with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _texts(item, name)
