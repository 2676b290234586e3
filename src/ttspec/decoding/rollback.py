"""Which rows' recurrent states can go back, and how far. Keys and values go back any distance.

`PromptReader` asks it which rows must be read again.
"""

from ttspec.decoding.rows import RowStates

LOST = -1


class RollbackLimits:
    """How far back the target's recurrent states of each row can go; others have no limit."""

    def __init__(self, rows: RowStates, *, recurrent: bool) -> None:
        """All rows are empty."""
        self._rows, self._recurrent = rows, recurrent
        self._least = [0] * rows.count
        """A row's length, or `LOST`: then all that it holds is read again before it goes on."""

    def invalidate(self, rows: list[int]) -> None:
        """Say that the states of some rows may be of another text."""
        for row in rows if self._recurrent else ():
            self._least[row] = LOST

    def validate(self, row: int) -> None:
        """The states of this row go back to where it is now, no further."""
        self._least[row] = self._rows.lengths[row]

    def is_lost(self, row: int) -> bool:
        """Whether the states are of another text."""
        return self._least[row] == LOST

    def crop(self, row: int, length: int) -> None:
        """A row goes back to `length`, further perhaps than its states do."""
        if length < self._least[row]:
            self.invalidate([row])
