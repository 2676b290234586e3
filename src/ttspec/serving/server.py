"""From the command line to the last answer: load, listen, drain, exit."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.errors import ResourceError
from ttspec.serving.app import make_app
from ttspec.serving.keys import ANYBODY, read_keys
from ttspec.serving.metrics import ServerMetrics
from ttspec.serving.options import ServeOptions
from ttspec.serving.worker import Worker

KEEP_ALIVE = 15
"""Seconds that an idle connection stays."""


def serve(
    load: Callable[[], Engine],
    config: GenerateConfig,
    options: ServeOptions,
    model: str,
    say: Callable[[str], None],
) -> int:
    """Serve until told to stop; arguments and errors as in `make_server`.

    Told to stop while models load, it ends the process, with 0.

    Returns:
        0, once all is over.

    Raises:
        ResourceError: The address is taken.
        TtspecError: What loading says.
    """
    server = make_server(load, config, options, model, say)
    code = server.run_to_the_end()
    if server.worker.is_loading:  # Python's own end would abort in the middle of torch's work
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def make_server(
    load: Callable[[], Engine],
    config: GenerateConfig,
    options: ServeOptions,
    model: str,
    say: Callable[[str], None],
) -> Server:
    """A server that has not begun.

    `load` is called in the engine's thread, while the server already listens.

    Raises:
        OptionError, DataError: Keys are missing, or their file is unusable.
    """
    options.require_keys()
    keys = read_keys(options.api_key_file) if options.api_key_file else None
    metrics, tenant = ServerMetrics(model), keys.names[0] if keys else ANYBODY
    worker = Worker(load, config, options, metrics, tenant)
    app = make_app(worker, keys, metrics, model)
    settings = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,  # answers have ended by then
        limit_concurrency=4 * (options.queue + options.rows) + 64,
        h11_max_incomplete_event_size=32 * 1024,
    )
    return Server(settings, worker, say)


class Server(uvicorn.Server):
    """Uvicorn that lets answers end first, and exits with 0 when it was asked to end."""

    def __init__(self, config: uvicorn.Config, worker: Worker, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self.worker, self._say = worker, say
        self._signals = 0
        self.address = ""
        """Where it listens, once it does."""

    def run_to_the_end(self) -> int:
        """Listen, load, answer, drain; see `serve`."""
        try:
            asyncio.run(self.serve())
        finally:
            self.worker.stop()
        if isinstance(self.worker.failure, Exception):
            raise self.worker.failure
        return 0

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, and begin to load."""
        try:
            await super().startup(sockets)
        except SystemExit as error:  # uvicorn's way to say that it cannot listen
            raise ResourceError(
                f"Nothing can listen at {self.config.host}:{self.config.port}; is it taken?\n"
                "Give another --port or --host."
            ) from error
        loop = asyncio.get_running_loop()
        self.worker.start(loop, self._on_state)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._say(f"Listening at {self.address} while the models load.")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again at the end, which would be the exit code."""
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGTERM, signal.SIGINT) if main else ()
        for one in handled:
            loop.add_signal_handler(one, self._end)
        try:
            yield
        finally:
            for one in handled:
                loop.remove_signal_handler(one)

    def _end(self) -> None:
        """A signal: drain. Another one: wait for no answer. A third one: for nothing."""
        self._signals += 1
        if self._signals > 2:
            self.should_exit = self.force_exit = True
        if self._signals > 1:
            return
        self.worker.drain()
        if answers := sum(self.worker.load):
            seconds = f"{self.worker.options.drain:g}"
            self._say(f"Ending: answers have {seconds} seconds to end; there are {answers}.")
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Let what was begun end, while the server still tells that it is draining."""
        until = time.monotonic() + self.worker.options.drain
        while sum(self.worker.load) and time.monotonic() < until and self._signals == 1:
            await asyncio.sleep(0.05)
        if self.worker.rows and (learn := self._learn()) and learn.keep:
            self._say(f"Writing what was learned to {learn.keep}. Another signal may lose it.")
        if sum(self.worker.load):
            await asyncio.to_thread(self.worker.stop)
        self.should_exit = True

    def _on_state(self) -> None:
        """The worker is ready, or over."""
        if self.worker.state == "stopped":
            self.should_exit = True
        elif self.worker.state == "ready":
            rows, slots = self.worker.rows, self.worker.slots
            who = self._learning_scope()
            many = f"{rows} row{'s' * (rows > 1)} of {slots:,} tokens"
            self._say(f"Ready: {many}. {who}. To chat: {self.address}/")

    def _learning_scope(self) -> str:
        if (learn := self._learn()) is None:
            return "Nothing is learned"
        if learn.scope != "shared":
            one = "request" if learn.scope == "request" else "conversation"
            return f"Each {one} teaches a drafter of its own"
        whose = " of a tenant" if self.worker.options.api_key_file else ""
        kept = f"kept in {learn.keep}" if learn.keep else "which ends with the server"
        return f"All requests{whose} teach one drafter, {kept}"

    def _learn(self) -> LearnConfig | None:
        """How the pair learns, once it is loaded; None if nothing does."""
        drafter = self.worker.engine.drafter
        return self.worker.config.learn if drafter and drafter.weights else None
