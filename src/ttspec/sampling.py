"""From logits to tokens: filters, counter-based noise, and the draw. Pure; knows no models.

All noise is a hash of what it is for, so a token's draw depends on its key and nothing else:
not on the batch, the device's generator, or how many draws came before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ttspec.compiled import compiled, compiled_for_any
from ttspec.config import SamplingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTensors:
    """Temperature and filters on the device: of each row [B, 1, 1], or of all alike [].

    A step that no row asks for is None. What a row does not ask for changes none of its bits:
    it writes the same text beside rows that do.
    """

    temperature: Tensor | None = None
    """float32, 1 in a greedy row; None where all rows are greedy."""
    sampled: Tensor | None = None
    """float32, 1 in a row that samples and 0 in a greedy one: its noise is multiplied by it."""
    greedy: Tensor | None = None
    """bool, rows to whose most likely token p is confined; None where no p is asked for."""
    top_k: Tensor | None = None
    """int64; 0 keeps all."""
    most_k: int = 0
    """No row's top_k is larger."""
    top_p: Tensor | None = None
    """float32; infinity keeps all."""
    min_p: Tensor | None = None
    """float32, its logarithm; minus infinity keeps all."""

    @classmethod
    def of(cls, sampling: SamplingConfig, device: torch.device) -> SamplingTensors:
        """What one request asks for, of any number of rows."""
        names = processors_of(sampling)
        values = values_of(sampling)
        given = {n: torch.tensor(values[n], device=device) for n in values if n in names}
        return cls(**given, most_k=sampling.top_k)


def processors_of(sampling: SamplingConfig) -> frozenset[str]:
    """Fields of `SamplingTensors` without which a request would get another text."""
    if sampling.temperature == 0:
        return frozenset()
    filters = {
        "top_k": sampling.top_k > 0,
        "top_p": sampling.top_p < 1,
        "min_p": sampling.min_p > 0,
    }
    return frozenset({"temperature", "sampled", *(name for name, on in filters.items() if on)})


def values_of(sampling: SamplingConfig) -> dict[str, float]:
    """A row's values of `SamplingTensors`: what changes nothing for a step it does not ask for."""
    names = processors_of(sampling)
    return {
        "temperature": float(sampling.temperature) if names else 1.0,
        "sampled": 1.0 if names else 0.0,
        "greedy": not names,
        "top_k": sampling.top_k if names else 0,
        "top_p": float(sampling.top_p) if "top_p" in names else math.inf,
        "min_p": math.log(sampling.min_p) if "min_p" in names else -math.inf,
    }


DRAFT, ACCEPT, RESIDUAL = 1, 2, 3
"""Purposes of noise under the rejection rule; drafter-invariant noise has purpose 0."""


