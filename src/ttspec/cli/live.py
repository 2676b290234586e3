"""What `ttspec demo` shows while it runs: a live view at a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ttspec.bench.results import Arm
    from ttspec.records import Chunk

RECENT = 32
REFRESH_SECONDS = 0.15
BARS = "▁▂▃▄▅▆▇█"


class PlainView:
    """One line a turn and arm, for pipes and log files."""

    def __init__(self, console: Console, arms: Sequence[Arm], labels: Sequence[str]) -> None:
        self.console = console
        self.labels = dict(zip((arm.name for arm in arms), labels, strict=True))
        self.current = arms[0]
        self.turn = 0
        self.user = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, turn: int, arm: Arm, user: str) -> None:
        """An arm starts to answer a turn."""
        self.turn, self.current, self.user = turn, arm, user

    def chunk(self, chunk: Chunk) -> None:
        """A chunk has arrived and was counted."""

    def end(self) -> None:
        """The current arm has answered the turn."""
        arm = self.current
        line = f"turn {self.turn + 1:2d}  {self.labels[arm.name]:<16}  {arm.tokens:5d} tokens"
        self.console.print(
            f"{line}  {arm.tokens_per_second:.1f} tokens/s  {_so_far(arm)} tokens a forward"
        )


class LiveView(PlainView):
    """The text as it comes, and a table of the arms under it, redrawn a few times a second."""

    def __init__(
        self, console: Console, arms: Sequence[Arm], labels: Sequence[str], goal: int
    ) -> None:
        super().__init__(console, arms, labels)
        self.arms = arms
        self.goal = goal
        self.text = ""
        self.drawn = 0.0
        # Drawn from this thread between two rounds, so that it never competes with one for a core.
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveView:
        self.live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.__exit__(None, None, None)

    def begin(self, turn: int, arm: Arm, user: str) -> None:
        """An arm starts to answer a turn."""
        super().begin(turn, arm, user)
        self.text = ""
        self._draw()

    def chunk(self, chunk: Chunk) -> None:
        """A chunk has arrived and was counted."""
        self.text += chunk.text
        if time.perf_counter() - self.drawn > REFRESH_SECONDS:
            self._draw()

    def end(self) -> None:
        """The current arm has answered the turn."""
        self._draw()

    def _draw(self) -> None:
        self.live.update(Group(self._answer(), self._figures()), refresh=True)
        self.drawn = time.perf_counter()

    def _answer(self) -> Panel:
        console = self.live.console
        width = max(console.width - 4, 20)
        height = max(min(console.height - len(self.arms) - 9, 16), 3)
        question = Text(self.user, style="bold", no_wrap=True, overflow="ellipsis")
        lines = Text(self.text).wrap(console, width)[-height:]
        lines.extend([Text()] * (height - len(lines)))
        title = f"turn {self.turn + 1}: {self.labels[self.current.name]}"
        return Panel(Group(question, *lines), title=title, title_align="left")

    def _figures(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        for title in ("tokens", "tokens/s", f"last {RECENT}", "so far", "updates"):
            table.add_column(title, justify="right")
        table.add_column("tokens a forward, over time")
        for arm in self.arms:
            rounds = arm.rounds
            recent = rounds[-RECENT:]
            table.add_row(
                ("> " if arm is self.current else "  ") + self.labels[arm.name],
                f"{arm.tokens}/{self.goal}",
                f"{arm.tokens_per_second:.1f}",
                f"{sum(r.emitted for r in recent) / len(recent):.2f}" if recent else "–",
                _so_far(arm),
                str(arm.updates),
                sparkline([r.emitted for r in rounds]),
                style="bold" if arm is self.current else None,
            )
        return table


def sparkline(values: Sequence[float], width: int = 20, top: float = 4.0) -> str:
    """Means of `width` equal stretches as bars from 1 to `top`."""
    if len(values) < width:
        return ""
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    levels = [min(max((mean - 1) / (top - 1), 0.0), 1.0) for mean in means]
    return "".join(BARS[round(level * (len(BARS) - 1))] for level in levels)


def _so_far(arm: Arm) -> str:
    value = arm.acceptance()
    return "–" if value is None else f"{value:.2f}"
