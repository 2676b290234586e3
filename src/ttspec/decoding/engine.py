"""Text in, text out: one target and drafter, ready to answer prompts and to hold conversations.

What `ttspec.load` returns. All of it ends in `Engine.run`, which feeds a `Scheduler`.
"""

from __future__ import annotations

import copy
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import Request
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.history import ChatHistory, Prompt, as_prompts
from ttspec.decoding.memory_forecast import Forecast, fitting_rows, forecast_run, require_room
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.policy import DraftPolicy
from ttspec.decoding.scheduler import Scheduler, in_own_modes
from ttspec.decoding.session import Session
from ttspec.decoding.shared_weights import SharedWeights
from ttspec.decoding.stages import DecoderSpec
from ttspec.decoding.template import ChatTemplate, thinking_of
from ttspec.drafters.base import Drafter
from ttspec.errors import DataError, OptionError, ResourceError
from ttspec.models.target import Target
from ttspec.records import Chunk, Result
from ttspec.rowcache import BUCKET, INVARIANT_STEP, reach_of

SESSION_CONTEXT = 8192
"""Tokens a session makes room for unless told otherwise; the target's context if that is less."""
Notify = Callable[[str], None]


def require_drafter(drafter: object) -> None:
    """Refuse what is neither a drafter nor None.

    Raises:
        OptionError: It is neither.
    """
    if not isinstance(drafter, Drafter | None):
        raise OptionError(
            f"drafter is a {type(drafter).__name__}; allowed are a drafter and None, and for load "
            "a name, a folder and a hub id."
        )


