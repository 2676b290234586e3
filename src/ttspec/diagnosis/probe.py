"""Measures whether a drafter is read as it was trained: is another reading accepted more often?

The target writes plain greedy text once. Then, at every position of it, the drafter's first token
is compared with the target's, under each reading: other taps, another rotary base, another row of
the block that predicts first (files may not say which: vllm#56792). Nothing is drafted in rounds,
so all readings see the same positions and differences are paired.

Acceptance alone is a blunt instrument: a tap one layer off can cost a small drafter 2 of 100 first
tokens, which is noise in a few hundred positions. What the drafter gave for the target's token, in
nats, tells the same readings apart there, so it is judged too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Any

import torch
from torch import Tensor

from ttspec.config import DraftConfig
from ttspec.decoding.engine import Engine
from ttspec.diagnosis.findings import (
    TAP_KEYS,
    Finding,
    base_text,
    draft_base,
    given_taps,
    target_base,
)
from ttspec.drafters.base import Drafter
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.rotary import DEFAULT_BASE
from ttspec.errors import OptionError
from ttspec.records import ReplayBatch

PROMPTS = (
    "Explain in a few sentences why the sea is salty.",
    "Write a Python function that counts the vowels in a string.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show each step.",
    "Describe how bread is baked, from the flour to the loaf.",
    "Tell a short story about a lighthouse keeper and a storm.",
    "What is the difference between weather and climate?",
    "Write a polite letter that asks for a new library card.",
    "How does a bicycle stay upright? Explain it to a child.",
)
TOKENS = 96
"""Of each text: where a small model still says something new."""
BLOCKS = 16
"""Positions drafted at once; their logits are held over the whole vocabulary."""
BASES = (DEFAULT_BASE, 1e6)
CONFIDENCE = 0.95
LOW_ACCEPTANCE = 0.2
"""Below this share of first drafts, a reading that is the best of all is still a bad one."""
TOO_FEW = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One way to run the drafter, and what it changes."""

    name: str
    taps: tuple[int, ...]
    rope_base: float | None = None
    from_anchor: bool | None = None
    """Of blocks: whether the known token's row predicts; None is as the drafter was read."""
    setting: str | None = None
    """How a user gets it; None for the reading there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How often the target's next token is the drafter's first one."""

    reading: Reading
    hits: tuple[bool, ...]
    """Position by position, the same ones for every reading."""
    nats: tuple[float, ...]
    """-log q of the target's token there; infinite where the drafter does not know it."""

    @property
    def known(self) -> tuple[float, ...]:
        """Those that are finite: where the drafter knows the target's token."""
        return tuple(x for x in self.nats if math.isfinite(x))

    @property
    def surprise(self) -> float:
        """Mean of the known ones; 0 of none."""
        return sum(self.known) / max(1, len(self.known))

    @property
    def acceptance(self) -> float:
        """Share of hits; 0 of none."""
        return sum(self.hits) / max(1, len(self.hits))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share, as if positions were independent."""
        n, p, z = len(self.hits), self.acceptance, _standard_errors(1)
        if not n:
            return 0.0, 1.0
        middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        low, high = (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)
        return max(0.0, min(low, p)), min(
            1.0, max(high, p)
        )  # rounding may pass p where it is 0 or 1

    def sign_test(self, other: Measured) -> float:
        """How likely positions that differ are shared out so unevenly by chance (sign test)."""
        pairs = list(zip(self.hits, other.hits, strict=True))
        more, less = pairs.count((True, False)), pairs.count((False, True))
        n = more + less
        tail = sum(math.comb(n, i) for i in range(min(more, less) + 1)) / 2**n
        return min(1.0, 2 * tail)

    def change(self, other: Measured, tries: int = 1) -> tuple[float, float]:
        """How much larger the surprise is than another reading's, and its margin of error."""
        differences = [a - b for a, b in zip(self.known, other.known, strict=True)]
        if len(differences) < 2:
            return 0.0, math.inf
        error = stdev(differences) / math.sqrt(len(differences))
        return mean(differences), _standard_errors(tries) * error

    def is_better_than(self, other: Measured, tries: int) -> bool:
        """Better in one measure and worse in none, beyond what chance does in so many tries."""
        change, margin = self.change(other, tries)
        clear = abs(change) > margin
        uneven = self.sign_test(other) < (1 - CONFIDENCE) / tries
        better = (clear and change < 0) or (uneven and self.acceptance > other.acceptance)
        worse = (clear and change > 0) or (uneven and self.acceptance < other.acceptance)
        return better and not worse


