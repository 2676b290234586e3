"""`--save-drafter`: what a drafter learned, as a checkpoint that `--drafter` takes up again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ttspec.cli.terminal import say
from ttspec.errors import OptionError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine, Session


def check_place(folder: Path | None, *, learn: bool) -> None:
    """Refuse what cannot be saved, before anything is loaded.

    Raises:
        OptionError: There is something at `folder`, or nothing will be learned.
    """
    if folder is None:
        return
    if not learn:
        raise OptionError(
            "--no-learn was given together with --save-drafter.\nDrop one of the two."
        )
    from ttspec.drafters.export import require_empty

    require_empty(folder)


def check_drafter(folder: Path | None, engine: Engine) -> None:
    """Refuse a drafter that has nothing to save.

    Raises:
        OptionError: There is none, or its kind has no weights.
    """
    if folder is None or (engine.drafter is not None and engine.drafter.weights):
        return
    why = "there is none" if engine.drafter is None else f"{engine.drafter.name} has none"
    raise OptionError(
        f"--save-drafter needs a drafter with weights, and {why}.\n"
        "Give --drafter a checkpoint, or drop --save-drafter."
    )


def save_learned(session: Session, folder: Path | None) -> None:
    """Write the session's drafter as it is now; says so, or why there is nothing to write."""
    if folder is None:
        return
    from ttspec.drafters.export import export_drafter

    try:
        drafter = session.learned()
    except OptionError as error:
        say(f"Nothing was saved: {error}")
        return
    export_drafter(drafter, session.engine.target, "published", folder, dtype="auto")
    say(f"{folder} holds the drafter as it is now; --drafter {folder} goes on from there.")
