"""The routes: what is asked, by whom, and what is answered."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ttspec.config import GenerateConfig
from ttspec.errors import TtspecError
from ttspec.serving.answers import Answers
from ttspec.serving.gate import Gate
from ttspec.serving.keys import ANYBODY, Keys
from ttspec.serving.meter import Meter
from ttspec.serving.options import (
    BODY_BYTES,
    BODY_BYTES_PER_TOKEN,
    MAX_CHOICES,
    SLOW_READER_SECONDS,
)
from ttspec.serving.problems import Problem, refused
from ttspec.serving.prompts import PromptWriter, Written
from ttspec.serving.schema import ChatRequest, CompletionRequest, Sampled
from ttspec.serving.worker import Job, Worker

SAMPLING = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "ignore_eos"),
)
"""Fields that go to the engine under their own names."""
log = logging.getLogger("ttspec.serving")


class Api:
    """What routes share: the worker, who may ask, and who writes prompts."""

    def __init__(self, worker: Worker, keys: Keys | None, meter: Meter, model: str) -> None:
        """Serve `model`; without `keys` anybody may ask."""
        self.worker, self.keys, self.meter, self.model = worker, keys, meter, model
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="ttspec-prompts")
        self._writer: PromptWriter | None = None

    async def tenant(self, request: Request) -> str:
        """Who asks.

        Raises:
            Problem: Nobody whom the server knows.
        """
        if self.keys is None:
            return ANYBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        tenant = self.keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Problem(
                401,
                "The request has no API key that this server knows. Send the header "
                "Authorization: Bearer KEY.",
                code="invalid_api_key",
            )
        return tenant

    async def answers(self, body: Sampled, tenant: str) -> Answers:
        """Queue what a request asks for.

        Raises:
            Problem: It cannot be answered, or not now.
        """
        worker = self.worker
        if body.model not in (None, self.model):
            raise Problem(
                404,
                f"The model {body.model[:80]!r} is not here; this server has {self.model}.",
                param="model",
                code="model_not_found",
            )
        worker.require_ready()
        loop = asyncio.get_running_loop()
        written = await loop.run_in_executor(self._threads, self._write, body)
        if len(written.prompts) * body.n > MAX_CHOICES:
            raise refused(f"Prompts times n are more than {MAX_CHOICES}.", "n")
        events: asyncio.Queue[Any] = asyncio.Queue()
        seed = secrets.randbits(31) if body.seed is None else body.seed % 2**63
        asked_before: Counter[tuple[int, ...]] = Counter()
        jobs = []
        for ids in written.prompts:
            config = self._config(body, len(ids))
            for _ in range(body.n):
                jobs.append(
                    Job(
                        ids=ids,
                        config=config,
                        seed=seed,
                        occurrence=asked_before[tuple(ids)],
                        tenant=tenant,
                        thinking=written.thinking,
                        deadline=time.monotonic() + worker.options.deadline,
                        index=len(jobs),
                        mask=written.mask.copy() if written.mask else None,
                        logprobs=body.told_logprobs,
                        events=events,
                    )
                )
                asked_before[tuple(ids)] += 1
        worker.submit(jobs)
        return Answers(body, worker, self.model, written, jobs, events)

    def close(self) -> None:
        """End the thread of prompts."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _write(self, body: Sampled) -> Written:
        if self._writer is None:
            self._writer = PromptWriter(self.worker.engine)
        if isinstance(body, ChatRequest):
            return self._writer.chat(body)
        assert isinstance(body, CompletionRequest)
        return self._writer.completion(body)

    def _config(self, body: Sampled, prompt: int) -> GenerateConfig:
        """What one answer is told."""
        room = self.worker.slots - prompt
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if room < (asked or 1):
            raise refused(
                f"The prompt has {prompt} tokens and {asked or 1} are asked for; this server has "
                f"room for {self.worker.slots} in all. Shorten the prompt or ask for less.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        changes: dict[str, Any] = {n: v for n in SAMPLING if (v := getattr(body, n)) is not None}
        if body.top_k is not None:
            changes["top_k"] = max(0, body.top_k)  # -1 is vLLM's word for all
        if body.logit_bias is not None:
            changes["logit_bias"] = _biases(body.logit_bias)
        if body.min_tokens is not None:
            changes["min_new_tokens"] = body.min_tokens
        try:
            return replace(
                self.worker.config, max_new_tokens=asked or room, stop=body.stops, **changes
            )
        except TtspecError as error:
            raise refused(str(error), str(error).partition(" ")[0]) from error


def make_app(worker: Worker, keys: Keys | None, meter: Meter, model: str) -> FastAPI:
    """The application; whoever runs it starts and stops the worker."""
    api = Api(worker, keys, meter, model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.close()

    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(title="ttspec", docs_url=None, redoc_url=None, lifespan=lifespan)
    tenant_of = Depends(api.tenant)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request, tenant: str = tenant_of) -> Response:
        return await _answer(api, body, request, tenant)

    @app.post("/v1/completions")
    async def complete(
        body: CompletionRequest, request: Request, tenant: str = tenant_of
    ) -> Response:
        return await _answer(api, body, request, tenant)

    @app.get("/v1/models")
    async def models(_: str = tenant_of) -> dict[str, Any]:
        entry = {"id": model, "object": "model", "created": _STARTED, "owned_by": "ttspec"}
        if worker.slots:
            entry["max_model_len"] = worker.slots
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ready" else 503)

    @app.get("/metrics")
    async def metrics(_: str = tenant_of) -> Response:
        return Response(meter.exposition(*worker.load), media_type=_PROMETHEUS)

    @app.get("/live")
    async def live(_: str = tenant_of) -> dict[str, Any]:
        running, waiting = worker.load
        return {
            "model": model,
            "state": worker.state,
            "running": running,
            "waiting": waiting,
            "rows": worker.rows,
            "now": time.time(),
            "seconds": meter.history(),
        }

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})

    @app.exception_handler(Problem)
    async def problem_found(_: Request, problem: Problem) -> JSONResponse:
        meter.refused(problem.status)
        return JSONResponse(problem.body(), problem.status, problem.headers)

    @app.exception_handler(RequestValidationError)
    async def body_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return await problem_found(_, _explained(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return await problem_found(_, Problem(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        log.error("request failed", exc_info=error, extra={"event": "request_failed"})
        return await problem_found(_, Problem(500, "The server failed. Send the request again."))

    def most() -> int:
        return BODY_BYTES + BODY_BYTES_PER_TOKEN * max(worker.slots, worker.options.context)

    hosts = None
    if keys is None and worker.options.is_local:
        hosts = {"localhost", "127.0.0.1", "::1", worker.options.host}
    app.add_middleware(Gate, hosts=hosts, most=most, refused=meter.refused)
    return app


async def _answer(api: Api, body: Sampled, request: Request, tenant: str) -> Response:
    answers = await api.answers(body, tenant)
    if body.stream:
        return _EventStream(answers)
    writing = asyncio.ensure_future(answers.whole())
    leaving = asyncio.ensure_future(_left(request))
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
            answers.give_up()


async def _left(request: Request) -> None:
    """Return when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise refused(
            "logit_bias names what is no token; allowed is as in {'198': -5}.", "logit_bias"
        ) from None


def _explained(error: RequestValidationError) -> Problem:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("json_invalid", "model_attributes_type") or not where:
        return (
            refused(
                f"The body is no JSON object ({message}). Send one, with the header Content-Type: "
                "application/json."
            )
            if first["type"] != "value_error"
            else refused(message, message.partition(" ")[0])
        )
    param = ".".join(where)
    if first["type"] == "extra_forbidden":
        message = "there is no such field; leave it out"
    return refused(f"{param}: {message}.", param)


_STARTED = int(time.time())
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
_PAGE = files("ttspec.serving").joinpath("page.html").read_text(encoding="utf-8")
