"""What stands before all routes: whose host name was asked, who asks, how large and slow a body is.

Plain ASGI: a stream passes as it comes, and strangers are refused before their body is read. What a
route raises ends here too, so every refusal is counted, logged and answered in one place.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ttspec.serving.errors import ApiError
from ttspec.serving.keys import ANYBODY, Keys
from ttspec.serving.logs import log
from ttspec.serving.options import BODY_SECONDS

FOR_ANYBODY = ("/", "/health")
"""Paths that need no key."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
"""A client's own, which is sent back and logged."""


class AccessMiddleware:
    """Refuses what no route should see.

    Tells routes who asks, as `scope["tenant"]`, and what the request is called, as
    `scope["request_id"]`, which the response has as `x-request-id`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None,
        keys: Keys | None,
        most: Callable[[], int],
        count_error: Callable[[int], None],
    ) -> None:
        """Stand before `app`.

        `hosts` are names that the server may be called by; None is any. Without keys, a web page
        could else reach a server on its reader's machine under a name of its own. `keys` say who
        may ask; without them anybody may. A body has so many bytes at most; `count_error` is told
        the status of each request that is answered with an error.
        """
        self._app, self._hosts, self._keys = app, hosts, keys
        self._most, self._count_error = most, count_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the answer to GET, whose body uvicorn leaves out
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        scope["request_id"], begun, is_read = name, False, False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            self._require_host(headers)
            scope["tenant"] = ANYBODY if scope["path"] in FOR_ANYBODY else self._tenant(headers)
            body, is_read = await self._body(headers, scope["method"], receive), True
            await self._app(scope, _replayed(body, receive), named)
            return
        except _DisconnectedError:
            return
        except ApiError as error:
            if begun:
                raise
            found = error
        except Exception:
            log.exception("fault", extra={"event": "fault", "fields": {"request_id": name}})
            found = ApiError(500, "The server failed. Send the request again.")
            if begun:
                raise
        self._count_error(found.status)
        fields = {"request_id": name, "status": found.status, "code": found.code}
        log.info("refused", extra={"event": "refused", "fields": fields})
        close = {} if is_read else {"Connection": "close"}
        response = JSONResponse(found.body(), found.status, {**found.headers, **close})
        await response(scope, receive, named)

    def _require_host(self, headers: Headers) -> None:
        host = _host(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, f"This server is not called {host[:80]!r}.", code="unknown_host")

    def _tenant(self, headers: Headers) -> str:
        if self._keys is None:
            return ANYBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = self._keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(
                401,
                "The request has no API key that this server knows. Send the header "
                "Authorization: Bearer KEY.",
                code="invalid_api_key",
            )
        return tenant

    async def _body(self, headers: Headers, method: str, receive: Receive) -> bytes:
        if method not in ("POST", "PUT", "PATCH"):
            return b""
        most = self._most()
        large = ApiError(
            413, f"The body is larger than {most} bytes, which is all a row has room for."
        )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _DisconnectedError
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS} seconds.") from None


class _DisconnectedError(Exception):
    """The client went away."""


def _host(header: str) -> str:
    """The name without a port; an IPv6 address keeps its brackets off."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body at once, and then what comes."""
    first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def channel() -> Message:
        return first.pop() if first else await receive()

    return channel
