"""Text in, text out: requests, turns, stops and statistics around the round."""

from __future__ import annotations

import copy
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.conversation import Conversation, advance, begin
from ttspec.decoding.forecast import (
    SMALLER,
    drafter_weights,
    of_run,
    require_room,
    require_weights,
)
from ttspec.decoding.policy import DraftPolicy
from ttspec.decoding.round import Decoder, position_noise
from ttspec.decoding.text import Message, next_turn_ids, prompt_ids, thinking_of
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import BUNDLED, DEFAULT_DRAFTERS, load_drafter
from ttspec.drafters.layers import Weights, multiplied_out
from ttspec.drafters.ngram import Ngram
from ttspec.errors import CheckpointError, OptionError, ResourceError, TargetError
from ttspec.learning.delta import difference, read_delta, write_delta
from ttspec.learning.live_weights import LiveWeights
from ttspec.models.loading import DeviceMap, Files
from ttspec.models.source import resolve
from ttspec.models.target import Target, find_target, load_target, wrap_target
from ttspec.records import Chunk, Result
from ttspec.rowcache import BUCKET, reach_of
from ttspec.sampling import process

PREFILL_SHARE = 16
"""In a batch, turns begin together, when more than 1 / this of the rows wait for one."""
SESSION_CONTEXT = 8192
"""Tokens a session makes room for unless told otherwise; the target's context if that is less."""
Prompt = str | Sequence[Message] | Sequence[int]
Notify = Callable[[str], None]


def load(
    target: str | tuple[PreTrainedModel, PreTrainedTokenizerBase] = "smollm2-135m",
    drafter: str | Drafter | None = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    device_map: DeviceMap | None = None,
    notify: Notify | None = None,
) -> Engine:
    """Load a target and a drafter.

    Args:
        target: Built-in name, local folder, .gguf file, hub id, or a loaded (model, tokenizer).
        drafter: Built-in name, local folder, hub id or a drafter; "ngram" copies from the text;
            "auto" is the bundled one for the target, if there is one; "none" or None is plain
            decoding.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        compile: On a GPU, let torch compile a round's models when they are first run: about 20
            seconds for a third less time a round.
        device_map: "auto" spreads a target that fits no single GPU over all; or a device for each
            of its modules. The drafter goes where the embedding is.
        notify: Told what takes long, and what may not fit into memory.

    Raises:
        TargetError, CheckpointError, ResourceError, OptionError: See their messages.
    """
    place = device_of(device)
    files = find_target(target, notify) if isinstance(target, str) else None
    loaded = None if isinstance(target, str) else wrap_target(*target)
    if drafter == "auto":
        drafter = DEFAULT_DRAFTERS.get(files.source.name if files else loaded.name)  # type: ignore[union-attr]
    if isinstance(drafter, str):
        drafter = find_drafter(drafter, notify)
    if files is not None:
        kind = dtype_of(dtype, place)
        loaded = _read(files, drafter, place, kind, device_map, notify)
    elif device_map is not None:
        raise OptionError("device_map is given, and the target is loaded already.\nLeave it out.")
    assert loaded is not None
    engine = Engine(loaded, drafter)
    engine.compile, engine.notify = compile, notify
    if compile and loaded.is_split:
        engine.compile = False
        if notify:
            notify("compile is for one GPU; a target on several is not compiled.")
    if compile and place.type != "cuda" and notify:
        notify("compile is for a GPU; on a CPU nothing is compiled.")
    return engine


def _read(
    files: Files,
    drafter: Drafter | None,
    place: torch.device,
    kind: torch.dtype,
    device_map: DeviceMap | None,
    notify: Notify | None,
) -> Target:
    """The target's weights, if there is room for them and the drafter's."""
    places, split = [place], device_map is not None
    if split and place.type == "cuda":
        places = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    more = drafter_weights(drafter, kind)
    if drafter and place.type == "cpu" and all(w.dtype == kind for w in drafter.weights.values()):
        more = 0  # it is there already, and stays as it is
    short = require_weights(files.nbytes(kind), more, places, name=files.source.name, split=split)
    if short and notify:
        notify(short)
    try:
        return load_target(files, device=place, dtype=kind, device_map=device_map)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"The weights of {files.source.name} do not fit into memory.\n{SMALLER}"
        ) from error