PARTS = 64
"""In which a vocabulary is searched at most, where it is searched by compiled code."""
SEARCHES = 768
"""Of such parts at a time; more are slower than fewer, longer ones."""
_ALL = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014); int64 products wrap."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    """`_mix` of a number."""
    x &= _ALL
    x = (x ^ x >> 30) * _MIX1 & _ALL
    x = (x ^ x >> 27) * _MIX2 & _ALL
    return x ^ x >> 31


def fold(key: Tensor, *parts: Tensor | int) -> Tensor:
    """Mix numbers into keys, one after the other.

    Args:
        key: int64 of any shape.
        parts: Numbers or int64 tensors that broadcast with `key`; their order matters.

    Returns:
        int64 keys of the broadcast shape.
    """
    for part in parts:
        if isinstance(part, int):  # on the host: a copy to a GPU would wait for it
            key = _mix(key + _signed((_GOLDEN + _mix_int(part + _GOLDEN)) & _ALL))
        else:
            key = _mix(key + _GOLDEN + _mix(part + _GOLDEN))
    return key


def uniform(key: Tensor) -> Tensor:
    """One float32 in [0, 1) per key, shape as `key`."""
    return _shift(_mix(key + _GOLDEN), 40).float() * 2.0**-24


def exponential(key: Tensor, which: int | Tensor) -> Tensor:
    """Independent standard exponentials.

    Args:
        key: int64 of any shape.
        which: How many per key; or which of them, int64 [size].

    Returns:
        float32 `[*key.shape, size]`, positive and finite. 40 bits are drawn each, so that the
        small values, which decide an argmin over a large vocabulary, are fine-grained.
    """
    if isinstance(which, int):
        which = torch.arange(which, device=key.device)
    count = which + 1
    if torch.compiler.is_compiling():
        # `^ 0`: or the product becomes an index, for which the number is too large.
        bits = key.unsqueeze(-1) + (count ^ 0) * _GOLDEN
        u = (_shift(_mix(bits), 24).float() + 0.5) * 2.0**-40
        return -torch.log1p(-u.clamp(max=1 - 2.0**-24))
    bits = key.unsqueeze(-1) + count * _GOLDEN
    scratch = torch.empty_like(bits)
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):  # `_mix`, without new memory
        torch.bitwise_right_shift(bits, shift, out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            bits.mul_(factor)
    u = bits.bitwise_right_shift_(24).bitwise_and_((1 << 40) - 1).float()
    return u.add_(0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def gumbel(key: Tensor, which: int | Tensor, sampled: Tensor | None = None) -> Tensor:
    """Independent standard Gumbels, float32 `[*key.shape, size]`; 0 where `sampled` is 0."""
    logs = exponential(key, which).log_()
    return logs.neg_() if sampled is None else logs.mul_(-sampled)


def argmax(scores: Tensor) -> Tensor:
    """The one argmax used everywhere: of scores [..., V], int64 [...]; the first index on ties."""
    if torch.compiler.is_compiling() and scores.shape[-1] % PARTS == 0:
        # Compiled code gives each row to one processor; here it gives few rows to many.
        fitting = SEARCHES // scores.shape[:-1].numel()
        parts = min(PARTS, 1 << max(fitting.bit_length() - 1, 0))
        best, at = scores.unflatten(-1, (parts, -1)).max(-1)
        part = best.argmax(-1, keepdim=True)
        return (part * (scores.shape[-1] // parts) + at.gather(-1, part)).squeeze(-1)
    return scores.argmax(dim=-1)


def process(logits: Tensor, sampling: SamplingConfig | SamplingTensors) -> Tensor:
    """Temperature, top-k, top-p and min-p, in this order.

    Args:
        logits: `[..., V]`, any floating dtype; `[B, T, V]` where rows differ.
        sampling: A greedy row's logits are only made float32.

    Returns:
        float32 `[..., V]`, -inf where a filter removed a token. A softmax gives p.
    """
    x = logits.float()
    s = sampling
    if isinstance(s, SamplingConfig):
        s = SamplingTensors.of(s, logits.device)
    if s.temperature is None:
        return x
    x = x / s.temperature
    if s.top_k is not None:
        best = x.topk(min(s.most_k, x.shape[-1])).values
        last = s.top_k.clamp(min=1, max=best.shape[-1]) - 1
        least = best.gather(-1, last.expand(*best.shape[:-1], 1))
        x = x.masked_fill(x < least.masked_fill(s.top_k == 0, -math.inf), -math.inf)
    if s.top_p is not None:
        ordered, index = x.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., :1].zero_()  # the most likely token always stays
        x = torch.full_like(x, -math.inf).scatter(
            -1, index, ordered.masked_fill(before >= s.top_p, -math.inf)
        )
    if s.min_p is not None:
        x = x.masked_fill(x < x.amax(-1, keepdim=True) + s.min_p, -math.inf)
    return x


def probabilities(processed: Tensor, sampling: SamplingTensors) -> Tensor:
    """P, float32 [B, T, V], of processed logits; a greedy row's most likely token has all of it."""
    p = processed.softmax(-1)
    if sampling.greedy is None:
        return p
    best = torch.zeros_like(p).scatter_(-1, argmax(processed)[..., None], 1.0)
    return torch.where(sampling.greedy, best, p)


def draw(processed: Tensor, noise: Tensor | None) -> Tensor:
    """Gumbel-max draw, or the most likely token without noise.

    Args:
        processed: float32 `[..., V]` from `process`.
        noise: float32 Gumbels of the same shape; None is greedy.

    Returns:
        int64 `[...]`; with fresh noise distributed as softmax(processed).
    """
    return argmax(processed if noise is None else processed + noise)


