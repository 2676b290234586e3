"""`--save-drafter` and `--resume-drafter`: what a drafter learned, and going on from there.

A folder is a checkpoint for `--drafter`; a .safetensors file has only the change.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from cyclopts import Parameter

from ttspec.cli.options import ModelFlags
from ttspec.cli.terminal import say
from ttspec.errors import OptionError, TtspecError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.decoding.session import Session
    from ttspec.drafters.base import Drafter


FILE = ".safetensors"
"""How the name of a file ends that has only the change."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SaveFlags:
    """Where what is learned goes, and where drafting begins."""

    save_drafter: Path | None = None
    """A new or empty folder for the drafter as it is at the end, for --drafter; or a new
    .safetensors file for what was learned only, for --resume-drafter."""
    resume_drafter: Path | None = None
    """A .safetensors file that --save-drafter wrote: drafting begins there."""

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
        if self.save_drafter.suffix == FILE:
            from ttspec.learning.delta import require_new

            require_new(self.save_drafter)
            return
        from ttspec.drafters.export import require_empty

        require_empty(self.save_drafter)

    def resumed(self, models: ModelFlags) -> tuple[ModelFlags, Path | None]:
        """The models to load where drafting goes on, and the file that a session needs.

        Raises:
            OptionError: `--drafter` says something else.
            CheckpointError: There is no such file, or it is unusable.
        """
        path = self.resume_drafter
        if path is None:
            return models, None
        if models.drafter == "none":
            raise OptionError(
                "--resume-drafter was given together with --drafter none.\nDrop one of the two."
            )
        from ttspec.learning.delta import read_delta

        delta = read_delta(path)  # complains before a model is loaded
        return replace(models, drafter=delta.drafter) if models.drafter == "auto" else models, path

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
        try:
            drafter = session.learned()
        except OptionError as error:
            say(f"Nothing was saved: {error}")
            return
        try:
            _write(session, drafter, path)
        except BaseException:  # another process has the place, or the disk is full
            _rescue(session)
            raise


def _write(session: Session, drafter: Drafter, path: Path) -> None:
    """Write a session's drafter as it is, or what it learned."""
    from ttspec.drafters.export import export_drafter

    if path.suffix == FILE:
        session.save(path)
        say(f"{path} holds what was learned; --resume-drafter {path} goes on from there.")
        return
    export_drafter(drafter, session.engine.target, "published", path, dtype="auto")
    say(f"{path} holds the drafter as it is now; --drafter {path} goes on from there.")


def _rescue(session: Session) -> None:
    """Keep what was learned among temporary files, if they take it, and say where."""
    with suppress(OSError, TtspecError):
        folder = Path(mkdtemp(prefix="ttspec-learned-"))
        try:
            session.save(path := folder / f"learned{FILE}")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        say(f"What was learned stays: --resume-drafter {path}")
