"""`ttspec chat`: a conversation in the terminal, in one session whose drafter keeps learning."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from ttspec.cli.options import (
    TEXT,
    DraftFlags,
    GenerateFlags,
    LearnFlag,
    ModelFlags,
    SessionLearnFlags,
)
from ttspec.cli.saving import SaveFlags
from ttspec.cli.terminal import (
    follow,
    low_acceptance,
    note_missing_template,
    say,
    show_text,
    summary,
)
from ttspec.config import GenerateConfig
from ttspec.errors import DataError, TtspecError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.records import Result

HELP = "Ctrl-C stops an answer, Ctrl-D or /quit leaves; /stats shows figures, /reset starts afresh."


@Parameter(name="*", group=TEXT)
@dataclass(frozen=True, kw_only=True)
class ChatFlags(GenerateFlags):
    """Sampling options, with room for longer answers."""

    max_new_tokens: int = 1024
    """Tokens of one answer at most."""


def chat(
    *,
    models: ModelFlags = ModelFlags(),
    options: ChatFlags = ChatFlags(),
    draft: DraftFlags = DraftFlags(),
    learn: LearnFlag = True,
    learning: SessionLearnFlags = SessionLearnFlags(),
    saving: SaveFlags = SaveFlags(),
) -> int:
    """Talk with the target; the drafter learns over the whole conversation.

    Standard input may be a pipe: every line is then one turn.

    Parameters
    ----------
    learn
        Whether the drafter learns while it talks.
    """
    saving.check_place(learn=learn)
    settings = options.options() | {"draft": draft.config(), "learn": learning.config_if(learn)}
    GenerateConfig(**settings)  # complains before anything is loaded
    engine = models.load(notify=say)
    saving.check_drafter(engine)
    note_missing_template(engine, settings)
    conversation = ChatLoop(engine, settings)
    with closing(engine):
        try:
            return conversation.run(at_terminal=sys.stdin.isatty())
        finally:
            saving.save(conversation.session)


class ChatLoop:
    """A session, the results of its turns, and the commands that begin with a slash."""

    def __init__(self, engine: Engine, settings: dict[str, Any]) -> None:
        self.engine, self.settings = engine, settings
        self.warned = False
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and what the drafter learned in it."""
        self.session = self.engine.session(**self.settings)
        self.results: list[Result] = []

    def run(self, *, at_terminal: bool) -> int:
        """Answer line after line until the input ends or the user leaves."""
        if at_terminal:
            import readline  # noqa: F401  arrow keys and history in input()

            say(HELP)
        while True:
            try:
                line = _read_line(at_terminal)
            except KeyboardInterrupt:
                if not at_terminal:
                    return 130
                say("")
                continue
            if line is None or line == "/quit":
                return 0
            if not line:
                continue
            try:
                interrupted = self.turn(line)
            except KeyboardInterrupt:  # before the answer had begun
                interrupted = True
            except TtspecError as error:
                if not at_terminal:
                    raise
                say(str(error))
                continue
            if interrupted and not at_terminal:
                return 130

    def turn(self, line: str) -> bool:
        """Obey a command or answer a text; whether the answer was cut short by Ctrl-C."""
        match line:
            case "/stats":
                say(self.figures())
            case "/reset":
                self.reset()
                say(f"A new conversation begins{self._what_stays()}.")
            case _ if line.startswith("/") and line[1:].isalpha():
                say(f"{line} is no command. {HELP}")
            case _:
                return self.answer(line)
        return False

    def _what_stays(self) -> str:
        """What `/reset` does to what was learned, if anything learns."""
        learn, drafter = self.settings["learn"], self.engine.drafter
        if learn is None or drafter is None or not drafter.weights:
            return ""
        if learn.scope == "shared":
            return "; what the drafter learned stays"
        return "; what the drafter learned is forgotten"

    def answer(self, text: str) -> bool:
        """Stream the answer to a text; whether Ctrl-C cut it short."""
        result = follow(self.session.stream(text), show_text)
        print(flush=True)
        self.results.append(result)
        if result.finish_reason == "context":
            say(self._no_room(was_begun=bool(result.token_ids)))
        if not self.warned and (warning := low_acceptance(result.rounds)):
            self.warned = True
            say(warning)
        return result.finish_reason == "cancelled"

    def _no_room(self, *, was_begun: bool) -> str:
        """What is full, and what gives room; an answer that was not begun had too long a text."""
        from ttspec.decoding.engine import SESSION_CONTEXT

        most = self.engine.target.context
        is_all = (self.settings.get("context") or SESSION_CONTEXT) >= most
        room = "The target's context" if is_all else "The conversation's room"
        more = "" if is_all else f", and --context gives more, up to {most:,} tokens"
        if was_begun:
            return f"{room} is full; /reset starts afresh{more}."
        return (
            f"{room} has no place for that text, which is left out: a shorter one may fit. "
            f"/reset starts afresh{more}."
        )

    def figures(self) -> str:
        """The last turn, and all turns together."""
        from ttspec.records import acceptance_length

        if not self.results:
            return "Nothing was said yet."
        stats = [result.stats for result in self.results]
        tokens, seconds = sum(s.emitted_tokens for s in stats), sum(s.seconds for s in stats)
        rounds = [r for result in self.results for r in result.rounds]
        learning = sum(s.seconds_in["learn"] for s in stats)
        return (
            f"last turn: {summary(stats[-1])}\n"
            f"session: {len(stats)} turn{'s' * (len(stats) > 1)} · {tokens} tokens · "
            f"{tokens / max(seconds, 1e-9):.1f} tokens/s · "
            f"acceptance length {acceptance_length(rounds):.2f} · "
            f"{sum(s.updates for s in stats)} updates · "
            f"{learning / max(seconds, 1e-9):.0%} of the time learning · "
            f"{sum(s.reread_tokens for s in stats)} tokens read again"
        )


def _read_line(at_terminal: bool) -> str | None:
    """The next line; None at the end of the input."""
    try:
        line = input("> ") if at_terminal else sys.stdin.readline().removeprefix("\ufeff")
    except EOFError:
        say("")
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text: {error.reason}.") from error
    return line.strip() if at_terminal or line else None
