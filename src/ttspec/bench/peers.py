"""transformers' own `generate` as an arm: one request at a time, timed and recorded as ours are.

It runs on the run's target: the same weights, through transformers' own attention. A session's
context is read anew at every turn. Sampled texts are not ours: the noise is another.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from ttspec.bench.arms import PEERS, ArmSpec
from ttspec.bench.results import Turn
from ttspec.bench.suites import Request, text_of
from ttspec.config import SamplingConfig
from ttspec.decoding.conversation import noise_key
from ttspec.decoding.engine import SESSION_CONTEXT, Engine
from ttspec.decoding.history import ChatHistory, prompt_ids
from ttspec.decoding.template import ChatTemplate
from ttspec.errors import OptionError
from ttspec.models.attention import NAME as FOLDED
from ttspec.models.target import Target, cache_keyword
from ttspec.records import FinishReason, Result, Round, summarise


class SkippedError(Exception):
    """Why a peer cannot run here, in one line."""


class TokenTimes(BaseStreamer):
    """When the prompt, then each token was handed on (s)."""

    def __init__(self) -> None:
        self.puts: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002 - only the time counts
        """A token is on the host."""
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        """The answer is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`generate` of transformers, ready to answer."""

    target: Target
    model: Any
    """The target's modules once more, with the same weights and attention of transformers."""
    config: dict[str, Any]
    """Fields of a `GenerationConfig`."""
    max_new_tokens: int
    slots: int
    """Tokens that a conversation may have in all."""
    ends: Sequence[int]
    """End tokens; none where answers go on past them."""
    cache: StaticCache | None = None
    """With one, transformers compiles its forward."""

    def warm_up(self, tokens: int) -> None:
        """Generate, uncounted."""
        ids = torch.tensor([prompt_ids(self.target.tokenizer, "Hello")], device=self.target.device)
        self.generate(ids, min(tokens, self.max_new_tokens), TokenTimes())

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
            room, most = self.slots - len(ids), self.max_new_tokens
            if quota is not None:
                most = min(most, quota - generated)
            if min(room, most) < 1:
                break
            torch.manual_seed(noise_key(seed, first, turn=len(turns)) % 2**63)
            reason: FinishReason = "context" if room < most else "length"
            answer = self._answer(ids, min(room, most), generated, reason, seed)
            turns.append(Turn(request=number, user=text_of(turn), turn=len(turns), **answer))
            result = turns[-1].result
            history.answer(result.text, result.token_ids)
            generated += len(result.token_ids)
        if not turns:
            raise OptionError(
                f"The prompt has {len(ids)} tokens; the context has room for {self.slots}, "
                "the answer included.\nShorten the prompt."
            )
        return turns

    def generate(self, ids: Tensor, most: int, clock: TokenTimes) -> Tensor:
        """What `generate` makes of int64 [1, P]: int64 [1, P + N], with N up to `most`."""
        cache = {}
        if self.cache is not None:
            self.cache.reset()
            cache = {cache_keyword(self.model): self.cache}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keywords of older versions
            return self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(**self.config, max_new_tokens=most),
                streamer=clock,
                **cache,
            )

    def _answer(
        self, ids: list[int], most: int, position: int, reason: FinishReason, seed: int
    ) -> dict[str, Any]:
        """One turn's fields."""
        device, target, clock = self.target.device, self.target, TokenTimes()
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        began, start = time.time(), time.perf_counter()
        tokens = self.generate(torch.tensor([ids], device=device), most, clock)[0, len(ids) :]
        if cuda:
            torch.cuda.synchronize(device)
        tokens, seconds = tokens.tolist(), time.perf_counter() - start
        waits = [after - before for before, after in pairwise(clock.puts[1:])]
        rounds = [
            Round(
                position=position + i, proposed=0, accepted=0, emitted=1, seconds=(0.0, wait, 0.0)
            )
            for i, wait in enumerate(waits, 1)
        ]
        shown = [token for token in tokens if token not in target.ends]
        result = Result(
            text=cast(str, target.tokenizer.decode(shown, skip_special_tokens=True)),
            token_ids=tokens,
            finish_reason="eos" if tokens and tokens[-1] in self.ends else reason,
            stats=summarise(
                rounds, token_ids=tokens, prompt_tokens=len(ids), seed=seed, seconds=seconds
            ),
            rounds=rounds,
            prompt_ids=ids,
        )
        return {
            "result": result,
            "seconds": seconds,
            "first_token": clock.puts[1] - start,
            "waits": waits,
            "began": began,
            "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
        }


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
        target = engines[arm.name].target
        longest = max(len(prompt_ids(target.tokenizer, request[0])) for request in requests)
        slots = longest + max_new_tokens
        if max(map(len, requests)) > 1:
            slots = max(slots, SESSION_CONTEXT)  # as an engine's sessions
        slots = min(slots, target.context)
        ends = [] if ignore_eos else list(target.ends)
        try:
            if rows > 1:
                raise SkippedError(f"it answers one request at a time, and --rows is {rows}")
            compiled = arm.kind == "hf-compiled"
            if compiled and not _compiles(target.device):
                raise SkippedError("transformers compiles `generate` on GPUs only")
            config = _config(target, sampling, ends)
            model = _with_transformers_attention(target.model)
            cache = StaticCache(config=model.config, max_cache_len=slots) if compiled else None
        except SkippedError as reason:
            skipped[arm.name] = str(reason)
            continue
        peers[arm.name] = Peer(
            target=target,
            model=model,
            config=config,
            max_new_tokens=max_new_tokens,
            slots=slots,
            ends=ends,
            cache=cache,
        )
    return peers, skipped


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda"


def _with_transformers_attention(model: nn.Module) -> Any:
    """The same modules with the same weights, and transformers' own attention."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin: Any = copy.deepcopy(model, shared)
    if twin.config._attn_implementation == FOLDED:
        twin.set_attn_implementation("sdpa")
    twin.generation_config = GenerationConfig()  # what it would add to ours is in `sampling`
    return twin


def _config(target: Target, sampling: SamplingConfig, ends: list[int]) -> dict[str, Any]:
    """Fields of a `GenerationConfig` that choose the tokens that we would, or draw as we would."""
    padding = target.tokenizer.pad_token_id
    chosen: dict[str, Any] = {
        "eos_token_id": ends or None,
        "pad_token_id": padding if padding is not None else (list(target.ends) or [0])[0],
        "do_sample": sampling.temperature > 0,
    }
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            raise SkippedError(f"transformers has no {name}")
    if sampling.penalises:
        entries = {
            "repetition_penalty": float(sampling.repetition_penalty),
            "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
            "min_new_tokens": sampling.min_new_tokens,
            "min_length": sampling.min_length,
            "sequence_bias": [[[token], bias] for token, bias in sampling.logit_bias],
            "bad_words_ids": [list(word) for word in sampling.bad_words_ids],
            "suppress_tokens": list(sampling.suppress_tokens),
            "begin_suppress_tokens": list(sampling.begin_suppress_tokens),
        }
        chosen |= {name: value for name, value in entries.items() if value}
    if sampling.temperature > 0:
        names = ("temperature", "top_k", "top_p")
        chosen |= {name: getattr(sampling, name) for name in names}
        chosen |= {"min_p": sampling.min_p} if sampling.min_p else {}
    return chosen