def position_noise(
    key: Tensor, first: Tensor, count: int, vocabulary: int, sampled: Tensor | None = None
) -> Tensor:
    """Drafter-invariant noise: Gumbels [B, count, V] for the positions first..first + count - 1.

    Args:
        key: int64 [B], of each row's answer.
        first: int64 [B].
        count: Positions.
        vocabulary: The target's.
        sampled: float32 [B, 1, 1], 0 in rows that shall have none; None is in no row.
    """
    column = torch.arange(count, device=first.device)
    return _position_noise(key, first, column, vocabulary, sampled)


@compiled_for_any(column=0)
def _position_noise(
    key: Tensor, first: Tensor, column: Tensor, vocabulary: int, sampled: Tensor | None
) -> Tensor:
    return gumbel(fold(key[:, None], 0, first[:, None] + column), vocabulary, sampled)


class NoiseCache:
    """`position_noise` that keeps what it made last, by the key of a row's answer.

    A row moves on by fewer tokens than it had noise for: drawing the rest anew takes a tenth of a
    round on a CPU.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, Tensor]] = {}
        """By key: the first position, and noise [T, V] from there on."""

    def __call__(
        self, key: Tensor, first: Tensor, count: int, vocabulary: int, sampled: Tensor | None = None
    ) -> Tensor:
        """As `position_noise`; the same bits."""
        rows, kept = list[Tensor](), dict[int, tuple[int, Tensor]]()
        for row, (of, begin) in enumerate(zip(key.tolist(), first.tolist(), strict=True)):
            at, noise = self._kept.get(of, (0, key.new_empty(0)))
            skipped = begin - at
            noise = noise[skipped:] if skipped >= 0 else noise[:0]
            if (more := count - len(noise)) > 0:
                here = slice(row, row + 1)
                new = position_noise(key[here], first[here] + len(noise), more, vocabulary)[0]
                noise = torch.cat([noise, new]) if len(noise) else new
            kept[of] = begin, noise
            rows.append(noise[:count])
        self._kept = kept
        noise = torch.stack(rows)
        return noise if sampled is None else noise * sampled


@compiled
def pick(
    logits: Tensor, noise: Tensor | None, sampling: SamplingConfig | SamplingTensors
) -> Tensor:
    """Tokens int64 [B, T] drawn from logits [B, T, V] with noise of the same shape, or the best."""
    return draw(process(logits, sampling), noise)


@compiled
def distribution(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """P, float32 [B, T, V], of logits."""
    return probabilities(process(logits, sampling), sampling)


@compiled
def draft(
    logits: Tensor,
    sampling: SamplingTensors,
    key: Tensor,
    number: Tensor,
    column: Tensor,
    which: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Drafts under the rejection rule, with noise of their own.

    Args:
        logits: [B, g, V_draft].
        sampling: Of each row.
        key: int64 [B], of each row's answer.
        number: int64 [1], the round's.
        column: int64 [g], places of the drafts in the proposal.
        which: Tokens of the target that the logits are of, int64 [V_draft]; or how many, if all.

    Returns:
        Places int64 [B, g] among the logits, and q float32 [B, g, V_draft].
    """
    processed = process(logits, sampling)
    keys = fold(fold(key[:, None], DRAFT, number), column)
    tokens = draw(processed, gumbel(keys, which, sampling.sampled))
    return tokens, probabilities(processed, sampling)


@compiled
def rejection_noise(
    key: Tensor, number: Tensor, drafts: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Noise of one round's verdict under the rejection rule, which no other round has.

    Args:
        key: int64 [B], of each row's answer.
        number: int64 [1], the round's.
        drafts: G.
        vocabulary: V.

    Returns:
        Uniforms float32 [B, G] in [0, 1), and standard exponentials float32 [B, V].
    """
    column = torch.arange(drafts, device=key.device)
    u = uniform(fold(fold(key[:, None], ACCEPT, number), column))
    return u, exponential(fold(key, RESIDUAL, number), vocabulary)
