"""`--save-drafter` and `--resume-drafter`: what a drafter learned, and going on from there.

A folder is a checkpoint like any other; a .safetensors file has only the change.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ttspec.cli.terminal import say
from ttspec.errors import OptionError

if TYPE_CHECKING:
    from ttspec.cli.options import ModelFlags
    from ttspec.decoding.engine import Engine
    from ttspec.decoding.session import Session


FILE = ".safetensors"
"""How the name of a file ends that has only the change."""


def resumed(models: ModelFlags, path: Path | None) -> tuple[ModelFlags, Path | None]:
    """The models to load when drafting goes on from `path`, and the file that a session needs.

    Raises:
        OptionError: `--drafter` says something else.
        CheckpointError: There is no such file, or it is unusable.
    """
    if path is None:
        return models, None
    if models.drafter == "none" or (path.is_dir() and models.drafter != "auto"):
        raise OptionError(
            f"--resume-drafter was given together with --drafter {models.drafter}.\n"
            "Drop one of the two."
        )
    if path.is_dir():
        return replace(models, drafter=str(path)), None
    from ttspec.learning.delta import read_delta

    delta = read_delta(path)  # complains before a model is loaded
    return replace(models, drafter=delta.drafter) if models.drafter == "auto" else models, path


def check_place(path: Path | None, *, learn: bool) -> None:
    """Refuse what cannot be saved, before anything is loaded.

    Raises:
        OptionError: There is something at `path`, or nothing will be learned.
    """
    if path is None:
        return
    if not learn:
        raise OptionError(
            "--no-learn was given together with --save-drafter.\nDrop one of the two."
        )
    if path.suffix == FILE:
        from ttspec.learning.delta import require_new

        require_new(path)
        return
    from ttspec.drafters.export import require_empty

    require_empty(path)


def check_drafter(path: Path | None, engine: Engine) -> None:
    """Refuse a drafter that has nothing to save.

    Raises:
        OptionError: There is none, or its kind has no weights.
    """
    if path is None or (engine.drafter is not None and engine.drafter.weights):
        return
    why = "there is none" if engine.drafter is None else f"{engine.drafter.name} has none"
    raise OptionError(
        f"--save-drafter needs a drafter with weights, and {why}.\n"
        "Give --drafter a checkpoint, or drop --save-drafter."
    )


def save_learned(session: Session, path: Path | None) -> None:
    """Write the session's drafter as it is now; says so, or why there is nothing to write."""
    if path is None:
        return
    from ttspec.drafters.export import export_drafter

    try:
        if path.suffix == FILE:
            session.save(path)
            say(f"{path} holds what was learned; --resume-drafter {path} goes on from there.")
            return
        drafter = session.learned()
    except OptionError as error:
        say(f"Nothing was saved: {error}")
        return
    export_drafter(drafter, session.engine.target, "published", path, dtype="auto")
    say(f"{path} holds the drafter as it is now; --drafter {path} goes on from there.")
