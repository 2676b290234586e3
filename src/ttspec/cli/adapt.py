"""`ttspec adapt`: let a drafter learn offline from recorded traffic, as it would in use."""

from __future__ import annotations

import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TYPE_CHECKING, Any, cast

from ttspec.cli.options import (
    DraftFlags,
    GenerateFlags,
    LearnFlags,
    ModelFlags,
    Positive,
    options_of,
)
from ttspec.cli.terminal import say
from ttspec.config import GenerateConfig
from ttspec.errors import DataError, OptionError, ResourceError, TrainingError, TtspecError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine, Prompt
    from ttspec.learning.versions import Version
    from ttspec.records import Result

REPORT_EVERY = 50
"""Answers between two lines about how far it is."""
PREFIX = "ttspec-adapt-"
"""Of the folder for versions that nobody asked to keep."""


def adapt(
    traffic: Path,
    *,
    out: Path | None = None,
    models: ModelFlags = ModelFlags(),
    options: GenerateFlags = GenerateFlags(),
    draft: DraftFlags = DraftFlags(),
    learning: LearnFlags = LearnFlags(),
    rows: Positive = 8,
) -> int:
    """Let a drafter learn from recorded traffic, with the learner that learns in use.

    What a file asks is answered anew, for a drafter learns what its target says; the text of a run
    folder is there already and is read once. It learns every --learn.stride rounds, whatever that
    takes. Ctrl-C, and a signal to end, keep what was learned so far.

    Parameters
    ----------
    traffic
        A file of JSON lines: {"prompt"}, {"messages"} or {"turns"}, or forms of data sets, as for
        `train --prompts`; or a run folder of `ttspec bench run`.
    out
        A new or empty folder for the drafter. Left out, --learn.keep gets a version and that is
        all.
    rows
        Requests side by side.
    """
    keep, scope = (getattr(learning, name) for name in ("keep", "scope"))
    if scope not in (None, "shared"):
        raise OptionError(
            f"--learn.scope is {scope}; what is adapted is one drafter for all requests.\nDrop it."
        )
    if out is None and keep is None:
        raise OptionError(
            "adapt would keep nothing.\nGive --out, a folder for the drafter, or --learn.keep, one "
            "for versions of it, or both."
        )
    # Nobody waits for these answers: updates may take the time that they take.
    draft = draft if draft.adaptive is not None else replace(draft, adaptive=False)
    with ExitStack() as work:
        if out is not None:
            work.enter_context(_new_folder(out))
        tell, place = say, f"{keep}"
        if keep is None:
            keep = Path(mkdtemp(prefix=PREFIX))
            work.callback(shutil.rmtree, keep, ignore_errors=True)
            tell, place = _say_without(keep), f"{gettempdir()}, where temporary files go"
        learn = replace(learning, scope="shared", keep=str(keep)).config()
        settings = {**options.options(), "draft": draft.config(), "learn": learn}
        settings = {"seed": 0} | settings
        engine, version, interrupted = _adapt(traffic, models, settings, rows, tell, place)
        if out is not None:
            try:
                _export(engine, version, out)
            except BaseException as error:
                if not isinstance(error, TtspecError):  # which comes before anything is written
                    shutil.rmtree(out, ignore_errors=True)  # half a drafter is none
                work.pop_all()
                say(f"What was learned stays: ttspec learned export {keep} --out FOLDER")
                raise
    return 130 if interrupted else 0


def _say_without(folder: Path) -> Callable[[str], None]:
    """`say`, but for where a folder is that will be gone before anybody could look at it."""
    named = re.compile(rf" in {re.escape(str(folder))}[^:\s]*")
    return lambda line: say(named.sub("", line))


@contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """Make a folder before the work that fills it, and remove it if it stays empty.

    Raises:
        OptionError: It is not empty.
        OSError: It cannot be made.
    """
    from ttspec.drafters.export import require_empty

    require_empty(out)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            if is_new:
                out.rmdir()


@contextmanager
def _ending_as_ctrl_c() -> Iterator[None]:
    """Let a signal to end be an interrupt, which keeps what there is."""
    if threading.current_thread() is not threading.main_thread():  # only that one may
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _adapt(
    traffic: Path,
    models: ModelFlags,
    settings: dict[str, Any],
    rows: int,
    tell: Callable[[str], None],
    place: str,
) -> tuple[Engine, Version, bool]:
    """Learn; the engine, the version that drafts best, and whether it was interrupted.

    `place` is what a user calls the folder of the versions.
    """
    from ttspec.training.answers import read_dialogues

    config, is_run = GenerateConfig(**settings), (traffic / "manifest.json").is_file()
    dialogues = [] if is_run else read_dialogues(traffic)  # complains before a model is loaded
    if any(turn is None for turns in dialogues for turn in turns):
        raise DataError(
            f"{traffic} has a turn that is null, which asks the target to write it; that is for "
            "training.\nLeave it out."
        )
    engine = models.load(notify=tell)
    if engine.drafter is None or not engine.drafter.weights:
        raise OptionError("adapt needs a drafter with weights.\nName one with --drafter.")
    with _ending_as_ctrl_c():
        if is_run:
            answers = _replayed_answers(engine, traffic, config, rows)
        else:
            asked = cast("list[list[Prompt]]", dialogues)
            answers = _new_answers(engine, _that_fit(engine, asked, config, traffic), config, rows)
        try:
            interrupted = _report_progress(answers)
        finally:
            kept = engine.close()  # the last version is written
    return engine, _kept_version(engine, config, None if kept else place), interrupted


