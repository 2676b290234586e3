"""One thread that owns the engine and its schedulers. All torch work is done there.

The event loop hands it jobs and is told of every chunk. The thread looks for new and cancelled
jobs before every step, so who goes away frees a row within a round. A round that fails takes the
answers of its rows with it; those that wait begin on new ones.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Literal

from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.scheduler import Scheduler
from ttspec.errors import ResourceError, TtspecError
from ttspec.heap import freeze_heap
from ttspec.records import Chunk
from ttspec.serving.errors import FAILED, NO_ROOM, NOT_KEPT, STOPPED, ApiError, bad_request
from ttspec.serving.jobs import Event, Job
from ttspec.serving.keys import ANYBODY
from ttspec.serving.logs import log
from ttspec.serving.metrics import ServerMetrics
from ttspec.serving.options import ServeOptions
from ttspec.serving.schedulers import Schedulers

State = Literal["loading", "ready", "draining", "stopped"]
POLL_SECONDS = 0.05
"""Seconds between looks at what waits for time or memory."""


class Worker:
    """The thread, what waits for it, and what it works on."""

    def __init__(
        self,
        load: Callable[[], Engine],
        config: GenerateConfig,
        options: ServeOptions,
        metrics: ServerMetrics,
        tenant: str = ANYBODY,
    ) -> None:
        """Nothing is loaded before `start`.

        `load` gives the pair, and is called in the thread. `tenant` is one of those who may
        ask.
        """
        self._load, self.config, self.options, self.metrics = load, config, options, metrics
        self.state: State = "loading"
        self.failure: BaseException | None = None
        """Why the thread ended, if nobody asked it to."""
        self.engine: Engine
        self.slots = self.rows = self.draft_length = 0
        """Tokens of a row, rows, and tokens that a round verifies at most, once loaded."""
        self._schedulers: Schedulers
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notify: Callable[[], None]
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._first_tenant = tenant
        self._waiting: deque[Job] = deque()
        self._running: dict[tuple[Scheduler, int], Job] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="ttspec-engine", daemon=True)

    # What the event loop calls.

    def start(self, loop: asyncio.AbstractEventLoop, notify: Callable[[], None]) -> None:
        """Begin to load; `notify` is called in the loop when it is ready, and when it ends."""
        self._loop, self._notify = loop, notify
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none.

        Raises:
            ApiError: The server does not take any, or too many wait.
        """
        most = self.rows + self.options.queue
        if len(jobs) > most:
            raise bad_request(f"The request asks for {len(jobs)} answers; allowed are {most}.", "n")
        with self._lock:
            self.require_ready()  # nobody looks at what comes after `_end_all`
            if self._in_flight + len(jobs) > most:
                raise ApiError(
                    429,
                    f"{self._in_flight} answers are being written or wait; this server takes "
                    f"{most}. Try again later.",
                    code="queue_full",
                    retry_after=self.metrics.retry_after(self.rows),
                )
            self._in_flight += len(jobs)
            for job in jobs:
                self._commands.put(partial(self._waiting.append, job))

    def require_ready(self) -> None:
        """Refuse work while there is nobody to do it.

        Raises:
            ApiError: It is loading, draining or stopped.
        """
        if self.state != "ready":
            wait = 5 if self.state == "loading" else self.options.drain
            message = f"The server is {self.state}. Try again later."
            raise ApiError(503, message, code=self.state, retry_after=max(1, round(wait)))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs; those that are over stay so."""
        for job in jobs:
            self._commands.put(partial(self._cancel, job))

    @property
    def load(self) -> tuple[int, int]:
        """Answers that have a row, and that wait for one."""
        running = len(self._running)
        return running, max(0, self._in_flight - running)

    @property
    def is_loading(self) -> bool:
        """Whether the thread has begun, and has no rows yet."""
        return self._thread.is_alive() and not self.rows

    def drain(self) -> None:
        """Take no more jobs."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    def stop(self) -> None:
        """End the thread; what is not finished fails. Waits for it."""
        self.drain()
        self._commands.put(self._stop)
        if self.rows and self._thread.is_alive():  # loading may take minutes, and nobody's answer
            self._thread.join()

    # What the thread does.

    def _run(self) -> None:
        try:
            self.engine = self._load()
            self._make_rows()
            if self.state == "loading":
                self.state = "ready"
                self._call_in_loop(self._notify)
            while not self._stopping:
                self._step()
            self._end_all(ApiError(503, STOPPED, code="stopped"))
            if not self.engine.close():
                raise ResourceError(NOT_KEPT)
        except BaseException as error:  # told to whoever runs the server
            self.failure = error
            self._end_all(ApiError(500, FAILED))
            if hasattr(self, "engine"):
                self._keep_what_was_learned()
        self.state = "stopped"
        # Who made the server may live on, and FastAPI keeps its routes for good.
        for name in ("engine", "_schedulers", "_load"):
            self.__dict__.pop(name, None)
        self._call_in_loop(self._notify)

    def _make_rows(self) -> None:
        """As many as fit."""
        rows = self.rows or self.options.rows
        made = Schedulers(self.engine, self.config, rows, self._first_tenant)
        self._schedulers = made
        self.rows, self.slots, self.draft_length = made.rows, made.slots, made.draft_length

    def _step(self) -> None:
        self._take_commands()
        self._expire()
        self._admit()
        try:
            events = self._schedulers.step()
        except Exception as error:  # a fault of ours, or of the machine
            self._recover(error)
            return
        self.metrics.reverts.inc(self._schedulers.new_reverts())
        moved = [(self._running[key], chunk) for key, chunk in events]
        lost = [job for job in self._running.values() if job.mask and job.mask.failed]
        for key, chunk in events:
            if chunk.result:
                del self._running[key]
        for job in lost:
            self._remove(job)
        self._fail(lost, ApiError(500, "The grammar of this answer failed.", code="grammar_failed"))
        self._deliver_chunks([(job, chunk) for job, chunk in moved if job not in lost])

    def _take_commands(self) -> None:
        """Do what the event loop asked for; wait for it where there is nothing else to do."""
        timeout = None
        if self._running:
            timeout = 0.0
        elif self._waiting:
            timeout = POLL_SECONDS
        with suppress(Empty):
            self._commands.get(timeout=timeout, block=timeout != 0.0)()
            while True:
                self._commands.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _expire(self) -> None:
        now = time.monotonic()
        late = [j for j in (*self._running.values(), *self._waiting) if j.deadline < now]
        for job in late:
            self._remove(job)
        seconds = f"{self.options.deadline:g}"
        error = ApiError(504, f"The answer took more than {seconds} seconds.", code="deadline")
        self._fail(late, error)

    def _admit(self) -> None:
        """Give free rows to those who wait, as far as memory allows."""
        while self._waiting and len(self._running) < self.rows and not self._stopping:
            job = self._waiting[0]
            tokens = len(job.ids) + job.config.max_new_tokens
            if self._running and not self._schedulers.have_room(tokens):
                return
            self._waiting.popleft()
            job.started = time.monotonic()
            try:
                scheduler = self._schedulers.of(job.tenant)
                request = scheduler.add_request(job.request())
            except ResourceError:  # which may name a folder: for the log only
                log.exception("no rows", extra={"event": "no_rows"})
                self._fail([job], ApiError(503, NO_ROOM, code="no_room", retry_after=60))
                continue
            except TtspecError as error:
                self._fail([job], bad_request(str(error)))
                continue
            except Exception:  # no request may end the thread
                log.exception("request failed", extra={"event": "request_failed"})
                self._fail([job], ApiError(500, FAILED))
                continue
            self._running[scheduler, request] = job
            self.metrics.queue_time.observe(job.started - job.queued)

    def _cancel(self, job: Job) -> None:
        if job.ended is None:
            self._remove(job)
            self._end([job])
            self.metrics.cancelled.inc()

    def _remove(self, job: Job) -> None:
        """Take a job out; its row is free."""
        if job in self._waiting:
            self._waiting.remove(job)
        for key in [key for key, other in self._running.items() if other is job]:
            scheduler, request = key
            scheduler.abort(request)
            del self._running[key]

    def _recover(self, error: Exception) -> None:
        """Fail what had a row, and go on with new rows."""
        log.exception("round failed", extra={"event": "round_failed"})
        error.__traceback__ = None  # it holds the old caches
        self.metrics.failed_rounds.inc()
        lost = list(self._running.values())
        self._running.clear()
        self._fail(lost, ApiError(500, FAILED, code="round_failed"))
        del self._schedulers
        self._keep_what_was_learned()
        self.engine = self.engine.sibling()
        if gc.get_freeze_count():
            freeze_heap()
        else:
            gc.collect()
        self._make_rows()

    def _keep_what_was_learned(self) -> None:
        """After a fault: it must not be a second one."""
        try:
            self.engine.close()
        except Exception:
            log.exception("learned weights not kept", extra={"event": "keep_failed"})

    def _deliver_chunks(self, events: list[tuple[Job, Chunk]]) -> None:
        now = time.monotonic()
        for job, chunk in events:
            if job.first_token is None and chunk.token_ids:
                job.first_token = now
                self.metrics.observe_start(job)
        learn = self.config.learn
        self.metrics.observe_step(events, shared=learn is not None and learn.scope == "shared")
        self._end([job for job, chunk in events if chunk.result])
        for job, chunk in events:
            if chunk.result:
                self.metrics.observe_end(job, chunk)
        self._send(events)

    def _fail(self, jobs: Sequence[Job], error: ApiError) -> None:
        live = [job for job in jobs if job.ended is None]
        self._end(live)
        self._send([(job, error) for job in live])

    def _end_all(self, error: ApiError) -> None:
        with self._lock:
            self.state = "draining"
        with suppress(Empty):
            while True:
                self._commands.get_nowait()()
        self._fail([*self._running.values(), *self._waiting], error)

    def _end(self, jobs: Sequence[Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            job.ended = now
        with self._lock:
            self._in_flight -= len(jobs)

    def _send(self, events: Sequence[Event]) -> None:
        if events:
            self._call_in_loop(partial(_put_events, events))

    def _call_in_loop(self, what: Callable[[], None]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(what)


def _put_events(events: Sequence[Event]) -> None:
    for job, event in events:
        job.events.put_nowait((job, event))
