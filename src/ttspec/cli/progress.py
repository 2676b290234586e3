"""How far a benchmark is: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ttspec.cli.terminal import say

if TYPE_CHECKING:
    from ttspec.bench.runner import Progress


def show_progress(steps: Iterator[Progress], arms: Sequence[str], out: Path) -> int:
    """Show a run's progress to its end; the exit code."""
    last = next(steps)
    if last.done and last.left:
        say(f"{out} has {last.done} of {last.units} units; going on with the others.")
    try:
        with Bar(last) as bar:
            for last in steps:
                bar.show(last)
    except KeyboardInterrupt:
        say(f"\n{_standing(last, out)} The same command goes on from there.")
        return 130
    except OSError:
        say(_standing(last, out) + " Mend what is said below; the same command goes on from there.")
        raise
    say(_standing(last, out))
    for arm in arms:
        if errors := last.failed.get(arm):
            say(f"{arm}: {len(errors)} units failed; the first: {errors[0]}")
    if last.failed:
        say(f"Tracebacks are in {out / 'failures.log'}; the same command tries them again.")
        return 1
    say(f"Next: ttspec bench report {out}")
    return 0


def _standing(progress: Progress, out: Path) -> str:
    return f"{progress.done} of {progress.units} units are done and kept in {out}."


class Bar:
    """A bar with the time left at a terminal, a line now and then elsewhere."""

    def __init__(self, first: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Rich

        console = Console(stderr=True, highlight=False)
        self.began = self.last_line = time.monotonic()
        # Redrawn from this thread between two units, so that it never takes a core from one.
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        left = TextColumn("{task.fields[left]}")
        self.rich = Rich(
            *columns, left, console=console, auto_refresh=False, disable=not console.is_terminal
        )
        self.task = self.rich.add_task(
            _next(first), total=first.units, completed=first.done, left=""
        )

    def __enter__(self) -> Bar:
        self.rich.start()
        self.rich.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.rich.stop()

    def show(self, progress: Progress) -> None:
        """A unit is over."""
        spent = time.monotonic() - self.began
        seconds = round(spent / max(progress.measured, 1) * progress.units_left)
        left, done = f"{timedelta(seconds=seconds)} left", progress.units - progress.units_left
        self.rich.update(self.task, completed=done, left=left, description=_next(progress))
        self.rich.refresh()
        if self.rich.disable and time.monotonic() - self.last_line > 30:
            self.last_line = time.monotonic()
            say(f"{progress.done} of {progress.units} units, {left}")


def _next(progress: Progress) -> str:
    from rich.markup import escape

    if not progress.left:
        return "done"
    batch = progress.left[0]
    more = f" and {len(batch) - 1} others" if len(batch) > 1 else ""
    return escape(f"{batch[0].arm.name}, request {batch[0].request}{more}")
