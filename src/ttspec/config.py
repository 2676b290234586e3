"""Frozen options, checked when they are made. Knows no tensors and no models."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from ttspec.errors import OptionError

Scope = Literal["request", "session", "shared"]
PENALTIES = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "min_length"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""Options of sampling that look at the text so far, or at single tokens; all are off by default."""
COLDEST = 1e-30
"""Below this, dividing logits by the temperature would overflow; 0 says greedy."""


def _require(ok: object, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise OptionError(f"{name} is {value!r}; allowed is {allowed}.")


class _Options:
    """A record whose unknown keywords, and values of other kinds, are an `OptionError`."""

    __slots__ = ()
    group: ClassVar[str] = ""

    def __new__(cls, **options: object) -> Self:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        hints = _hints(cls)
        for name, value in options.items():
            full = f"{cls.group}.{name}" if cls.group else name
            if name not in known:
                meant = "".join(f"\nIs {n} meant?" for n in get_close_matches(name, known, n=1))
                raise OptionError(f"{full} is no option; options are {', '.join(known)}.{meant}")
            kinds = get_args(hints[name]) if isinstance(hints[name], UnionType) else (hints[name],)
            fits = any(_is_of(value, kind) for kind in kinds)
            _require(fits, full, value, " or ".join(map(_named, kinds)))
        return object.__new__(cls)


_hints = cache(get_type_hints)
_KINDS = {int: "a whole number (int64)", float: "a number", bool: "True or False", str: "a text"}


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a kind; what collections hold is looked at where they are used."""
    if origin := get_origin(kind):
        return origin is not Literal or value in get_args(kind)
    if isinstance(value, bool):  # which Python takes for an int
        return kind is bool
    fits = not isinstance(value, int) or abs(value) < 1 << 63  # else no tensor holds it
    return fits and isinstance(value, Real if kind is float else kind)


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return "None" if kind is NoneType else _KINDS.get(kind, f"a {kind.__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the target's next token is chosen. The drafter never changes it."""

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that are there, prompt included; multiplies negative ones."""
    presence_penalty: float = 0.0
    """Taken from the scores of tokens that were generated."""
    frequency_penalty: float = 0.0
    """Taken from them as often as they were generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to their scores."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice, prompt included; 0 lets all."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that never come."""
    min_new_tokens: int = 0
    """Tokens of an answer before an end token may come."""
    min_length: int = 0
    """The same, prompt included; without meaning beside `min_new_tokens`."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that never come."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that no answer begins with."""
    seed: int = 0
    """One seed gives one text, for every drafter, learner, stride and batch (float32)."""
    acceptance: Literal["invariant", "rejection"] = "invariant"
    """Drafter-invariant Gumbel sampling, or the classic p/q rejection rule."""

    def __post_init__(self) -> None:
        t, p, m = self.temperature, self.top_p, self.min_p
        _require(
            t == 0 or COLDEST <= t < math.inf, "temperature", t, f"0 (greedy) or from {COLDEST} up"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < p <= 1, "top_p", p, "above 0 and at most 1")
        _require(0 <= m <= 1, "min_p", m, "from 0 to 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        r = self.repetition_penalty
        ok = isinstance(r, int | float) and 0 < r < math.inf
        _require(ok, "repetition_penalty", r, "a number above 0; 1 is no penalty")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            ok = isinstance(value, int | float) and -2 <= value <= 2
            _require(ok, name, value, "from -2 to 2")
        for token, bias in self.logit_bias:
            _require(-100 <= bias <= 100, f"logit_bias of token {token}", bias, "from -100 to 100")
        for name in ("no_repeat_ngram_size", "min_new_tokens", "min_length"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 0, name, value, "a whole number from 0 up")
        _require(all(self.bad_words_ids), "bad_words_ids", self.bad_words_ids, "no empty word")
        for name, tokens in self.tokens_named().items():
            for token in tokens:
                _require(isinstance(token, int) and token >= 0, name, token, "tokens from 0 up")

    @property
    def penalises(self) -> bool:
        """Whether the text so far, or a list of tokens, changes what may come next."""
        neutral = SamplingConfig.__dataclass_fields__
        return any(getattr(self, name) != neutral[name].default for name in PENALTIES)

    def tokens_named(self) -> dict[str, list[int]]:
        """The tokens that options name, by option."""
        return {
            "logit_bias": [token for token, _ in self.logit_bias],
            "bad_words_ids": [token for word in self.bad_words_ids for token in word],
            "suppress_tokens": list(self.suppress_tokens),
            "begin_suppress_tokens": list(self.begin_suppress_tokens),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig(_Options):
    """How a drafter is run, learning or not. What keeps each option: docs/options.md."""

    group: ClassVar[str] = "draft"
    length: int | None = None
    """Tokens drafted a round; 0 is plain decoding; None is the drafter's own length."""
    context: Literal["auto", "whole"] = "auto"
    """What a drafter sees of a long text: all of it (whole), or what measured best for its kind
    (auto): the last 512 tokens; all for draft models and MTP. `window` and `rebase` set it."""
    window: int | None = None
    """The drafter sees only this many last context tokens; None is what its checkpoint says."""
    rebase: int | None = None
    """Context further back than this looks to the drafter as if it were this far back."""
    rope_base: float | None = None
    """The drafter's rotary base; None is what its checkpoint says."""
    copy: bool = True
    """Where the last tokens of a row stood before, verify what followed there instead of a draft,
    up to 31 tokens, if that promises more."""
    adaptive: bool = True
    """Draft less, or not at all, where measured costs say that it does not pay, and learn seldom
    where learning does not: so no drafter is slower than plain decoding, but for a few tries. Where
    a clock would change what a seed writes (rejection, deterministic), every round drafts."""

    def __post_init__(self) -> None:
        for name in ("window", "rebase"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"draft.{name}", value, "1 or more")
        length, base = self.length, self.rope_base
        _require(length is None or length >= 0, "draft.length", length, "0 or more")
        _require(base is None or 1 < base < math.inf, "draft.rope_base", base, "above 1, as 10000")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnConfig(_Options):
    """When the drafter learns, on what, and how far a step goes. Measurements: docs/options.md."""

    group: ClassVar[str] = "learn"
    stride: int | None = None
    """Rounds between updates; None is 8, 16 for low-rank changes, more where that does not pay."""
    weights: Literal["auto", "full", "lora"] = "auto"
    """What learns: the weights themselves (full), or low-rank changes of the matrices that make no
    context (lora), which take a fiftieth of the memory and let many rows learn side by side; auto
    is full as long as all copies of the weights stay small."""
    rank: int = 8
    """Rank of low-rank changes."""
    lr: float | None = None
    """Adam's learning rate; None is what measured best for the kind of drafter and of weights."""
    beta1: float | None = None
    """Adam's decay of the first moment; None is 0, and 0.9 in scope shared."""
    beta2: float = 0.99
    """Adam's decay of the second moment."""
    supervision: Literal["block", "accepted", "hindsight"] = "hindsight"
    """Which positions of a block teach: all (block), up to the first rejection (accepted), or all,
    some rounds later, against what was really committed (hindsight)."""
    blocks: int = 8
    """Blocks replayed at an update, the newest: 1 is the latest round only, `stride` is each once,
    more sees each several times."""
    loss: Literal["kl", "tv"] = "kl"
    """What brings the drafter nearer: KL(p || q), or total variation (tv)."""
    decay: float = 0.0
    """Position j of a block weighs exp(-(j - 1) / decay); 0 weighs all alike."""
    parameters: Literal["full", "last"] = "full"
    """Which weights learn: all (full), or what lies behind the last attention (last): no key or
    value of the context depends on those, and an update goes back through few layers."""
    scope: Scope = "request"
    """Who learns, and how long it lasts: each request, each session, or one drafter for all that an
    engine answers (shared), whose speed, never whose text, then depends on what others wrote."""
    guard: int = 8
    """Every so many updates live and anchor weights are compared on blocks that taught neither;
    live ones that are worse are put back, and rest. In scope shared it is twice as often, and the
    anchor drafts while it is better. 0 never compares."""
    keep: str | None = None
    """In scope shared, a folder of versions that held-out blocks find no worse: learning goes on
    from the newest; None is none: what was learned ends with the process."""
    publish: Literal["now", "ready", "stride"] = "ready"
    """Which round first drafts with what an update made: the next after it is over (ready; a GPU
    updates beside the rounds), the next stride's first, so that runs repeat (stride), or the next
    one, which waits (now)."""

    def __post_init__(self) -> None:
        def check(name: str, ok: object, allowed: str) -> None:
            _require(ok, f"learn.{name}", getattr(self, name), allowed)

        check("stride", self.stride is None or self.stride >= 1, "1 or more")
        check("blocks", self.blocks >= 1, "1 or more")
        check("rank", self.rank >= 1, "1 or more")
        check("guard", 0 <= self.guard < math.inf, "0 (none) or more")
        check("lr", self.lr is None or 0 < self.lr < 1e38, "above 0")
        check("beta1", self.beta1 is None or 0 <= self.beta1 < 1, "from 0 to below 1")
        check("beta2", 0 <= self.beta2 < 1, "from 0 to below 1")
        check("decay", self.decay >= 0, "0 (uniform) or more")
        shared, hindsight = self.scope == "shared", self.supervision == "hindsight"
        check("supervision", hindsight or not shared, "hindsight with learn.scope shared")
        check("keep", self.keep is None or (shared and self.keep), "a folder, with scope shared")

    @classmethod
    def paper(cls) -> Self:
        """The published recipe, as far as it is known: whole block, latest round, one Adam step.

        Stride, rate and weights are not published; these are the values others started from.
        """
        return cls(
            stride=10,
            weights="full",
            lr=1e-4,
            supervision="block",
            blocks=1,
            decay=4.0,
            beta1=0.9,
            beta2=0.999,
            publish="stride",
            guard=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig(_Options):
    """Everything one generation can be told. None leaves a choice to the target's own defaults."""

    max_new_tokens: int = 256
    """Tokens generated at most (in a session: a turn)."""
    temperature: float | None = None
    """0 is greedy; None is the target's generation_config, or greedy."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float | None = None
    """Keep tokens at least this likely relative to the most likely one."""
    repetition_penalty: float | None = None
    """Above 1, tokens that are there already, prompt included, become less likely: their scores are
    divided by it, negative ones multiplied. 1 is no penalty; None is the target's
    generation_config, here and for all limits and bans below."""
    presence_penalty: float | None = None
    """Taken from the scores of tokens that the answer has, from -2 to 2."""
    frequency_penalty: float | None = None
    """Taken from them once for each time that the answer has them, from -2 to 2."""
    logit_bias: dict[int, float] | None = None
    """Added to the scores of tokens, from -100 to 100: {198: -5.0}."""
    no_repeat_ngram_size: int | None = None
    """No run of so many tokens comes twice, prompt included; 0 lets them come."""
    bad_words: tuple[str, ...] = ()
    """Texts that never come, as they stand or after a space, as the tokenizer cuts them."""
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    """The same as tokens."""
    min_new_tokens: int | None = None
    """Tokens generated (in a session: a turn) before an end token may come."""
    min_length: int | None = None
    """The same, prompt included; without meaning beside min_new_tokens."""
    suppress_tokens: tuple[int, ...] | None = None
    """Tokens that never come."""
    begin_suppress_tokens: tuple[int, ...] | None = None
    """Tokens that no answer begins with."""
    seed: int | None = None
    """None is a random one, which the statistics tell."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    ignore_eos: bool = False
    """Go on past end tokens."""
    system: str | None = None
    """System message for the chat template; None is the template's own."""
    raw: bool = False
    """Feed the prompt as it is, without the chat template."""
    thinking: bool | None = None
    """Whether the chat template lets the target think first, where it has such a switch; None
    is what the template does by itself."""
    context: int | None = None
    """Tokens a conversation may have in all, at most the target's context; None is what one
    request needs, and 8192 for a session."""
    acceptance: Literal["invariant", "rejection"] = "invariant"
    """Drafter-invariant sampling, or the classic p/q rejection rule."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    """How the drafter is run."""
    learn: LearnConfig | None = field(default_factory=LearnConfig)
    """How the drafter learns; None is a static drafter."""
    tenant: str | None = None
    """Whose requests these are: in scope shared, they teach weights that no other tenant has."""
    deterministic: bool = False
    """A run repeats bit for bit, and with a drafter writes what plain decoding writes, in bfloat16
    too: no clock decides anything, updates are published at strides, and every round drafts, and
    reads 16 tokens (or a multiple, where more are drafted)."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(self.context is None or self.context >= 2, "context", self.context, "2 or more")
        for name in ("thinking", "system"):
            if self.raw and getattr(self, name) is not None:
                raise OptionError(
                    f"{name} was given together with raw, which uses no chat template.\n"
                    "Drop one of the two."
                )
        _require(self.tenant != "", "tenant", self.tenant, "a name of at least one character")
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)  # one text alone would be read as its characters
            are_many = isinstance(texts, Collection) and not isinstance(texts, str)
            ok = are_many and all(isinstance(text, str) and text for text in texts)
            _require(ok, name, texts, "a list of texts, none of them empty")
            object.__setattr__(self, name, tuple(texts))  # the caller's list may change later
        self.sampling({})  # refuses what SamplingConfig refuses
        least, most = self.min_new_tokens or 0, self.max_new_tokens
        _require(least <= most, "min_new_tokens", least, f"0 to max_new_tokens, which is {most}")

    def resolved(self) -> Self:
        """The same without what a clock decides, if it is to be deterministic."""
        if not self.deterministic:
            return self
        learn = self.learn
        if learn and learn.publish == "ready":
            learn = replace(learn, publish="stride")
        return replace(self, learn=learn)

    def sampling(
        self, defaults: Mapping[str, Any], *, bad_words: Collection[Sequence[int]] = ()
    ) -> SamplingConfig:
        """The sampling options, with what is None taken from `defaults`.

        Args:
            defaults: By name; what is not there either is `SamplingConfig`'s.
            bad_words: Tokens of this config's `bad_words`.
        """
        given = {f.name: getattr(self, f.name, None) for f in fields(SamplingConfig)}
        chosen = {**defaults, **{n: v for n, v in given.items() if v is not None}}
        for name, (made, form) in _FORMS.items():
            value = chosen.get(name, ())
            try:
                chosen[name] = made(value)
            except (TypeError, ValueError):
                raise OptionError(f"{name} is {value!r}; allowed is as in {form}.") from None
        chosen["bad_words_ids"] += _words(bad_words)
        return SamplingConfig(**chosen)


def _pairs(biases: Any) -> tuple[tuple[int, float], ...]:
    """Biases of a dictionary, or of pairs, as a manifest has them."""
    return tuple(sorted((int(token), float(bias)) for token, bias in dict(biases).items()))


def _words(words: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(word) for word in words)


_FORMS: dict[str, tuple[Any, str]] = {
    "logit_bias": (_pairs, "{198: -5.0, 11: 2.0}"),
    "bad_words_ids": (_words, "[[11, 12], [198]]"),
    "suppress_tokens": (tuple, "[11, 198]"),
    "begin_suppress_tokens": (tuple, "[11, 198]"),
}
"""Options that are lists: what makes them fit to compare and to hash, and how they are given."""