def _that_fit(
    engine: Engine, dialogues: list[list[Prompt]], config: GenerateConfig, traffic: Path
) -> list[list[Prompt]]:
    """Those whose first prompt leaves room for an answer; says how many do not.

    Raises:
        DataError: None does.
    """
    from ttspec.decoding.history import ChatHistory

    template = engine.chat_template(config)
    context = min(engine.target.context, config.context or engine.target.context)
    fit = [turns for turns in dialogues if len(ChatHistory(template).ask(turns[0])) < context]
    why = f"leave no room for an answer in {context} tokens"
    if not fit:
        raise DataError(f"All prompts of {traffic} {why}.\nGive shorter ones.")
    if left := len(dialogues) - len(fit):
        say(f"{left} of {len(dialogues)} prompts of {traffic} teach nothing: they {why}.")
    return fit


def _new_answers(
    engine: Engine, dialogues: list[list[Prompt]], config: GenerateConfig, rows: int
) -> Iterator[Result]:
    """The target's answers to what was asked."""
    for _, chunk in engine.run(dialogues, rows=rows, stream=False, **options_of(config)):
        if chunk.result:
            yield chunk.result


def _replayed_answers(
    engine: Engine, folder: Path, config: GenerateConfig, rows: int
) -> Iterator[Result]:
    """The answers of a run, which are read and not written."""
    from ttspec.bench.arms import ArmSpec
    from ttspec.bench.replay import open_source, prepare, replayable
    from ttspec.bench.runner import measure

    arm = ArmSpec(name="adapt", kind="learn-shared", draft=config.draft, learn=config.learn)
    (arm,) = replayable([arm])
    made = prepare(engine, open_source(folder), [arm], {}, rows)
    for note in made.manifest["notes"]:
        say(note)
    chosen = {**made.options, "draft": arm.draft, "learn": config.learn, "tenant": config.tenant}
    chosen["quota"] = made.session_tokens
    for batch in made.batches:
        for turns in measure(engine, batch, made.requests, **chosen):
            yield from (turn.result for turn in turns)


def _report_progress(answers: Iterator[Result]) -> bool:
    """Say how far it is and what the drafter gains; whether it was interrupted."""
    from ttspec.records import acceptance_length

    lengths, rounds = list[float](), []
    try:
        for count, result in enumerate(answers, 1):
            if result.finish_reason == "cancelled":
                return True
            rounds += result.rounds
            if count % REPORT_EVERY == 0:
                lengths.append(acceptance_length(rounds))
                last = f"acceptance length of the last {REPORT_EVERY}: {lengths[-1]:.3f}"
                say(f"{count} answers; {last}")
                rounds = []
    except KeyboardInterrupt:
        return True
    if not lengths and rounds:
        say(f"Acceptance length: {acceptance_length(rounds):.3f}")
    return False


def _kept_version(engine: Engine, config: GenerateConfig, full: str | None) -> Version:
    """The version that drafts from now on; says what it is worth.

    `full` is where it could not be written, if it could not.

    Raises:
        ResourceError: The disk took none.
        TrainingError: None is worth keeping.
    """
    from ttspec.decoding.shared_weights import fingerprint
    from ttspec.learning.delta import weights_sha256
    from ttspec.learning.versions import current_of, place_of

    assert engine.drafter is not None
    assert config.learn is not None
    root = Path(str(config.learn.keep)).expanduser()
    if full:
        raise ResourceError(
            f"What was learned could not be written to {full}, and is lost.\nMake room there, or "
            "name another folder with --learn.keep."
        )
    pair = fingerprint(engine.target), weights_sha256(engine.drafter.weights)
    found = current_of(place_of(root, *pair, config.tenant))
    if found is None:
        raise TrainingError(
            "Nothing was learned that is known to draft as well as the drafter does; nothing was "
            "written.\nGive more traffic, or a larger --max-new-tokens."
        )
    accepted = found.manifest["held_out"]["accepted"]
    say(
        f"On {found.manifest['held_out']['blocks']} held-out blocks {accepted['version']:.3f} "
        f"drafts are accepted, {accepted['anchor']:.3f} of the drafter as it was."
    )
    return found


def _export(engine: Engine, version: Version, out: Path) -> None:
    from ttspec.drafters.export import export_drafter

    assert engine.drafter is not None
    export_drafter(version.delta().changed(engine.drafter), engine.target, "published", out)
    say(f"{out} holds the drafter: --drafter {out}")
