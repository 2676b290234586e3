"""The one table type: text in rows, for the terminal, Markdown and the page alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ttspec.bench.estimates import Estimate, Pair

if TYPE_CHECKING:
    from rich.console import Console

EMPTY = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A heading, what its columns mean, and text in rows; the first column names the row."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    title: str = ""
    note: str = ""

    def markdown(self) -> str:
        """The table for a README."""
        head, *rows = (
            " | ".join(cell.replace("|", r"\|") for cell in line)
            for line in (self.head, *self.rows)
        )
        title = f"**{self.title}**" if self.title else ""
        lines = [f"| {head} |", "|" + "---|" * len(self.head), *(f"| {row} |" for row in rows)]
        parts = [title, "\n".join(lines), self.note]
        return "\n\n".join(filter(None, parts)) + "\n"

    def print(self, console: Console) -> None:
        """The table in a terminal."""
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), title=self.title, title_justify="left"
        )
        for i, cell in enumerate(self.head):
            grid.add_column(Text(cell), justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            grid.add_row(*map(Text, row))
        console.print(grid)
        if self.note:
            console.print(self.note, style="dim")
        console.print()


def table_console() -> Console:
    """A console that is wide enough for the tables where no terminal says how wide it is."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)  # folders may have any name
    if not console.is_terminal:
        console.width = max(console.width, 160)
    return console


def interval(found: Estimate | None, digits: int = 2, *, sign: bool = False) -> str:
    """A value with its interval, if it has one."""
    if found is None:
        return EMPTY
    form = f"{'+' if sign else ''}.{digits}f"
    bounds = f" [{found.low:{form}}, {found.high:{form}}]" if found.has_interval else ""
    return f"{found.value:{form}}{bounds}"


def ratio(found: Pair | None) -> str:
    """The ratio of a pair with its interval, to three digits."""
    return interval(found and found.ratio, 3)


def number(value: float | None, form: str = ".2f", scale: float = 1.0) -> str:
    """A number times `scale`, or a dash."""
    return EMPTY if value is None else f"{scale * value:{form}}"
