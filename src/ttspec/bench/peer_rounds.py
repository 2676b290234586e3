"""What another implementation's loop did, watched from outside.

A hook notes what each forward of the target is fed and how long its cache is then: the first token
is pending, the others are drafts, and those that stand in the answer were accepted. What a forward
that reads the prompt emits belongs to no round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ttspec.records import Round


@dataclass(slots=True, kw_only=True)
class Watch:
    """One call, watched; also a streamer, which transformers' plain loop hands tokens."""

    forwards: list[tuple[float, float, int, Tensor]] = field(default_factory=list)
    """Of the target: when drafting for it began and when itself (s), its cache's length, and what
    it was fed."""
    puts: list[float] = field(default_factory=list)
    """When the prompt, then each token was streamed (s)."""
    drafting: float | None = None

    @contextmanager
    def on(self, target: nn.Module, helper: nn.Module | None) -> Iterator[Watch]:
        """Look at these models meanwhile."""
        hooks = [target.register_forward_pre_hook(self._verify, with_kwargs=True)]
        if helper is not None:
            hooks.append(helper.register_forward_pre_hook(self._draft))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def put(self, _: Tensor) -> None:
        """A token is on the host."""
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        """The answer is over."""

    def _draft(self, *_: Any) -> None:
        self.drafting = self.drafting or time.perf_counter()

    def _verify(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        caches = (kwargs.get(name) for name in ("cache", "past_key_values"))
        cache: Any = next((c for c in caches if c is not None), None)
        start = 0 if cache is None else int(cache.get_seq_length())
        fed = kwargs.get("input_ids")
        self.forwards.append((self.drafting or now, now, start, args[0] if fed is None else fed))
        self.drafting = None


def rounds_from(
    watch: Watch, prompt: int, tokens: list[int], end: float, position: int
) -> tuple[list[Round], list[float]]:
    """Rounds, and when each began; last, when all was over (s).

    `end` is when the call returned (s); `position` are tokens that the conversation had before.
    """
    # A rejected draft never stands where it would have stood: the target's token replaces it. So
    # the drafts at the head of a forward that the answer repeats are those that were accepted.
    if watch.puts:
        began = [(at, at, i, []) for i, at in enumerate(watch.puts[1:-1], 1)]
        end = watch.puts[-1]
    else:
        began = [
            (drafting, at, start - prompt + 1, fed[0, 1:].tolist())
            for drafting, at, start, fed in watch.forwards
            if start >= prompt
        ]
    edges = [*(before for _, _, before, _ in began), len(tokens)]
    clocks = [*(at for at, *_ in began), end]
    rounds = []
    for i, (drafting, verifying, before, drafts) in enumerate(began):
        emitted = tokens[before : edges[i + 1]]
        same = [a == b for a, b in zip(drafts, emitted, strict=False)]
        rounds.append(
            Round(
                position=position + before,
                proposed=len(drafts),
                accepted=[*same, False].index(False),
                emitted=len(emitted),
                seconds=(verifying - drafting, clocks[i + 1] - verifying, 0.0),
            )
        )
    return rounds, clocks
