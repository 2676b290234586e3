"""Other implementations as arms: one request at a time, timed and recorded as our own are.

A session's context is read anew at every turn. Sampled texts are not ours: the noise is another.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from ttspec.bench.arms import PEERS, ArmSpec
from ttspec.bench.peer_loops import Loop, PeerOptions, SkippedError, open_loop
from ttspec.bench.peer_rounds import Watch, rounds_from
from ttspec.bench.results import Turn
from ttspec.bench.suites import Request, text_of
from ttspec.config import SamplingConfig
from ttspec.decoding.conversation import noise_key
from ttspec.decoding.engine import SESSION_CONTEXT, Engine
from ttspec.decoding.history import ChatHistory, prompt_ids
from ttspec.decoding.template import ChatTemplate
from ttspec.errors import OptionError
from ttspec.models.target import Target
from ttspec.records import FinishReason, Result, summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another implementation, ready to answer."""

    target: Target
    loop: Loop
    asked: PeerOptions

    def warm_up(self, tokens: int) -> None:
        """Generate, uncounted."""
        ids = torch.tensor([prompt_ids(self.target.tokenizer, "Hello")], device=self.target.device)
        self._run(ids, min(tokens, self.asked.max_new_tokens))

    def measure(
        self, request: Request, number: int, seed: int, quota: int | None = None
    ) -> list[Turn]:
        """The answers to a request's turns, timed.

        All turns together may have `quota` tokens.

        Raises:
            OptionError: The prompt leaves no room for an answer.
        """
        turns: list[Turn] = []
        ids: list[int] = []
        first: list[int] = []
        generated = 0
        history = ChatHistory(ChatTemplate(self.target.tokenizer))
        for turn in request:
            ids = history.ask(turn)
            first = first or ids
            room, most = self.asked.slots - len(ids), self.asked.max_new_tokens
            if quota is not None:
                most = min(most, quota - generated)
            if min(room, most) < 1:
                break
            torch.manual_seed(noise_key(seed, first, turn=len(turns)) % 2**63)
            reason: FinishReason = "context" if room < most else "length"
            answer = self._answer(ids, min(room, most), generated, reason, seed)
            turns.append(
                Turn(request=number, user=text_of(turn), turn=len(turns), **answer)  # type: ignore[arg-type]
            )
            result = turns[-1].result
            history.answer(result.text, result.token_ids)
            generated += len(result.token_ids)
        if not turns:
            raise OptionError(
                f"The prompt has {len(ids)} tokens; the context has room for {self.asked.slots}, "
                "the answer included.\nShorten the prompt."
            )
        return turns

    def _answer(
        self, ids: list[int], most: int, position: int, reason: FinishReason, seed: int
    ) -> dict[str, Any]:
        """One turn's fields."""
        device, target = self.target.device, self.target
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.time()
        out, watch, start, end = self._run(torch.tensor([ids], device=device), most)
        tokens = out[0, len(ids) :].tolist()
        rounds, clocks = rounds_from(watch, len(ids), tokens, end, position)
        ends = () if self.asked.ignore_eos else target.ends
        shown = [token for token in tokens if token not in target.ends]
        stats = summarise(
            rounds, token_ids=tokens, prompt_tokens=len(ids), seed=seed, seconds=end - start
        )
        result = Result(
            text=cast(str, target.tokenizer.decode(shown, skip_special_tokens=True)),
            token_ids=tokens,
            finish_reason="eos" if tokens and tokens[-1] in ends else reason,
            stats=stats,
            rounds=rounds,
            prompt_ids=ids,
        )
        return {
            "result": result,
            "seconds": end - start,
            "first_token": clocks[0] - start,
            "waits": [after - before for before, after in pairwise(clocks)],
            "began": began,
            "ended": time.time(),
            "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
        }

    def _run(self, ids: Tensor, most: int) -> tuple[Tensor, Watch, float, float]:
        """Tokens, what was watched, and when it began and ended (s)."""
        watch = Watch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keywords of older versions
            start = time.perf_counter()
            if self.loop.streams:
                out = self.loop.generate(ids, most, watch)
            else:
                with watch.on(self.loop.model, self.loop.helper):
                    out = self.loop.generate(ids, most, watch)
            if ids.device.type == "cuda":
                torch.cuda.synchronize(ids.device)
        return out, watch, start, time.perf_counter()


def open_peers(
    engines: Mapping[str, Engine],
    arms: Sequence[ArmSpec],
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    ignore_eos: bool = False,
    rows: int = 1,
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Make the peers among the arms ready.

    Returns:
        Peers by the arm's name, and why others are skipped, one line each.
    """
    peers, skipped = {}, {}
    for arm in arms:
        if arm.kind not in PEERS:
            continue
        engine = engines[arm.name]
        longest = max(len(prompt_ids(engine.tokenizer, request[0])) for request in requests)
        slots = longest + max_new_tokens
        if max(map(len, requests)) > 1:
            slots = max(slots, SESSION_CONTEXT)  # as an engine's sessions
        asked = PeerOptions(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            slots=min(slots, engine.target.context),
            ignore_eos=ignore_eos,
        )
        try:
            if rows > 1:
                raise SkippedError(f"it answers one request at a time, and --rows is {rows}")
            loop = open_loop(arm, engine, asked)
            peers[arm.name] = Peer(target=engine.target, loop=loop, asked=asked)
        except SkippedError as reason:
            skipped[arm.name] = str(reason)
    return peers, skipped
