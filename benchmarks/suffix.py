"""Our copies against arctic-inference's suffix cache over recorded texts; no model drafts.

`run FOLDER...` takes run folders of `ttspec bench run`, all of one target. Acceptance is exact: a
copy is kept as far as it is the recorded text. Both copy in every round, at most `--most` tokens.
arctic's cache is asked at vLLM's defaults, and with longer copies for each match (`factor`); with
`across` it also copies from the answers to the requests before, one after the other.

Its package `arctic_inference.suffix_decoding` can be built alone: `cmake` in `csrc/suffix_decoding`
of the 0.3.0 sources, with nanobind, and `_C*.so` beside `cache.py`. Nothing else here needs it.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import common
import numpy as np
import torch
from cyclopts import App

from ttspec.bench.estimates import paired, share
from ttspec.bench.jsonl import write_json
from ttspec.bench.replay import conversations, open_source
from ttspec.bench.table import EMPTY, Table, interval, ratio
from ttspec.decoding.copying import Copying
from ttspec.models.loading import open_files
from ttspec.models.source import resolve

WINDOWS = {"0 to 512": 512, "512 to 1,024": 1024, "past 1,024": 1 << 30}
"""Of generated positions in a conversation: where each ends."""
DEPTH = 24
"""Of arctic's tree: vLLM's default."""
app = App(help=__doc__)


class Copier(Protocol):
    """One conversation after the other, one turn after the other."""

    def begin(self, prompt: Sequence[int], *, anew: bool) -> None:
        """All tokens before an answer; `anew` in another conversation than before."""

    def copy(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may come next, after all tokens so far."""
        ...

    def commit(self, tokens: Sequence[int]) -> None:
        """What a round emitted."""


class Ours:
    """`decoding/copying.py`."""

    def __init__(self, most: int) -> None:
        """Nothing is kept between conversations."""
        self.copying = Copying(1, most)

    def begin(self, prompt: Sequence[int], *, anew: bool) -> None:  # noqa: ARG002 - read by `copy`
        """Forget the conversation before."""
        if anew:
            self.copying.clear(0)

    def copy(self, tokens: Sequence[int], most: int) -> list[int]:
        """Where it promises anything."""
        return self.copying.choose([0], [tokens], drafts=False).get(0, [])[:most]

    def commit(self, tokens: Sequence[int]) -> None:
        """Counts how often copies are right."""
        self.copying.commit(0, tokens, None)


class Arctic:
    """arctic-inference's cache. A turn is a request whose prompt is all before it, as in vLLM."""

    def __init__(self, factor: float, *, across: bool) -> None:
        """`factor` is how many tokens are copied for each that agrees."""
        from arctic_inference.suffix_decoding import (  # pyright: ignore[reportMissingImports]
            SuffixDecodingCache,
        )

        self.cache: Any = SuffixDecodingCache(DEPTH, -1 if across else 0)
        self.factor, self.request = factor, -1

    def begin(self, prompt: Sequence[int], *, anew: bool) -> None:  # noqa: ARG002 - each turn is
        """Another request."""
        if self.request >= 0:
            self.cache.stop_request(self.request)
        self.request += 1
        self.cache.start_request(self.request, prompt)

    def copy(self, tokens: Sequence[int], most: int) -> list[int]:
        """What its trees hold as likely."""
        how = {"max_spec_tokens": most, "max_spec_factor": self.factor}
        return self.cache.speculate(self.request, tokens[-DEPTH:], **how).token_ids

    def commit(self, tokens: Sequence[int]) -> None:
        """Grows both trees."""
        self.cache.add_active_response(self.request, tokens)


class Text(NamedTuple):
    """A conversation's tokens, and where in them each answer begins and ends."""

    ids: list[int]
    answers: list[tuple[int, int]]


def texts(folder: Path, tokenizer: Any) -> Iterator[list[Text]]:
    """The conversations of a run; several texts where the template writes the past anew."""
    source = open_source(folder)
    told, notes = conversations(source, tokenizer)
    print(folder, len(told), "conversations.", *notes, file=sys.stderr)
    for unit, parts in told.items():
        lengths = {turn.turn: len(turn.result.token_ids) for turn in source.units[unit]}
        yield [
            Text(part.ids, [(b, b + lengths[turn]) for turn, b in sorted(part.begins.items())])
            for part in parts
        ]


