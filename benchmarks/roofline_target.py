"""The bytes and operations that a pass of the target cannot do without; see `roofline_work`.

Besides the letters there: E experts a layer, of which each token is sent to k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

from roofline_work import Attention, Work, head, total
from torch import nn

from ttspec.models.experts import experts_of
from ttspec.models.recurrent import GATED
from ttspec.models.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a mixture, in all layers that choose among them."""

    layers: int
    count: int
    """E, of each layer."""
    chosen: int
    """k, for each token."""
    size: int
    """Elements of one."""

    def uniform(self, tokens: int) -> float:
        """Experts of a layer that so many tokens are sent to, if each chose at random by itself.

        One token leaves one expert out with probability 1 - k / E: E (1 - (1 - k / E)^tokens).
        """
        return self.count * (1 - (1 - self.chosen / self.count) ** tokens)

    def work(self, tokens: int, read: float, item: int) -> Work:
        """`read` experts of each layer are read, and each token is multiplied by k of them."""
        each = self.layers * self.size
        return Work(item * read * each, 2 * tokens * self.chosen * each)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """The gated delta nets of a hybrid, as `models/recurrent.py` keeps their states."""

    layers: int
    heads: int
    """Hv, of values; each has a state [Dk, Dv]."""
    key_heads: int
    """Hk."""
    size: int
    """Dk."""
    wide: int
    """Dv."""
    channels: int
    """C, that are convolved."""
    window: int
    """K - 1, inputs that the convolution looks back."""

    def work(self, rows: int, tokens: int, kept: float, item: int) -> Work:
        """T new tokens a row, after those of the last pass that stayed, `kept` a row.

        Moved, per row and layer: the states (4 Hv Dk Dv bytes) and the convolution's window (s (K -
        1) C) read and written; and of each token, written by its pass and read by the next if it
        stayed: keys, deltas and decays (4 (Hk Dk + Hv Dv + Hv)) and the convolution's inputs (s C).

        Operations: as `delta_rule.read_block` multiplies, per head 4 T Dk Dv + 2 T^2 (2 Dk + Dv),
        and `advance`, 2 kept Dk Dv. The convolution is counted by its weights.
        """
        states = 4 * self.heads * self.size * self.wide + item * self.window * self.channels
        values = self.heads * (self.wide + 1)
        token = 4 * (self.key_heads * self.size + values) + item * self.channels
        moved = 2 * states + (tokens + kept) * token
        square = 2 * tokens**2 * (2 * self.size + self.wide)
        deep = (4 * tokens + 2 * kept) * self.size * self.wide + square
        return Work(moved, self.heads * deep) * (rows * self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShape:
    """What a pass of the target reads."""

    body: int
    """Elements of everything but embedding, head and experts."""
    hidden: int
    vocabulary: int
    attention: Attention
    taps: int
    """Hidden states that are kept as features."""
    item: int
    """Bytes per element."""
    experts: Experts | None = None
    """Of a mixture."""
    recurrence: Recurrence | None = None
    """Of a hybrid."""


def target_shape(target: Target) -> TargetShape:
    """Read off a loaded model; its weights may be on the meta device.

    Attention is counted as over keys and values of all heads, also where latents are cached, as
    DeepSeek's are.
    """
    config = target.config
    apart = target.embedding.numel()
    if target.head is not target.embedding:
        apart += target.head.numel()
    heads = int(config.num_attention_heads)
    experts = _experts(target)
    if experts:
        apart += experts.layers * experts.count * experts.size
    return TargetShape(
        body=sum(p.numel() for p in target.model.parameters()) - apart,
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        attention=Attention(
            windows=tuple(w for w in target.windows if w != 0),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", 0) or heads),
            head_dim=int(getattr(config, "head_dim", 0) or config.hidden_size // heads),
        ),
        taps=len(target.taps),
        item=target.dtype.itemsize,
        experts=experts,
        recurrence=_recurrence(target.model),
    )


def target_pass(
    shape: TargetShape,
    rows: int,
    tokens: int,
    filled: float,
    *,
    kept: float = 1.0,
    experts: float | None = None,
) -> Work:
    """A plain step (T = 1) or a verification (T = G + 1).

    Moved: s W + head + attention + experts + states + features, s R T x taps x hidden size
    (exactness.md 7: 15.14 GB of weights at Qwen3-8B shapes). Operations: 2 W R T + head + those.

    Args:
        shape: The target's.
        rows: R.
        tokens: T.
        filled: n.
        kept: Of the last pass's tokens so many stayed, a row; states go on by these.
        experts: Experts of a layer that are read; None is as if all tokens chose at random.
    """
    s, positions = shape.item, rows * tokens
    works = [
        Work(s * shape.body, 2 * shape.body * positions),
        head(shape.hidden, shape.vocabulary, positions, s),
        shape.attention.work(rows, tokens, filled, s),
        Work(s * positions * shape.taps * shape.hidden),
    ]
    if shape.experts:
        read = shape.experts.uniform(positions) if experts is None else experts
        works.append(shape.experts.work(positions, read, s))
    if shape.recurrence:
        works.append(shape.recurrence.work(rows, tokens, kept, s))
    return total(works)


@contextmanager
def experts_read(target: Target) -> Iterator[list[tuple[int, int]]]:
    """Within, of each layer of each forward: the tokens that it reads, and their distinct experts.

    Graphs run no Python, so the forwards must be calls.
    """
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        _, chosen, *_ = signature(module.forward).bind(*given, **named).args
        seen.append((len(chosen), chosen.unique().numel()))

    modules = experts_of(target.model)
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _experts(target: Target) -> Experts | None:
    modules: list[Any] = experts_of(target.model)
    if not modules:
        return None
    first = modules[0]
    size = sum(p.numel() for p in first.parameters()) // first.num_experts
    chosen = int(target.config.num_experts_per_tok)
    return Experts(layers=len(modules), count=first.num_experts, chosen=chosen, size=size)


def _recurrence(model: nn.Module) -> Recurrence | None:
    modules: list[Any] = [m for m in model.modules() if type(m).__name__ in GATED]
    if not modules:
        return None
    m = modules[0]
    return Recurrence(
        layers=len(modules),
        heads=m.num_v_heads,
        key_heads=m.num_k_heads,
        size=m.head_k_dim,
        wide=m.head_v_dim,
        channels=m.conv_dim,
        window=m.conv_kernel_size - 1,
    )
