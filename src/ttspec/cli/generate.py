"""`ttspec generate`: one answer to one prompt."""

import sys
from contextlib import closing
from typing import Annotated

from cyclopts import Parameter

from ttspec.cli.options import (
    DraftFlags,
    GenerateFlags,
    JsonFlag,
    LearnFlag,
    LearnFlags,
    ModelFlags,
)
from ttspec.cli.saving import SaveFlags
from ttspec.cli.terminal import (
    follow,
    low_acceptance,
    note_missing_template,
    say,
    show_nothing,
    show_text,
    summary,
    to_json,
)
from ttspec.config import GenerateConfig
from ttspec.errors import DataError, OptionError


def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    models: ModelFlags = ModelFlags(),
    options: GenerateFlags = GenerateFlags(),
    draft: DraftFlags = DraftFlags(),
    learn: LearnFlag = True,
    learning: LearnFlags = LearnFlags(),
    saving: SaveFlags = SaveFlags(),
    as_json: JsonFlag = False,
) -> int:
    """Generate one answer and stream it to standard output.

    Parameters
    ----------
    prompt
        The user's text; - reads it from standard input.
    learn
        Whether the drafter learns while it generates.
    as_json
        Print one JSON object with text, token_ids, finish_reason and stats instead.
    """
    saving.check_place(learn=learn)
    settings = options.options() | {"draft": draft.config(), "learn": learning.config_if(learn)}
    GenerateConfig(**settings)  # complains before anything is loaded
    text = read_prompt(prompt)
    engine = models.load(notify=say)
    saving.check_drafter(engine)
    note_missing_template(engine, settings)
    session = engine.session(**settings) if saving.save_drafter else None
    chunks = session.stream(text) if session else engine.stream(text, **settings)
    with closing(engine):
        result = follow(chunks, show_nothing if as_json else show_text)
        if as_json:
            print(to_json(result.to_dict()))
        else:
            print(flush=True)
        if sys.stderr.isatty():
            say(summary(result.stats))
        if warning := low_acceptance(result.rounds):
            say(warning)
        if session:
            saving.save(session)
    return 130 if result.finish_reason == "cancelled" else 0


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for a dash."""
    if prompt.startswith("--"):
        raise OptionError(f"PROMPT is {prompt!r}, which looks like an option that does not exist.")
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text: {error.reason}.") from error