class Count(NamedTuple):
    """What a copier did in one conversation."""

    tokens: list[int]
    """Committed by rounds, by window; all that follow are alike."""
    rounds: list[int]
    read: list[int]
    """Tokens that the target read in vain."""
    seconds: float


def follow(copier: Copier, parts: Sequence[Text], most: int) -> Count:
    """Let it copy where it can, round by round."""
    tokens, rounds, vain = ([0] * len(WINDOWS) for _ in range(3))
    ends, position, seconds, anew = list(WINDOWS.values()), 0, 0.0, True
    for ids, answers in parts:
        for begin, end in answers:
            known = ids[: begin + 1]  # the first token is the prompt's
            start = time.perf_counter()
            copier.begin(ids[:begin], anew=anew)
            copier.commit(ids[begin : begin + 1]) if isinstance(copier, Arctic) else None
            seconds, anew = seconds + time.perf_counter() - start, False
            while len(known) < end:
                at = len(known)
                window = next(i for i, e in enumerate(ends) if position + at - begin < e)
                start = time.perf_counter()
                copied = copier.copy(known, min(most, end - at - 1))
                seconds += time.perf_counter() - start
                kept = next((i for i, t in enumerate(copied) if t != ids[at + i]), len(copied))
                emitted = ids[at : at + kept + 1]
                start = time.perf_counter()
                copier.commit(emitted)
                seconds += time.perf_counter() - start
                known += emitted
                tokens[window] += len(emitted)
                rounds[window] += 1
                vain[window] += len(copied) - kept
            position += end - begin
    return Count(tokens, rounds, vain, seconds)


@app.command
def run(
    *folders: Path,
    target: str = "smollm2-135m",
    most: int = 31,
    factors: str = "1,2,4",
    out: Path = Path("runs/suffix"),
) -> None:
    """Let both copy; the table is printed and goes to `out`.

    Parameters
    ----------
    folders
        Of `ttspec bench run`; the text of plain decoding, or of the first arm.
    target
        Who wrote it, for its tokenizer.
    most
        Tokens copied at most.
    factors
        arctic's `max_spec_factor`, with commas between them.
    out
        Where the figures go.
    """
    _, tokenizer = open_files(resolve(target)).load(torch.device("cpu"), torch.bfloat16)
    for folder in folders:
        found = list(texts(folder, tokenizer))
        copiers: dict[str, Copier] = {"ours": Ours(most)}
        for across in (False, True):
            for factor in map(float, factors.split(",")):
                name = f"arctic, factor {factor:g}{', across' if across else ''}"
                copiers[name] = Arctic(factor, across=across)
        counts = {name: [follow(c, t, most) for t in found] for name, c in copiers.items()}
        shown = table(folder.name, counts)
        write_json(
            out / f"{folder.name}.json",
            {n: [c._asdict() for c in own] for n, own in counts.items()},
        )
        (out / f"{folder.name}.md").write_text(shown.markdown(), encoding="utf-8")
        print(shown.markdown())


def table(title: str, counts: dict[str, list[Count]]) -> Table:
    """Tokens a round by window, against ours, and what a round costs on the host."""

    def sums(own: list[Count], part: slice) -> tuple[Any, Any]:
        both = [(sum(c.tokens[part]), sum(c.rounds[part])) for c in own]
        top, bottom = np.array(both, dtype=np.float64).T
        return top, bottom

    parts = {"all": slice(None)} | {name: slice(i, i + 1) for i, name in enumerate(WINDOWS)}
    ours, rows = counts["ours"], []
    for name, own in counts.items():
        cells = [interval(share(*sums(own, part)), 3) for part in parts.values()]
        pair = paired(*sums(own, slice(None)), *sums(ours, slice(None)))
        late = paired(*sums(own, slice(2, 3)), *sums(ours, slice(2, 3)))
        number = sum(sum(c.rounds) for c in own)
        vain = sum(sum(c.read) for c in own) / number
        micro = sum(c.seconds for c in own) / number * 1e6
        ratios = [EMPTY if own is ours else ratio(p) for p in (pair, late)]
        rows.append((name, *cells, *ratios, f"{vain:.2f}", f"{micro:.1f}"))
    head = ("copier", *parts, "/ ours", "/ ours past 1,024", "read in vain a round", "µs a round")
    return Table(title=f"{title}, {len(ours)} conversations", head=head, rows=rows)


if __name__ == "__main__":
    common.main(app)
