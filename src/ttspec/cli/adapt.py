"""`ttspec adapt`: let a drafter learn offline from recorded traffic, as it would in use."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ttspec.cli.options import (
    DraftFlags,
    GenerateFlags,
    ModelFlags,
    Positive,
    SharedLearnFlags,
    options_of,
)
from ttspec.cli.terminal import say
from ttspec.config import GenerateConfig
from ttspec.errors import DataError, OptionError, ResourceError, TrainingError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.decoding.history import Prompt
    from ttspec.records import Result

REPORT_EVERY = 50
"""Answers between two lines about how far it is."""


def adapt(
    traffic: Path,
    *,
    models: ModelFlags = ModelFlags(),
    options: GenerateFlags = GenerateFlags(),
    draft: DraftFlags = DraftFlags(),
    learning: SharedLearnFlags = SharedLearnFlags(),
    rows: Positive = 8,
) -> int:
    """Let a drafter learn from recorded traffic, with the learner that learns in use.

    What a file asks is answered anew, for a drafter learns what its target says; the text of a run
    folder is there already and is read once. It learns every --learn.stride rounds, whatever that
    takes, and --learn.keep gets the version: ttspec learned export makes a drafter of it. Ctrl-C,
    and a signal to end, keep what was learned so far.

    Parameters
    ----------
    traffic
        A file of JSON lines: {"prompt"}, {"messages"} or {"turns"}, or forms of data sets, as for
        `train --prompts`; or a run folder of `ttspec bench run`.
    rows
        Requests side by side.
    """
    if learning.scope not in (None, "shared"):
        raise OptionError(
            f"--learn.scope is {learning.scope}; what is adapted is one drafter for all "
            "requests.\nDrop it."
        )
    if learning.keep is None:
        raise OptionError("adapt would keep nothing.\nGive --learn.keep, a folder for versions.")
    # Nobody waits for these answers: updates may take the time that they take.
    draft = draft if draft.adaptive is not None else replace(draft, adaptive=False)
    learn = replace(learning, scope="shared").config()
    chosen = {"seed": 0, **options.options(), "draft": draft.config(), "learn": learn}
    config = GenerateConfig(**chosen)
    is_run = (traffic / "manifest.json").is_file()
    dialogues = [] if is_run else _dialogues(traffic)  # complains before a model is loaded
    engine = models.load(notify=say)
    if engine.drafter is None or not engine.drafter.weights:
        raise OptionError("adapt needs a drafter with weights.\nName one with --drafter.")
    with _ending_as_ctrl_c():
        try:
            if is_run:
                answers = _replayed_answers(engine, traffic, config, rows)
            else:
                fit = _that_fit(engine, dialogues, config, traffic)
                answers = _new_answers(engine, fit, config, rows)
            interrupted = _report_progress(answers)
        finally:
            kept = engine.close()  # the last version is written
    if not kept:
        raise ResourceError(
            f"What was learned could not be written to {learning.keep}, and is lost.\nMake room "
            "there, or name another folder with --learn.keep."
        )
    _report_version(engine, config)
    return 130 if interrupted else 0


def _dialogues(traffic: Path) -> list[list[Prompt]]:
    from ttspec.training.answers import read_dialogues

    dialogues = read_dialogues(traffic)
    if any(turn is None for turns in dialogues for turn in turns):
        raise DataError(
            f"{traffic} has a turn that is null, which asks the target to write it; that is for "
            "training.\nLeave it out."
        )
    return cast("list[list[Prompt]]", dialogues)


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


def _report_progress(answers: Iterator[Result]) -> bool:
    """Say how far it is and what the drafter gains; whether it was interrupted."""
    from ttspec.records import acceptance_length

    count, rounds = 0, []
    try:
        for count, result in enumerate(answers, 1):
            if result.finish_reason == "cancelled":
                return True
            rounds += result.rounds
            if count % REPORT_EVERY == 0:
                length = acceptance_length(rounds)
                say(f"{count} answers; acceptance length of the last {REPORT_EVERY}: {length:.3f}")
                rounds = []
    except KeyboardInterrupt:
        return True
    if rounds and count < REPORT_EVERY:
        say(f"Acceptance length: {acceptance_length(rounds):.3f}")
    return False


def _report_version(engine: Engine, config: GenerateConfig) -> None:
    """Say what the version is worth that drafts from now on.

    Raises:
        TrainingError: There is none.
    """
    from ttspec.decoding.shared_weights import fingerprint
    from ttspec.learning.delta import weights_sha256
    from ttspec.learning.versions import current_of, place_of

    assert engine.drafter is not None
    assert config.learn is not None
    root = Path(str(config.learn.keep)).expanduser()
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
        f"drafts are accepted, {accepted['anchor']:.3f} of the drafter as it was.\n"
        f"ttspec learned export {config.learn.keep} --out FOLDER makes a drafter of it."
    )
