"""Training text: dialogues answered by the target itself, with plain batched decoding.

A drafter learns what its target says, so data sets' own answers are of no use. A user turn of None
is written by the target too. Results are appended line by line: an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ttspec.config import DraftConfig, GenerateConfig
from ttspec.decoding.conversation import Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.messages import FORMS, Turn, read_text, request_of, rows_of, user_turns
from ttspec.decoding.scheduler import Scheduler
from ttspec.decoding.template import ChatTemplate
from ttspec.errors import DataError, writing
from ttspec.records import Result, repeated_8grams
from ttspec.training.config import TrainConfig

ROWS = 32
"""Dialogues side by side, where there is room."""
LONGEST_WRITTEN_TURN = 200
MOST_REPETITION = 0.3
"""Answers that repeat more of their 8-grams than this are loops, and teach loops."""

Turns = Sequence[Turn]


def read_dialogues(path: Path) -> list[Turns]:
    """Prompts of a file of JSON lines, in the forms of `messages.request_of`, as user turns.

    A turn of null is written by the target.

    Raises:
        DataError: The file cannot be read or a line is not of such a form.
    """
    dialogues = [_turns(row, where) for where, row in rows_of(read_text(path), str(path))]
    if not dialogues:
        raise DataError(f"{path} has no prompts.\nEach line is a JSON object: {FORMS}.")
    return dialogues


def _turns(row: Any, where: str) -> Turns:
    turns = request_of(row, where)
    # What others answered is of no use: of one turn of messages, the target answers each one.
    return user_turns(turns[0]) if isinstance(turns[0], list) and len(turns) == 1 else turns


def write_answers(
    engine: Engine,
    dialogues: Sequence[Turns],
    out: Path,
    options: TrainConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer dialogues and append them to `out` as JSON lines; those in it already are skipped.

    A line is {"n": dialogue, "ids": tokens, "spans": answers}. `progress` is told how many
    dialogues are done and tokens written.
    """
    done = _done_in(out)
    todo = [n for n in range(len(dialogues)) if n not in done][::-1]
    if not todo:
        return
    config = GenerateConfig(
        max_new_tokens=options.max_answer,
        temperature=options.temperature,
        context=options.max_length,
        seed=options.seed,
        draft=DraftConfig(length=0),
        learn=None,
    )
    most = min(options.rows or ROWS, len(todo))
    rows = most if options.rows else engine.rows_for(config, most, 1, sessions=True)
    template = engine.chat_template(config)
    decoder = engine.decoder(config, rows, 1, sessions=True)
    scheduler = Scheduler(decoder, config, stream=False)
    going: dict[int, tuple[int, GrowingDialogue]] = {}  # by request: which dialogue
    tokens = 0
    with writing(out), out.open("a", encoding="utf-8") as file:
        while todo or going:
            while todo and len(going) < decoder.rows.count:
                n = todo.pop()
                dialogue = GrowingDialogue(template, dialogues[n])
                ids = dialogue.next(None)
                # A prompt as long as a whole dialogue may be is no example.
                if ids and len(ids) < decoder.rows.slots:
                    request = Request(ids=ids, seed=options.seed, occurrence=n, keeps_row=True)
                    going[scheduler.add_request(request)] = n, dialogue
                else:
                    done.add(n)
            for request, chunk in scheduler.step():
                if chunk.result is None:
                    continue
                n, dialogue = going[request]
                tokens += len(chunk.result.token_ids)
                ids = dialogue.next(chunk.result)
                if ids and len(ids) < decoder.rows.slots:
                    scheduler.add_turn(request, ids)
                    continue
                for text in dialogue.texts:
                    file.write(json.dumps({"n": n, **text.to_dict()}) + "\n")
                done.add(n)
                del going[request]
                scheduler.release(request)
            if progress:
                progress(len(done), tokens)


def _done_in(out: Path) -> set[int]:
    """Dialogues that a file of answers has; half a line of an interrupted run is cut off."""
    written = out.read_text(encoding="utf-8") if out.exists() else ""
    whole = written[: written.rfind("\n") + 1]
    if whole != written:
        out.write_text(whole, encoding="utf-8")
    return {_number_of(line, f"{out}, line {at}") for at, line in enumerate(whole.splitlines(), 1)}


def _number_of(line: str, where: str) -> int:
    """Which dialogue a line of answers is of."""
    try:
        row = json.loads(line)
        number, *_ = (row[key] for key in ("n", "ids", "spans"))
        return number
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where} is damaged: {error!r:.100}.\nDelete the line; --resume then answers its "
            "prompt anew."
        ) from error


class AnsweredText:
    """One text and where the answers are in it: an example of `read_examples`."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        """Where the answers are: [start, end), end tokens included."""

    def to_dict(self) -> dict[str, Any]:
        """What is written of it, up to the end of the last answer."""
        return {"ids": self.ids[: self.spans[-1][1]] if self.spans else [], "spans": self.spans}


class GrowingDialogue:
    """A dialogue as it grows: which tokens come next, and where the answers are."""

    def __init__(self, template: ChatTemplate, turns: Turns) -> None:
        """`turns` are the user's; None is written by the target."""
        self.turns = turns
        self.texts = [AnsweredText()]
        """A template that writes the past otherwise than it was makes another text of it."""
        self._history = ChatHistory(template)
        self._turn = 0
        self._writing = False

    def next(self, result: Result | None) -> list[int] | None:
        """The whole dialogue after the last result, to be gone on from; None when it is over."""
        if result is not None:
            tokens, whole = result.token_ids, result.finish_reason == "eos"
            if self._writing:
                if not whole or not 1 < len(tokens) <= LONGEST_WRITTEN_TURN:
                    return None
                self._writing = False
                return self._as_input(self._history.ask(result.text))
            if not tokens or repeated_8grams(tokens) > MOST_REPETITION:
                return None
            text = self.texts[-1]
            text.spans.append((len(text.ids), len(text.ids) + len(tokens)))
            text.ids += tokens
            self._history.answer(result.text, tokens)
            if not whole:
                return None
        if self._turn == len(self.turns):
            return None
        turn = self.turns[self._turn]
        self._turn += 1
        if turn is None:
            self._writing = True
            return self._history.ask_for_turn()
        return self._as_input(self._history.ask(turn))

    def _as_input(self, ids: list[int]) -> list[int]:
        text = self.texts[-1]
        if ids[: len(text.ids)] != text.ids:
            text = AnsweredText()
            self.texts.append(text)
        text.ids[:] = ids
        return ids