class Engine:
    """A target with a drafter, ready to generate.

    Owns the pair, and from call to call the last decoder with its caches and graphs, the weights
    that all requests teach, and what policies found out about costs.
    """

    def __init__(self, target: Target, drafter: Drafter | None) -> None:
        """Bind a copy of the drafter to a copy of the target; their weights are shared.

        Raises:
            CheckpointError: The drafter was made for another target.
            OptionError: It is no drafter.
        """
        require_drafter(drafter)
        target, drafter = copy.copy(target), copy.copy(drafter)  # each may be another engine's, too
        if drafter is not None:
            layers = int(target.config.num_hidden_layers)
            drafter.bind(target.embedding, target.head, layers, target.tokenizer)
            target.taps = drafter.taps
        self.target, self.drafter, self.tokenizer = target, drafter, target.tokenizer
        self.make_decoder: Callable[..., Decoder] = Decoder
        self.compile = False
        """Whether rounds are compiled on a GPU; see `loading.load`."""
        self.notify: Notify | None = None
        """Called with what may not fit into memory."""
        self._notices: set[str] = set()
        """What it was given already."""
        self._spare: Decoder | None = None
        """The last `run`'s, kept with its caches and graphs for one that needs the same."""
        self._shared_weights = SharedWeights()
        """What learns from all requests."""
        self._policies: dict[tuple[Any, ...], DraftPolicy] = {}
        """What earlier requests found out about costs, by what they may depend on."""

    def __repr__(self) -> str:
        """The pair, and where it runs."""
        drafter = f"{self.drafter.name} ({self.drafter.kind})" if self.drafter else "none"
        where = f"{str(self.target.dtype).removeprefix('torch.')} on {self.target.device}"
        return f"Engine(target {self.target.name}, drafter {drafter}, {where})"

    def sibling(self) -> Engine:
        """An engine of the same pair, which learns and keeps caches for itself."""
        other = copy.copy(self)
        other._spare, other._shared_weights, other._policies = None, SharedWeights(), {}
        return other

    def with_drafter(self, drafter: Drafter) -> Engine:
        """An engine of the same target with another drafter."""
        other = Engine(self.target, drafter)
        other.make_decoder, other.compile = self.make_decoder, self.compile
        other.notify = self.notify
        return other

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Result]:
        """Answer one prompt or many, side by side.

        Args:
            prompts: A text, or a list of texts, message lists or token lists.
            **options: Fields of `GenerateConfig`. Without `learn` many prompts teach nothing: each
                for itself measured slower. Thousands pay with scope "shared" (docs/learned.md).

        Returns:
            One result per prompt, in order. A prompt's answer does not depend on the others.

        Raises:
            OptionError, DataError: An option or a prompt is not allowed.
        """
        many = as_prompts(prompts)
        results: list[Result | None] = [None] * len(many)
        for index, chunk in self.run([[p] for p in many], stream=False, **options):
            results[index] = chunk.result or results[index]
        return [r for r in results if r is not None]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Answer one prompt chunk by chunk; the last chunk has the result."""
        for _, chunk in self.run([[prompt]], **options):
            yield chunk

    def session(self, **options: Any) -> Session:
        """A conversation whose turns share context and, with scope "session", what was learned.

        `options` are fields of `GenerateConfig`.
        """
        return Session(self, GenerateConfig(**options))

    def run(
        self,
        dialogues: Sequence[Sequence[Prompt]],
        *,
        rows: int | None = None,
        stream: bool = True,
        text: bool = True,
        quota: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Chunk]]:
        """Run many conversations side by side, each a list of user turns.

        An interrupt ends what is going on as cancelled; every conversation then has its result.

        Args:
            dialogues: Turns, answered one after the other; a row that is done takes the next.
            rows: Conversations at a time; None is all of them, or as many as fit into memory.
            stream: Without it, nothing comes before a result.
            text: Without it, text comes only with a result.
            quota: Tokens that a dialogue may have over all turns; None is no limit.
            seeds: One for each dialogue; None is `seed` for all.
            **options: Fields of `GenerateConfig`; limits hold for each turn. Without `learn`
                several conversations side by side teach nothing.

        Yields:
            (index of the dialogue, chunk). A chunk with a result ends a turn.

        Raises:
            OptionError, DataError: An option or a prompt is not allowed.
        """
        config = GenerateConfig(**options)
        for name, count in (("rows", rows), ("quota", quota)):
            if count is not None and not (isinstance(count, int) and count >= 1):
                raise OptionError(f"{name} is {count!r}; allowed is 1 or more, or None.")
        if isinstance(dialogues, str) or any(isinstance(d, str) or not d for d in dialogues):
            raise DataError(
                f"dialogues is {dialogues!r:.60}; allowed is a list of lists of turns, none of "
                'them empty.\nGive each dialogue as in ["first turn", "second turn"].'
            )
        if "learn" not in options and len(dialogues) > 1 and rows != 1:
            config = replace(config, learn=None)
        template = self.chat_template(config)
        histories = [ChatHistory(template) for _ in dialogues]
        prompts = [h.ask(turns[0]) for h, turns in zip(histories, dialogues, strict=True)]
        if not prompts:
            return
        sessions, longest = max(map(len, dialogues)) > 1, max(map(len, prompts))
        rows = rows or self.rows_for(config, len(prompts), longest, sessions=sessions)
        decoder = self.decoder(config, min(rows, len(prompts)), longest, sessions=sessions)
        scheduler = Scheduler(decoder, config, stream=stream, text=text)
        for request in self._requests(config, prompts, seeds):  # its id is its place
            scheduler.add_request(replace(request, quota=quota, keeps_row=sessions))
        events: list[tuple[int, Chunk]] = []
        try:
            while scheduler.has_unfinished():
                events = scheduler.step()
                while events:
                    index, chunk = event = events.pop(0)
                    yield event
                    if chunk.result and sessions:
                        turns, history = dialogues[index], histories[index]
                        turn = scheduler.conversation(index).turn
                        if scheduler.conversation(index).is_over(turns=len(turns)):
                            scheduler.release(index)
                        else:
                            history.answer(chunk.result.text, chunk.result.token_ids)
                            scheduler.add_turn(index, history.ask(turns[turn]))
            self._spare = decoder
        except KeyboardInterrupt:
            yield from (*events, *scheduler.abort_all())

    def _requests(
        self, config: GenerateConfig, prompts: list[list[int]], seeds: Sequence[int] | None
    ) -> Iterator[Request]:
        """A request for each prompt; equal ones of equal seeds are told apart."""
        if seeds is None:
            seed = secrets.randbits(31) if config.seed is None else config.seed
            seeds = [seed] * len(prompts)
        elif not isinstance(seeds, Sequence) or len(seeds) != len(prompts):
            raise OptionError(
                f"seeds is {seeds!r:.60}; allowed is a list of {len(prompts)}, one a dialogue."
            )
        for seed in seeds:
            replace(config, seed=seed)  # refuses what is no seed
        thinking, asked_before = self.thinking(config), Counter[tuple[int, ...]]()
        for ids, seed in zip(prompts, seeds, strict=True):
            occurrence = asked_before[seed, *ids]
            asked_before[seed, *ids] += 1
            yield Request(ids=ids, seed=seed, occurrence=occurrence, thinking=thinking)

    @in_own_modes
    def decoder(
        self, config: GenerateConfig, rows: int, longest_prompt: int, *, sessions: bool
    ) -> Decoder:
        """Rows for conversations under `config`.

        Raises:
            OptionError: The longest prompt leaves no room for an answer, or torch's default dtype
                is not float32.
            ResourceError: The caches or the learner's weights do not fit into memory.
        """
        if (dtype := torch.get_default_dtype()) != torch.float32:
            raise OptionError(
                f"torch's default dtype is {dtype}; sampling and learning are done in float32.\n"
                "Call torch.set_default_dtype(torch.float32)."
            )
        config = self._resolved(config)
        slots = self._slots(config, longest_prompt, sessions=sessions)
        spec = DecoderSpec(
            rows=rows,
            slots=slots,
            sampling=sampling_of(replace(config, seed=0), self.target),
            draft=config.draft,
            learn=config.learn,
            ends=() if config.ignore_eos else self.target.ends,
            batch_invariant=config.deterministic,
        )
        spare, self._spare = self._spare, None
        if spare is not None and (spare.spec, spare.tenant) == (spec, config.tenant):
            spare.restart()
            return spare
        del spare  # before the new caches are made
        self._notify_once(self.require_rows(config, rows, longest_prompt, sessions=sessions))
        costs_of = rows, config.tenant, config.draft, config.learn, spec.sampling, self.compile
        try:
            live_weights = self._shared_weights.find(config, self.target, self.drafter, self.notify)
            decoder = self.make_decoder(
                self.target,
                self.drafter,
                spec,
                live_weights=live_weights,
                policy=self._policies.get(costs_of),
                compile=self.compile,
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(
                f"{rows} rows of {slots} tokens do not fit into memory.\n"
                "Use fewer prompts at a time, a smaller context, or no learning."
            ) from error
        decoder.tenant = config.tenant
        if isinstance(decoder.planner.policy, DraftPolicy):
            self._policies[costs_of] = decoder.planner.policy
        decoder.capture()
        return decoder

    def rows_for(
        self, config: GenerateConfig, wanted: int, longest_prompt: int, *, sessions: bool
    ) -> int:
        """How many of `wanted` conversations fit into memory side by side, caches full; at least 1.

        Fewer than wanted are a notice: their answers are the same, and come later.

        Raises:
            OptionError: The longest prompt leaves no room for an answer.
        """
        config = self._resolved(config)
        slots = self._slots(config, longest_prompt, sessions=sessions)
        spare = self._spare
        if wanted == 1 or (spare and (spare.rows.count, spare.rows.slots) == (wanted, slots)):
            return wanted  # they are there
        self._spare = spare = None  # its memory may be had

        def need(rows: int) -> Forecast:
            return self.forecast(config, rows, longest_prompt, sessions=sessions)

        rows = fitting_rows(need, self.target, wanted)
        if rows < wanted:
            self._notify_once(
                f"{rows} of {wanted} requests fit into memory side by side, at {slots:,} tokens "
                "each; the others follow."
            )
        return rows

    def require_rows(
        self, config: GenerateConfig, rows: int, longest_prompt: int, *, sessions: bool
    ) -> str | None:
        """Refuse rows that do not fit, before anything is made; a notice where they may not.

        Raises:
            OptionError: The longest prompt leaves no room for an answer.
            ResourceError: The caches, the learner's weights or a round do not fit into memory.
        """
        need = self.forecast(config, rows, longest_prompt, sessions=sessions)
        slots = self._slots(config, longest_prompt, sessions=sessions)
        where = self.target.device
        return require_room(need, where, rows=rows, slots=slots, split=self.target.is_split)

    def forecast(
        self, config: GenerateConfig, rows: int, longest_prompt: int, *, sessions: bool
    ) -> Forecast:
        """What a decoder for these rows would take; raises as `require_rows` an `OptionError`."""
        slots = self._slots(config, longest_prompt, sessions=sessions)
        prompt, config = None if sessions else longest_prompt, self._resolved(config)
        need = forecast_run(self.target, self.drafter, config, rows, slots, prompt)
        # What all requests teach is there already.
        return replace(need, learning=0) if config in self._shared_weights else need

    def _resolved(self, config: GenerateConfig) -> GenerateConfig:
        """The same, with what is left open chosen for this pair."""
        config = config.resolved()
        draft = config.draft
        if self.drafter is not None:
            draft = self.drafter.with_context(draft)
        return replace(config, draft=draft)

    def _slots(self, config: GenerateConfig, longest_prompt: int, *, sessions: bool) -> int:
        """Tokens that a row must have room for."""
        context = min(self.target.context, config.context or self.target.context)
        if longest_prompt >= context:
            raise OptionError(
                f"The prompt has {longest_prompt} tokens; the context has room for {context}, the "
                "answer included.\n"
                + ("Shorten it." if context == self.target.context else "Give a larger context.")
            )
        need = longest_prompt + config.max_new_tokens
        if sessions:
            need = max(need, config.context or SESSION_CONTEXT)
        step = INVARIANT_STEP if config.deterministic else BUCKET
        return min(reach_of(need, need + step, step), context)

    def _notify_once(self, notice: str | None) -> None:
        if notice and self.notify and notice not in self._notices:
            self._notices.add(notice)
            self.notify(notice)

    def close(self) -> bool:
        """Keep what `learn.keep` asks to be kept, where the engine, or another, then goes on.

        Returns:
            False where a disk did not take it.
        """
        if closed := self._shared_weights.close():
            self._spare = None
        return all(closed)

    def thinking(self, config: GenerateConfig) -> bool | None:
        """Whether prompts ask the target to think; None where its template has no such switch."""
        asked, system, raw = config.thinking, config.system, config.raw
        return thinking_of(self.tokenizer, asked, system=system, raw=raw)

    def chat_template(self, config: GenerateConfig) -> ChatTemplate:
        """What writes prompts under `config`.

        Raises:
            OptionError: There is a system message and no template to write it.
        """
        system, raw, thinking = config.system, config.raw, config.thinking
        return ChatTemplate(self.tokenizer, system=system, raw=raw, thinking=thinking)
