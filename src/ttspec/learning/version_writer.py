"""Writes versions beside the rounds: one at a time, and of those that wait only the newest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from ttspec.learning.versions import Version

WriteVersion = Callable[[], Version]
"""What it holds on to is free once it is done or was overtaken."""


class VersionWriter:
    """A thread that writes what it is given. A disk that takes nothing stops writing only."""

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        """Nothing to write yet; `notify` is told once that a disk fails, and once that it does not.

        It is called from the thread.
        """
        self.written: Version | None = None
        """The last one that is on disk."""
        self.failed = False
        """Whether the last attempt failed."""
        self._notify, self._job = notify, None
        self._job: WriteVersion | None
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: WriteVersion) -> None:
        """Have a version written soon; one that still waits is not written any more."""
        with self._changed:
            self._job = job
            if self._thread is None:  # a process that learns nothing worth keeping has none
                self._thread = threading.Thread(target=self._run, name="ttspec-kept", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all that was submitted is written, or was refused by the disk."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._job or self._busy))

    def close(self) -> None:
        """Write what waits, and end."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._job or self._closed)
                if self._job is None:
                    return
                job, self._job, self._busy = self._job, None, True
            try:
                self._write(job)
            finally:
                del job
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _write(self, job: WriteVersion) -> None:
        try:
            self.written = job()
        except Exception as error:  # the thread must live: who closes waits for it
            failed_before, self.failed = self.failed, True
            if not failed_before:
                first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                self._tell(
                    f"{first}. What is learned goes on drafting, and is kept "
                    "as soon as the disk takes it."
                )
            return
        if self.failed:
            self._tell(f"{self.written.path} was written: what is learned is kept again.")
        self.failed = False

    def _tell(self, message: str) -> None:
        if self._notify:
            with suppress(Exception):
                self._notify(message)
