"""Training text: dialogues answered by the target itself, with plain batched decoding.

A drafter learns what its target says, so data sets' own answers are of no use. A user turn of None
is written by the target too. Results are appended line by line: an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ttspec.config import DraftConfig, GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.scheduler import Request, Scheduler
from ttspec.decoding.text import answer_ids, next_turn_ids, prompt_ids, written_turn_ids
from ttspec.errors import DataError
from ttspec.records import Result, repeated_ngrams

ROWS = 32
"""Dialogues side by side, where there is room."""
LONGEST_WRITTEN_TURN = 200
MOST_REPETITION = 0.3
"""Answers that repeat more of their 8-grams than this are loops, and teach loops."""

Turns = Sequence[str | None]


def read_dialogues(path: Path) -> list[Turns]:
    """Prompts from JSON lines: {"prompt"}, {"turns"} (null: written by the target) or {"messages"}.

    Raises:
        DataError: The file cannot be read or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.\nGive a file of JSON lines.") from error
    dialogues: list[Turns] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            turns = _turns(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is no prompt: {error!r}.\n"
                'A line is {"prompt": TEXT}, {"turns": [TEXT or null, ...]} or {"messages": [...]}.'
            ) from error
        dialogues.append(turns)
    if not dialogues:
        raise DataError(f"{path} has no prompts.\nEach line is a JSON object.")
    return dialogues


def _turns(record: dict) -> Turns:
    """User turns of one line; raises what the caller makes a message of."""
    if "messages" in record:
        turns = [m["content"] for m in record["messages"] if m["role"] == "user"]
    else:
        turns = record["turns"] if "turns" in record else [record["prompt"]]
        if record.get("prompt", "") is None:
            raise TypeError("the prompt is null")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(t is None or isinstance(t, str) for t in turns)
    ):
        raise TypeError("a turn is neither text nor null")
    return turns


def write_answers(
    engine: Engine,
    dialogues: Sequence[Turns],
    out: Path,
    *,
    rows: int | None,
    max_answer: int,
    max_length: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer dialogues and append them to `out` as JSON lines; those in it already are skipped.

    Args:
        engine: Its target decodes; no drafter is used.
        dialogues: User turns.
        out: JSON lines {"n": dialogue, "ids": tokens, "spans": answers}.
        rows: Dialogues side by side; None is `ROWS`, or as many of them as fit into memory.
        max_answer: Tokens of an answer at most.
        max_length: Tokens of a dialogue at most; a longer one ends with its last whole answer.
        temperature: Of answers and written turns.
        seed: Of all noise.
        progress: Called with (dialogues done, tokens written).
    """
    written = out.read_text(encoding="utf-8") if out.exists() else ""
    whole = written[: written.rfind("\n") + 1]
    if whole != written:  # an interrupted run left half a line
        out.write_text(whole, encoding="utf-8")
    done = {json.loads(line)["n"] for line in whole.split("\n") if line}
    todo = [n for n in range(len(dialogues)) if n not in done][::-1]
    if not todo:
        return
    config = GenerateConfig(
        max_new_tokens=max_answer,
        temperature=temperature,
        context=max_length,
        seed=seed,
        draft=DraftConfig(length=0),
        learn=None,
    )
    if rows is None:
        rows = engine.rows_for(config, min(ROWS, len(todo)), 1, sessions=True)
    decoder = engine.decoder(config, min(rows, len(todo)), 1, sessions=True)
    scheduler = Scheduler(decoder, config, stream=False)
    going: dict[int, tuple[int, Script]] = {}  # by request: which dialogue
    tokens = 0
    with out.open("a", encoding="utf-8") as file:
        while todo or going:
            while todo and len(going) < decoder.rows.count:
                n = todo.pop()
                script = Script(engine, dialogues[n])
                ids = script.next(None)
                # A prompt as long as a whole dialogue may be is no example.
                if ids and len(ids) < decoder.rows.slots:
                    request = Request(ids=ids, seed=seed, occurrence=n, keeps_row=True)
                    going[scheduler.add_request(request)] = n, script
            for request, chunk in scheduler.step():
                if chunk.result is None:
                    continue
                n, script = going[request]
                tokens += len(chunk.result.token_ids)
                ids = script.next(chunk.result)
                length = decoder.rows.lengths[scheduler.conversation(request).row]
                if ids and length + len(ids) < decoder.rows.slots:
                    scheduler.add_turn(request, ids)
                    continue
                line = {"n": n, "ids": script.ids[: script.end], "spans": script.spans}
                file.write(json.dumps(line) + "\n")
                done.add(n)
                del going[request]
                scheduler.release(request)
            if progress:
                progress(len(done), tokens)


class Script:
    """A dialogue as it grows: which tokens come next, and where the answers are."""

    def __init__(self, engine: Engine, turns: Turns) -> None:
        """`turns` are the user's; None is written by the target."""
        self.tokenizer, self.turns = engine.tokenizer, turns
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []
        """Where the answers are: [start, end), end tokens included."""
        self._turn = 0
        self._writing = False

    @property
    def end(self) -> int:
        """Where the last answer ends."""
        return self.spans[-1][1] if self.spans else 0

    def next(self, result: Result | None) -> list[int] | None:
        """Tokens to feed after the last result; None when the dialogue is over."""
        if result is not None:
            tokens, whole = result.token_ids, result.finish_reason == "eos"
            if self._writing:
                if not whole or not 1 < len(tokens) <= LONGEST_WRITTEN_TURN:
                    return None
                self.ids += tokens
                self._writing = False
                return self._fed(answer_ids(self.tokenizer, tokens[-1]))
            if not tokens or repeated_ngrams(tokens) > MOST_REPETITION:
                return None
            self.spans.append((len(self.ids), len(self.ids) + len(tokens)))
            self.ids += tokens
            if not whole:
                return None
        if self._turn == len(self.turns):
            return None
        turn = self.turns[self._turn]
        self._turn += 1
        pending = self.ids[-1] if self.ids else None
        if turn is None:
            self._writing = True
            return self._fed(written_turn_ids(self.tokenizer, pending))
        if pending is None:
            return self._fed(prompt_ids(self.tokenizer, turn))
        return self._fed(next_turn_ids(self.tokenizer, turn, pending))

    def _fed(self, ids: list[int]) -> list[int]:
        self.ids += ids[1:] if self.ids else ids  # the pending token is there already
        return ids