def find_drafter(name: str, notify: Notify | None = None) -> Drafter | None:
    """A drafter by built-in name, local folder or hub id; None for "none".

    Raises:
        CheckpointError: There is none, or its files are not what they should be.
    """
    if name == "none":
        return None
    return Ngram() if name == "ngram" else load_drafter(name, drafter_folder(name, notify))


def drafter_folder(name: str, notify: Notify | None = None) -> Path:
    """Where a drafter's files are: a built-in name, a local folder or a hub id.

    Raises:
        CheckpointError: There is none.
    """
    if name and (BUNDLED / name).is_dir():
        return BUNDLED / name
    try:
        found = resolve(name, notify=notify)
        if found.origin == "gguf":
            raise TargetError(f"{name} is a GGUF file, and no drafter is read from one.")
        return found.path
    except TargetError as error:
        bundled = sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())
        built_in = ", ".join(["ngram", "none", *bundled])
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{first}\nGive a drafter's folder, a hub id, or a built-in one: {built_in}."
        ) from error


def device_of(name: str) -> torch.device:
    """A device by option: "auto", "cpu" or "cuda"."""
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device is {name!r}; allowed are auto, cpu and cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device is cuda, but torch finds no CUDA device here.\nUse cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """A dtype by option; "auto" is bfloat16 where the hardware has it."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        native = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if native else torch.float32
    if name not in kinds:
        raise OptionError(f"dtype is {name!r}; allowed are auto, {', '.join(kinds)}.")
    return kinds[name]


class Engine:
    """A target with a drafter, ready to generate."""

    def __init__(self, target: Target, drafter: Drafter | None) -> None:
        """Bind the drafter to the target.

        Raises:
            CheckpointError: The drafter was made for another target.
        """
        self.target, self.drafter = target, drafter
        self.tokenizer = target.tokenizer
        if drafter is not None:
            layers = int(target.config.num_hidden_layers)
            drafter.bind(target.embedding, target.head, layers, target.tokenizer)
            target.taps = drafter.taps
        self.make_decoder: Callable[..., Decoder] = Decoder
        self.compile = False
        """Whether rounds are compiled on a GPU; see `load`."""
        self.notify: Notify | None = None
        """Told what may not fit into memory."""
        self.random_weights: dict[str, Any] | None = None
        """Shapes and forced acceptance, where there are no real weights (`forced.load_random`)."""
        self._spare: Decoder | None = None
        """The last `run`'s, kept with its caches and graphs for one that needs the same."""
        self._shared_weights: dict[tuple[LearnConfig, DraftConfig], LiveWeights] = {}
        """What learns from all requests, by how it learns and what it sees."""
        self._policies: dict[tuple[Any, ...], DraftPolicy] = {}
        """What earlier requests found out about costs, by what they may depend on."""

    def sibling(self) -> Engine:
        """An engine of the same pair, which learns and keeps caches for itself."""
        other = copy.copy(self)
        other._spare, other._shared_weights, other._policies = None, {}, {}
        return other

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Result]:
        """Answer one prompt or many, side by side.

        Args:
            prompts: A text, or a list of texts, message lists or token lists.
            **options: Fields of `GenerateConfig`.

        Returns:
            One result per prompt, in order. A prompt's answer does not depend on the others.
        """
        single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict | int))
        many = cast(list[Prompt], [prompts] if single else list(prompts))
        results: list[Result | None] = [None] * len(many)
        for index, chunk in self.run([[p] for p in many], stream=False, **options):
            results[index] = chunk.result or results[index]
        return [r for r in results if r is not None]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Answer one prompt chunk by chunk; the last chunk has the result."""
        for _, chunk in self.run([[prompt]], **options):
            yield chunk

    def session(self, *, resume: str | Path | None = None, **options: Any) -> Session:
        """A conversation whose turns share context and, with scope "session", what was learned.

        Args:
            resume: What `Session.save` or `--save-drafter` wrote: drafting begins there.
            **options: Fields of `GenerateConfig`.

        Raises:
            CheckpointError, OptionError: The file is unusable, or of another drafter.
        """
        config = make_config(options)
        if resume is None:
            return Session(self, config)
        if Path(resume).is_dir():
            return Session(self._with(load_drafter(str(resume), Path(resume))), config)
        if config.learn and config.learn.scope == "shared":
            raise OptionError(
                "learn.scope is shared, and a session goes on from what one has learned.\n"
                "Use learn.scope session, or leave out what it goes on from."
            )
        delta, drafter = read_delta(Path(resume)), self.drafter
        delta.require(drafter)
        assert drafter is not None
        start = delta.start(drafter, config.learn)
        if start is not None:
            return Session(self, config, start=start)
        new, other = copy.copy(drafter), self.sibling()
        whole = {n: w.to(drafter.weights[n]) for n, w in delta.applied(drafter.weights).items()}
        new.weights, other.drafter = {**drafter.weights, **whole}, new
        return Session(other, config, origin=drafter)

    def _with(self, drafter: Drafter) -> Engine:
        other = Engine(copy.copy(self.target), drafter)  # a target tells one drafter's features
        other.make_decoder, other.compile = self.make_decoder, self.compile
        other.notify = self.notify
        return other

    def run(
        self,
        dialogues: Sequence[Sequence[Prompt]],
        *,
        rows: int | None = None,
        stream: bool = True,
        quota: int | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Chunk]]:
        """Run many conversations side by side, each a list of user turns.

        An interrupt ends what is going on as cancelled; every conversation then has its result.

        Args:
            dialogues: Turns, answered one after the other; a row that is done takes the next.
            rows: Conversations at a time; None is all of them.
            stream: Without it, text comes only with the result.
            quota: Tokens that a dialogue may have over all turns; None is no limit.
            seeds: One for each dialogue; None is `seed` for all.
            **options: Fields of `GenerateConfig`; limits hold for each turn.

        Yields:
            (index of the dialogue, chunk). A chunk with a result ends a turn.
        """
        config = make_config(options)
        if seeds is None:
            seed = secrets.randbits(31) if config.seed is None else config.seed
            seeds = [seed] * len(dialogues)
        thinking = self._thinking(config)
        prompts = [self._first(config, d[0]) for d in dialogues]
        if not prompts:
            return
        seen: Counter[tuple[int, ...]] = Counter()  # by seed and prompt
        rows = min(rows or len(prompts), len(prompts))
        turns = max(map(len, dialogues))
        decoder = self.decoder(config, rows, max(map(len, prompts)), sessions=turns > 1)
        waiting = deque(range(len(prompts)))
        going: dict[int, Conversation] = {}  # by dialogue; rows are reused
        free = list(range(rows))
        ready: dict[int, tuple[Conversation, list[int], int]] = {}
        try:
            while waiting or going:
                for index, talk in going.items():
                    if talk.finish and index not in ready:
                        ids = self._next(talk, dialogues[index][talk.turn])
                        ready[index] = talk, ids, 0
                while free and waiting:
                    index, row = waiting.popleft(), free.pop()
                    decoder.clear(row)
                    going[index] = Conversation(decoder, row, config, seeds[index], stream=stream)
                    going[index].quota, going[index].thinking = quota, thinking
                    asked = seeds[index], *prompts[index]
                    occurrence = seen[asked]
                    seen[asked] += 1
                    ready[index] = going[index], prompts[index], occurrence
                # A prefill holds up all rows, so in a large batch rows wait for company.
                if len(ready) > rows // PREFILL_SHARE or len(ready) == len(going):
                    begin(decoder, list(ready.values()))
                    moved = [(index, talk) for index, (talk, _, _) in ready.items()]
                    ready = {}
                else:
                    moved = [(i, talk) for i, talk in going.items() if i not in ready]
                    advance(decoder, [talk for _, talk in moved])
                for index, talk in moved:
                    chunk = talk.chunk()
                    if chunk.result and self._over(talk, dialogues[index]):
                        free.append(talk.row)
                        del going[index]
                    yield index, chunk
            self._spare = decoder
        except KeyboardInterrupt:
            for index in waiting:
                going[index] = Conversation(decoder, 0, config, seeds[index], stream=stream)
            for index, talk in going.items():
                if talk.finish:
                    continue  # between two turns: its last result is out
                if not talk.opened:
                    talk.open(prompts[index])
                talk.cancel()
                yield index, talk.chunk()

    def decoder(
        self, config: GenerateConfig, rows: int, longest_prompt: int, *, sessions: bool
    ) -> Decoder:
        """Slots for `rows` conversations under `config`.

        Raises:
            OptionError: The longest prompt leaves no room for an answer.
            ResourceError: The caches or the learner's weights do not fit into memory.
        """
        config = config.resolved()
        context = min(self.target.context, config.context or self.target.context)
        if longest_prompt >= context:
            raise OptionError(
                f"The prompt has {longest_prompt} tokens; the context has room for {context}, the "
                "answer included.\nShorten the prompt."
            )
        need = longest_prompt + config.max_new_tokens
        if sessions:
            need = max(need, config.context or SESSION_CONTEXT)
        shape: dict[str, Any] = {
            "rows": rows,
            "slots": min(reach_of(need, need + BUCKET, BUCKET), context),
            "sampling": replace(config, seed=0).sampling(self.target.defaults),
            "draft": config.draft,
            "learn": config.learn,
            "ends": () if config.ignore_eos else self.target.ends,
            "batch_invariant": config.deterministic,
        }
        spare, self._spare = self._spare, None
        if spare is not None and spare.shape == shape:
            spare.restart()
            return spare
        del spare  # before the new caches are made
        need = of_run(self.target, self.drafter, config, rows, shape["slots"])
        if (
            config.learn,
            config.draft,
        ) in self._shared_weights:  # what learns from all is there already
            need = replace(need, learning=0)
        told = require_room(
            need, self.target.device, rows=rows, slots=shape["slots"], split=self.target.is_split
        )
        if told and self.notify:
            self.notify(told)
        try:
            live_weights = self._find_shared_weights(config)
            known = rows, config.draft, config.learn, shape["sampling"], self.compile
            decoder = self.make_decoder(
                self.target,
                self.drafter,
                **shape,
                live_weights=live_weights,
                policy=self._policies.get(known),
                compile=self.compile,
            )
            if decoder.policy:
                self._policies[known] = decoder.policy
            return decoder
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(
                f"{rows} rows of {shape['slots']} tokens do not fit into memory.\n"
                "Use fewer prompts at a time, a smaller context, or no learning."
            ) from error

    def _find_shared_weights(self, config: GenerateConfig) -> LiveWeights | None:
        learn, drafter = config.learn, self.drafter
        if learn is None or learn.scope != "shared" or drafter is None or not drafter.weights:
            return None
        key = learn, config.draft
        if key not in self._shared_weights:
            self._shared_weights[key] = LiveWeights(learn, drafter, 1)
        return self._shared_weights[key]

    def margin(self, ids: Sequence[int], at: int, key: int | None = None, **options: Any) -> float:
        """How clear-cut a token was: best minus second best score, recomputed in one row.

        Args:
            ids: Prompt and answer.
            at: Index into `ids` of the token in question.
            key: Its noise key; None is greedy.
            **options: Fields of `GenerateConfig`, for the sampling.

        Returns:
            The gap in processed logits, noise included.
        """
        sampling = replace(make_config(options), seed=0).sampling(self.target.defaults)
        cache = self.target.cache(1, at + 1)
        tokens = torch.tensor([list(ids[:at])], device=self.target.device)
        start = torch.zeros(1, dtype=torch.long, device=self.target.device)
        row = torch.zeros_like(start)
        logits, _ = self.target.forward(cache, tokens, start, 0, subset=row, counts=start + at)
        assert logits is not None
        scores = process(logits[0, -1], sampling)
        if key is not None and sampling.temperature > 0:
            scores = (
                scores
                + position_noise(
                    torch.tensor([key], device=start.device), start + at, 1, scores.shape[-1]
                )[0, 0]
            )
        best = scores.topk(2).values
        return float(best[0] - best[1])

    def _thinking(self, config: GenerateConfig) -> bool | None:
        how: dict[str, Any] = {"system": config.system, "raw": config.raw}
        return thinking_of(self.tokenizer, config.thinking, **how)

    def _first(self, config: GenerateConfig, turn: Prompt) -> list[int]:
        how: dict[str, Any] = {"raw": config.raw, "thinking": config.thinking}
        return prompt_ids(self.tokenizer, turn, system=config.system, **how)

    def _next(self, talk: Conversation, turn: Prompt) -> list[int]:
        pending, config = talk.decoder.pending[talk.row], talk.config
        how: dict[str, Any] = {"raw": config.raw, "thinking": config.thinking}
        return next_turn_ids(self.tokenizer, str(turn), pending, **how)

    @staticmethod
    def _over(talk: Conversation, dialogue: Sequence[Prompt]) -> bool:
        spent = talk.quota is not None and talk.generated >= talk.quota
        return spent or talk.turn == len(dialogue) or talk.finish in ("context", "cancelled")


class Session:
    """One conversation, turn by turn. Its drafter keeps what it learned until it is closed."""

    def __init__(
        self,
        engine: Engine,
        config: GenerateConfig,
        *,
        start: Weights | None = None,
        origin: Drafter | None = None,
    ) -> None:
        """Made by `Engine.session`; `origin` has the weights that the engine's are a change of."""
        self.engine, self.config = engine, config
        self._start, self._origin = start, origin or engine.drafter
        self.seed = secrets.randbits(31) if config.seed is None else config.seed
        self._talk: Conversation | None = None

    def send(self, text: Prompt) -> Result:
        """Answer a user turn."""
        *_, last = self.stream(text)
        assert last.result is not None
        return last.result

    def stream(self, text: Prompt) -> Iterator[Chunk]:
        """Answer a user turn chunk by chunk; an interrupt or a dropped stream cancels it."""
        talk, ids = self._open(text)
        try:
            begin(talk.decoder, [(talk, ids, 0)])
            yield talk.chunk()
            while not talk.finish:
                advance(talk.decoder, [talk])
                yield talk.chunk()
        except KeyboardInterrupt:
            talk.cancel()
            yield talk.chunk()
        finally:
            if not talk.finish:
                talk.cancel()

    @property
    def generated(self) -> int:
        """Tokens generated in all turns."""
        return self._talk.generated if self._talk else 0

    def learned(self) -> Drafter:
        """A new drafter with the weights as they are now, to be used or exported like any other.

        Raises:
            OptionError: There is no drafter, or nothing was drafted yet.
        """
        drafter = self.engine.drafter
        if drafter is None:
            raise OptionError("The session has no drafter.\nLoad the engine with one.")
        state = self._talk.decoder.state if self._talk else None
        if state is None:
            raise OptionError(
                "The session has drafted nothing: it has not begun, or is closed, or "
                "draft.length is 0.\nAsk for what was learned after a turn."
            )
        new = copy.copy(drafter)
        live = {n: w[0] if drafter.is_own(n, w) else w for n, w in state.weights.items()}
        new.weights = {n: w.detach().clone() for n, w in multiplied_out(live).items()}
        return new

    def save(self, path: str | Path) -> None:
        """Write what was learned to a new .safetensors file, for `resume`: only the change.

        Raises:
            OptionError: Nothing was learned yet, or `path` is taken or ends otherwise.
        """
        learner = self._talk.decoder.learner if self._talk else None
        if learner is None or self._origin is None:
            raise OptionError(
                "The session has learned nothing: it has not begun, is closed, or does not learn."
                "\nSave what was learned after a turn."
            )
        changes = learner.learned(0)
        if self._origin is self.engine.drafter:
            if learner.config.weights == "full":
                changes = difference(changes, self._origin.weights)
        else:  # what it went on from counts
            floats = {n: w for n, w in self.learned().weights.items() if w.is_floating_point()}
            moved = {n: w for n, w in floats.items() if not w.equal(self._origin.weights[n])}
            changes = difference(moved, self._origin.weights)
        write_delta(Path(path), self._origin, learner.config, changes)

    def close(self) -> None:
        """Free the session's caches and what its drafter learned."""
        self._talk = None

    def _open(self, text: Prompt) -> tuple[Conversation, list[int]]:
        engine, config = self.engine, self.config
        if self._talk is None or not self._talk.decoder.lengths[0]:  # nothing said so far
            thinking = engine._thinking(config)
            ids = engine._first(config, text)
            if self._talk is None:
                decoder = engine.decoder(config, 1, len(ids), sessions=True)
                if self._start is not None and decoder.learner:
                    decoder.learner.weights.start_from(self._start)
                self._talk = Conversation(decoder, 0, config, self.seed)
                self._talk.thinking = thinking
            return self._talk, ids
        return self._talk, engine._next(self._talk, text)


def make_config(options: dict[str, Any]) -> GenerateConfig:
    """A `GenerateConfig` from keyword options.

    Raises:
        OptionError: A name or a value is not allowed.
    """
    known = {f.name for f in fields(GenerateConfig)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise OptionError(f"{unknown[0]} is no option; options are {', '.join(sorted(known))}.")
    return GenerateConfig(**options)
