"""`--save-drafter`: the drafter as it has become, as a folder for `--drafter`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from cyclopts import Parameter

from ttspec.cli.terminal import say
from ttspec.errors import OptionError, TtspecError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.decoding.session import Session


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SaveFlags:
    """Where what is learned goes."""

    save_drafter: Path | None = None
    """A new or empty folder for the drafter as it is at the end, for --drafter."""

    def check_place(self, *, learn: bool) -> None:
        """Refuse what cannot be saved, before anything is loaded.

        Raises:
            OptionError: Something is there already, or nothing will be learned.
        """
        if self.save_drafter is None:
            return
        if not learn:
            raise OptionError(
                "--no-learn was given together with --save-drafter.\nDrop one of the two."
            )
        from ttspec.drafters.export import require_empty

        require_empty(self.save_drafter)

    def check_drafter(self, engine: Engine) -> None:
        """Refuse a drafter that has nothing to save.

        Raises:
            OptionError: There is none, or its kind has no weights.
        """
        drafter = engine.drafter
        if self.save_drafter is None or (drafter is not None and drafter.weights):
            return
        why = "there is none" if drafter is None else f"{drafter.name} has none"
        raise OptionError(
            f"--save-drafter needs a drafter with weights, and {why}.\n"
            "Give --drafter a checkpoint, or drop --save-drafter."
        )

    def save(self, session: Session) -> None:
        """Write the session's drafter as it is now; says so, or why there is nothing to write."""
        path = self.save_drafter
        if path is None:
            return
        from ttspec.drafters.export import export_drafter

        try:
            drafter = session.learned()
        except OptionError as error:
            say(f"Nothing was saved: {error}")
            return

        def write(folder: Path) -> None:
            export_drafter(drafter, session.engine.target, "published", folder, dtype="auto")

        try:
            write(path)
        except BaseException:  # another process has the place, or the disk is full
            _rescue(write)
            raise
        say(f"{path} holds the drafter as it is now; --drafter {path} goes on from there.")


def _rescue(write: Callable[[Path], None]) -> None:
    """Keep what was learned among temporary files, if they take it, and say where."""
    with suppress(OSError, TtspecError):
        folder = Path(mkdtemp(prefix="ttspec-learned-"))
        try:
            write(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        say(f"What was learned stays: --drafter {folder}")
