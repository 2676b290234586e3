"""The server's log: one JSON object a line, never a text of a request or a key.

A record says what happened by `extra={"event": NAME, "fields": {...}}`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("ttspec.serving")


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, event and its fields; never a text of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        fields: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Meanwhile, write records of the server, of uvicorn and of asyncio as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    # asyncio warns of each write to a client that left, which the request's own line tells.
    levels = {"ttspec.serving": logging.INFO, "uvicorn": logging.WARNING, "asyncio": logging.ERROR}
    loggers = [logging.getLogger(name) for name in levels]
    for logger, level in zip(loggers, levels.values(), strict=True):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger in loggers:
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.NOTSET)