def probe(
    engine: Engine, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS
) -> tuple[list[Measured], Finding]:
    """Measure every reading on text that the target writes, and say which is best.

    Raises:
        OptionError: The drafter has nothing that could be misread.
    """
    drafter = engine.drafter
    if drafter is None or not drafter.weights:
        raise OptionError(
            f"--probe measures a drafter's weights; {drafter.name if drafter else 'none'} has none."
            "\nName a drafter, or drop --probe."
        )
    measured = measure(engine, write(engine, prompts, tokens))
    return measured, probe_finding(measured)


def write(engine: Engine, prompts: Sequence[str], tokens: int) -> list[tuple[list[int], int]]:
    """The target's own greedy answers: (prompt and answer, where the answer begins)."""
    results = engine.generate(
        list(prompts),
        max_new_tokens=tokens,
        temperature=0.0,
        seed=0,
        learn=None,
        draft=DraftConfig(length=0),
    )
    return [(r.prompt_ids + r.token_ids, len(r.prompt_ids)) for r in results]


@torch.no_grad()
def measure(engine: Engine, texts: Sequence[tuple[list[int], int]]) -> list[Measured]:
    """Every reading, the present one first, on the target's texts."""
    target, drafter = engine.target, engine.drafter
    assert drafter is not None
    alternatives = readings(engine)
    taps = sorted({tap for reading in alternatives for tap in reading.taps})
    found: dict[Reading, list[tuple[bool, float]]] = {reading: [] for reading in alternatives}
    for ids, begin in texts:
        tokens = torch.tensor([ids], device=target.device)
        before, target.taps = target.taps, tuple(taps)
        try:
            features, _ = target.read(tokens)
        finally:
            target.taps = before
        width = features.shape[-1] // max(1, len(taps))
        layers = dict(zip(taps, features.split(max(1, width), dim=-1), strict=False))
        for reading in alternatives:
            own = [layers[tap] for tap in reading.taps]
            own = torch.cat([features[..., :0], *own], dim=-1)
            found[reading] += _compare(drafter, reading, tokens, own, begin)
    return [
        Measured(reading=r, hits=tuple(h for h, _ in pairs), nats=tuple(n for _, n in pairs))
        for r, pairs in found.items()
    ]


def readings(engine: Engine) -> list[Reading]:
    """The present reading, and the others that are possible for this pair."""
    drafter = engine.drafter
    assert drafter is not None
    layers = int(engine.target.config.num_hidden_layers)
    found = [Reading(name="as read", taps=drafter.taps)]
    for shift in (-1, 1) if drafter.kind in TAP_KEYS and drafter.taps else ():
        taps = tuple(t + shift for t in drafter.taps)
        if all(0 <= t <= layers for t in taps):
            name = f"taps {'+' if shift > 0 else '-'} 1"
            found.append(Reading(name=name, taps=taps, setting=tap_setting(drafter, taps)))
    if isinstance(drafter, DFlash) and drafter.kind != "domino" and drafter.block > 1:
        other = not drafter.from_anchor
        name = "the known token's position predicts" if other else "masks alone predict"
        setting = f"set sample_from_anchor to {str(other).lower()} in a copy of its config.json"
        setting += ", and probe that"
        found.append(Reading(name=name, setting=setting, taps=drafter.taps, from_anchor=other))
    present = draft_base(drafter)
    theirs = target_base(engine.target)
    for base in dict.fromkeys(b for b in (theirs, *BASES) if b is not None and present):
        if present is None or math.isclose(base, present):
            continue
        name = f"rope base {base_text(base)}" + (" (target's)" if base == theirs else "")
        setting = f"run with --draft.rope-base {base_text(base)}"
        reading = Reading(name=name, taps=drafter.taps, rope_base=base, setting=setting)
        try:
            drafter.start(1, 1, DraftConfig(rope_base=base))
        except OptionError:
            break  # its rotary embedding cannot be replaced
        found.append(reading)
    return found


def tap_setting(drafter: Drafter, taps: Sequence[int]) -> str:
    """What to write into a copy of config.json so that these hidden states are read."""
    found = tap_ids(drafter, taps)
    if found is None:
        return f"no config key of this kind reads hidden states {list(taps)}"
    key, _ = given_taps(drafter)
    gone = "" if found[0] == key else f" and remove {key}"
    return f"set {found[0]} to {found[1]}{gone} in a copy of its config.json, and probe that"


