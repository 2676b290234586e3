"""The routes: what is asked, by whom, and what is answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from ttspec.serving.answers import Answers
from ttspec.serving.api import Api
from ttspec.serving.errors import ApiError, bad_request
from ttspec.serving.keys import Keys
from ttspec.serving.logs import log
from ttspec.serving.metrics import ServerMetrics
from ttspec.serving.middleware import AccessMiddleware
from ttspec.serving.options import BODY_BYTES, BODY_BYTES_PER_TOKEN, SLOW_READER_SECONDS
from ttspec.serving.schema import ChatRequest, CompletionRequest, Sampled
from ttspec.serving.worker import Worker


def make_app(worker: Worker, keys: Keys | None, metrics: ServerMetrics, model: str) -> FastAPI:
    """The application; whoever runs it starts and stops the worker."""
    api = Api(worker, model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.close()

    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="ttspec",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": {"description": "OpenAI's error object."}},
    )

    def entry() -> dict[str, Any]:
        fields = {"id": model, "object": "model", "created": _STARTED, "owned_by": "ttspec"}
        return fields | ({"max_model_len": worker.slots} if worker.slots else {})

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(api, body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _answer(api, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        api.require_model(name)
        return entry()

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def exposition() -> Response:
        return Response(metrics.exposition(*worker.load), media_type=_PROMETHEUS)

    @app.get("/live")
    async def live() -> dict[str, Any]:
        running, waiting = worker.load
        return {
            "model": model,
            "state": worker.state,
            "running": running,
            "waiting": waiting,
            "rows": worker.rows,
            "now": time.monotonic(),
            "seconds": metrics.history(),
        }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})

    @app.exception_handler(RequestValidationError)
    async def body_invalid(_: Request, error: RequestValidationError) -> Response:
        raise _validation_error(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # what FastAPI says of JSON that Python cannot read
            raise bad_request(
                "The body is no JSON object: it is not UTF-8, or something in it is nested too "
                "deep or has too many digits. Send another."
            )
        message = f"{request.method} {request.url.path[:80]}: {error.detail}."
        if error.status_code in (404, 405):
            paths = (route.path_format for route in app.routes if isinstance(route, APIRoute))
            message += f" There are {', '.join(paths)}."
        raise ApiError(error.status_code, message)

    def most() -> int:
        return BODY_BYTES + BODY_BYTES_PER_TOKEN * max(worker.slots, worker.options.context)

    hosts = None
    if keys is None and worker.options.is_local:
        hosts = {"localhost", "127.0.0.1", "::1", worker.options.host}
    app.add_middleware(
        AccessMiddleware, hosts=hosts, keys=keys, most=most, count_error=metrics.count_error
    )
    app.add_middleware(  # before that one: a browser asks first without the key
        CORSMiddleware,
        allow_origins=["*"] if keys else [],
        allow_origin_regex=None if keys else _LOCAL_PAGES,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
    return app


async def _answer(api: Api, body: Sampled, request: Request) -> Response:
    answers = await api.answers(body, request.scope["tenant"], request.scope["request_id"])
    if body.stream:
        return _EventStream(answers)
    writing = asyncio.ensure_future(answers.whole())
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(writing.result())
    finally:
        for task in (writing, leaving):
            task.cancel()


class _EventStream(StreamingResponse):
    """A stream that ends its answers with itself, whoever ends it."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(
            answers.stream(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self._answers
        try:  # a client that does not read holds a connection, though its answer is over
            async with asyncio.timeout(answers.worker.options.deadline + SLOW_READER_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read", extra={"event": "slow_reader"})
        finally:
            answers.abort()


async def _disconnected(request: Request) -> None:
    """Return when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    errors = error.errors()
    # Where a field may be one of several things, the error that lies deepest says most, and of
    # those one of a value that is of the right kind.
    field = errors[0]["loc"][:2]
    of_field = [e for e in errors if e["loc"][:2] == field]
    found = max(of_field, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    kind, message = found["type"], str(found["msg"]).removeprefix("Value error, ")
    place = found["loc"][1:]
    if place[-1:] == ("[key]",):  # of a key the field is named, the key is what is shown
        place = place[:-2]
    param = ".".join(str(part) for part in place if not _is_type(part))
    if kind == "value_error" and not param:  # begins with the field's name
        return bad_request(f"{message}.", message.partition(" ")[0])
    if kind in ("json_invalid", "model_attributes_type") or not param:
        why = f" ({message})" if kind == "json_invalid" else ""
        return bad_request(
            f"The body is no JSON object{why}. Send one, with the header Content-Type: "
            "application/json."
        )
    if kind == "extra_forbidden":
        known = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
        near = get_close_matches(param[:40], sorted(known), n=1)
        advice = f"is {near[0]} meant?" if near else "leave it out."
        return bad_request(f"{param}: there is no such field; {advice}", param)
    given = found["input"]
    is_told = kind != "missing" and isinstance(given, str | int | float)
    shown = f" is {json.dumps(given)[:60]}" if is_told else ""
    return bad_request(f"{param}{shown}: {message}.", param)


def _is_type(part: int | str) -> bool:
    """Whether a part of an error's place is what a value could be, not where it stands."""
    return isinstance(part, str) and (part == "str" or "[" in part)


_STARTED = int(time.time())
_LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Origins of pages whose browser may read answers where there are no keys."""
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
_PAGE = files("ttspec.serving").joinpath("page.html").read_text(encoding="utf-8")