def tap_ids(drafter: Drafter, taps: Sequence[int]) -> tuple[str, list[int]] | None:
    """The config key, alone of its kind, and the ids by which these hidden states are read.

    Which ids mean which states depends on the key and on the first id, so it is asked of the
    drafter's own reader.
    """
    key, _ = given_taps(drafter)
    for place in (key, *(k for k in TAP_KEYS[drafter.kind] if k != key)):
        for ids in ([t - 1 for t in taps], list(taps)):
            config = _config_with_taps(drafter.config, drafter.kind, place, ids)
            read = type(drafter)(config, {}, names=drafter.weights)  # type: ignore[call-arg]
            if read.taps == tuple(taps):
                return place, ids
    return None


def probe_finding(measured: Sequence[Measured]) -> Finding:
    """Which reading is best, if chance does not explain it; the first one is the present one."""
    present, *others = measured
    count = len(present.hits)
    here = f"as read, {_share_of(present)} of {count} first drafts are accepted"
    if len(present.known) < count:
        here += f" ({len(present.known) / count:.0%} of the target's tokens can be drafted)"
    if count < TOO_FEW:
        text = f"{here}; too few positions to tell readings apart"
        return Finding(name="probe", level="note", text=text)
    better = [m for m in others if m.is_better_than(present, len(others))]
    if better:
        best = min(better, key=lambda m: (m.surprise, -m.acceptance))
        text = (
            f"{best.reading.name} drafts better than chance explains: {_share_of(best)} of {count} "
            f"first drafts accepted at {best.surprise:.3f} nats a token, "
            f"as read {_share_of(present)} at {present.surprise:.3f}; {best.reading.setting}"
        )
        if best.sign_test(present) >= (1 - CONFIDENCE) / len(others):
            text += " (the nats tell them apart, acceptance alone does not yet)"
        return Finding(name="probe", level="warning", text=text)
    if present.acceptance < LOW_ACCEPTANCE:
        text = "no other reading helps: was the drafter made for this target, and for this mode?"
        return Finding(name="probe", level="warning", text=f"{here}, and {text}")
    text = "the present reading is best, or as good as any within the noise"
    return Finding(name="probe", level="ok", text=f"{here}; {text}")


def _compare(
    drafter: Drafter, reading: Reading, tokens: Tensor, features: Tensor, begin: int
) -> list[tuple[bool, float]]:
    """After each token of an answer: is the first draft the next token, and its -log q."""
    count = tokens.shape[1]
    if begin >= count - 1:
        return []
    if reading.from_anchor is not None:
        assert isinstance(drafter, DFlash)
        drafter = copy.copy(drafter)  # weights stay shared
        drafter.from_anchor = reading.from_anchor
        drafter.length = drafter.block - (not reading.from_anchor)
    state = drafter.start(1, count, DraftConfig(rope_base=reading.rope_base))
    drafter.extend(state, tokens, features, tokens.new_zeros(1))
    length = drafter.length
    padded = torch.cat([tokens, tokens.new_zeros(1, length)], dim=1)
    found: list[tuple[bool, float]] = []
    for places in torch.arange(begin, count - 1, device=tokens.device).split(BLOCKS):
        block = padded[0, places[:, None] + torch.arange(length + 1, device=tokens.device)]
        before = features[:, places - 1] if reading.taps else None
        mask = torch.ones(1, len(places), length, dtype=torch.bool, device=tokens.device)
        batch = ReplayBatch.of(block[None], places[None], before, mask)
        logits = drafter.replay(state, batch, length, int(places[-1]))
        logits = drafter.widen(logits[0, :, 0].float())
        following = tokens[0, places + 1]
        nats = -logits.log_softmax(-1).gather(-1, following[:, None])[:, 0]
        found += zip((logits.argmax(-1) == following).tolist(), nats.tolist(), strict=True)
    return found


def _config_with_taps(config: Any, kind: str, place: str, ids: list[int]) -> dict[str, Any]:
    """A copy of a config in which `place` alone names the taps."""
    out = copy.deepcopy(dict(config))
    for key in TAP_KEYS[kind]:
        *outer, last = key.split(".")
        inside = out
        for part in outer:
            inside[part] = dict(inside.get(part) or {})
            inside = inside[part]
        inside.pop(last, None)
        if key == place:
            inside[last] = ids
    return out


def _share_of(measured: Measured) -> str:
    low, high = measured.interval
    return f"{measured.acceptance:.1%} [{low:.1%}, {high:.1%}]"


def _standard_errors(tries: int) -> float:
    """Standard errors that chance passes in one of `tries` with 5 % probability at most."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(1, tries)))
