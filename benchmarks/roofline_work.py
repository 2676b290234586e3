"""The bytes and operations that each stage of a round cannot do without, counted from shapes.

Every weight that a pass reads is read once, keys and values up to the filled length, and logits are
written and read once. Left out: what lies between two layers, embedding rows, softmax and norms
(counted as weights only), and whatever an implementation moves besides. So the figures are a lower
bound, and time above them is what is left to gain.

In the formulas: R rows, T tokens a row, n filled slots, G drafted tokens, W elements of weights, V
the vocabulary, s bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.causal import Causal
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.pard import Pard
from ttspec.errors import OptionError
from ttspec.learning.distillation import blocks_at_once
from ttspec.learning.live_weights import momentum
from ttspec.learning.replay_buffer import trained_length


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage moves and computes."""

    moved: float = 0.0
    """Bytes read from and written to the device's memory."""
    operations: float = 0.0
    """Multiplications and additions, each counted."""

    def __add__(self, other: Work) -> Work:
        return Work(self.moved + other.moved, self.operations + other.operations)

    def __mul__(self, times: float) -> Work:
        return Work(self.moved * times, self.operations * times)


def total(works: Iterable[Work]) -> Work:
    """All of them."""
    return sum(works, Work())


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of some layers."""

    windows: tuple[int | None, ...]
    """Of each layer; None sees everything."""
    heads: int
    kv_heads: int
    head_dim: int

    def work(self, rows: int, tokens: int, filled: float, item: int, blocks: float = 1.0) -> Work:
        """T new tokens a row behind n filled slots, or A blocks of T that do not see each other.

        Moved: per layer 2 R (min(n, window) + 2 A T) x kv heads x head size x s, for old keys and
        values are read, new ones written and read. Operations: per layer 4 R A T (min(n, window) +
        T) x heads x head size.
        """
        wide = 2 * rows * self.kv_heads * self.head_dim * item
        deep = 4 * rows * blocks * tokens * self.heads * self.head_dim
        reached = [filled if w is None else min(filled, w) for w in self.windows]
        return total(Work(wide * (n + 2 * blocks * tokens), deep * (n + tokens)) for n in reached)


def head(hidden: int, vocabulary: int, positions: int, item: int) -> Work:
    """Logits of so many positions.

    Moved: s V (hidden size + 2 positions), for logits are written and read. Operations: 2 x hidden
    size x V x positions.
    """
    moved = item * vocabulary * (hidden + 2 * positions)
    return Work(moved, 2 * hidden * vocabulary * positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Which weights a drafter reads when, by name; rows of its passes are per row of the batch."""

    once: list[str]
    """Read once a draft, for one token."""
    body: list[str]
    """Read by every pass; the head is too."""
    context: list[str]
    """Read to make a verified token context."""
    passes: list[tuple[int, int]]
    """Tokens read and tokens predicted by each pass of a draft."""
    block: int
    """Tokens that are fed to draft one block again."""
    hidden: int
    vocabulary: int
    """Tokens that can be drafted."""
    attention: Attention


def parts_of(drafter: Drafter, length: int, window: int | None = None) -> Parts:
    """The parts of a drafter that drafts `length` tokens and sees `window` context tokens.

    Raises:
        OptionError: It is of a kind that is not counted.
    """
    counted = next((own for kind, own in COUNTED.items() if isinstance(drafter, kind)), None)
    if counted is None:
        raise OptionError(
            f"Drafter {drafter.name} is of kind {drafter.kind}, whose bytes are not counted; "
            "counted are dflash, eagle3, mtp, pard and causal.\nUse one of them, or --drafter none."
        )
    parts = counted(drafter, length)
    windows = (
        min((w for w in (own, window) if w), default=None) for own in parts.attention.windows
    )
    return replace(parts, attention=replace(parts.attention, windows=tuple(windows)))


def dflash_parts(drafter: DFlash, length: int) -> Parts:
    """One pass over the pending token and G masks, of which the masks are predicted.

    Context: `fc`, then keys and values of every layer (drafters.md 2a).
    """
    layers = _starting(drafter, "layers.")
    return Parts(
        once=[],
        body=[*layers, "norm.weight"],
        context=["fc.weight", "hidden_norm.weight", *_keys_values(layers)],
        passes=[(length + 1, length)],
        block=length + 1,
        hidden=drafter.hidden,
        vocabulary=drafter.draft_vocabulary,
        attention=_attention(drafter, drafter.windows, drafter.heads),
    )


def eagle3_parts(drafter: Eagle3, length: int) -> Parts:
    """G passes of one token each, over the layers and the head of the reduced vocabulary.

    `fc` is read once a draft, and again for the context, with keys and values (drafters.md 1a), or
    with all of several layers.
    """
    layers = _starting(drafter, "midlayer.", "layers.")
    fuse = _starting(drafter, "fc.", "fc_norm.", "input_norm.")
    return Parts(
        once=fuse,
        body=[*layers, "norm.weight"],
        context=[*fuse, *(layers if drafter.layers > 1 else _keys_values(layers))],
        passes=[(1, 1)] * length,
        block=length,
        hidden=drafter.hidden,
        vocabulary=drafter.draft_vocabulary,
        attention=_attention(drafter, drafter.windows, drafter.heads),
    )


def mtp_parts(drafter: Mtp, length: int) -> Parts:
    """G passes of one token each, over the whole head; context is made by a pass too.

    Of experts all are counted, not those alone that a token is sent to.
    """
    body = list(drafter.weights)
    return Parts(
        once=[],
        body=body,
        context=body,
        passes=[(1, 1)] * length,
        block=length,
        hidden=drafter.hidden,
        vocabulary=drafter.vocabulary,
        attention=_attention(drafter, drafter.windows, drafter.model_config.num_attention_heads),
    )


def causal_parts(drafter: Causal, length: int) -> Parts:
    """PARD: one pass over the G + 1 last tokens and G - 1 masks (drafters.md 3).

    A plain draft model: a pass over the G + 1 last tokens, then G - 1 of one token. Nothing is read
    for the context: the last tokens are fed again.
    """
    text = drafter.model_config.get_text_config()
    masked = isinstance(drafter, Pard)
    return Parts(
        once=[],
        body=drafter.learnable("full"),  # all but the tables
        context=[],
        passes=[(2 * length, length)] if masked else [(length + 1, 1), *[(1, 1)] * (length - 1)],
        block=length,
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        attention=_attention(drafter, drafter.windows, int(text.num_attention_heads)),
    )


COUNTED: dict[type[Drafter], Callable[..., Parts]] = {
    DFlash: dflash_parts,
    Eagle3: eagle3_parts,
    Mtp: mtp_parts,
    Causal: causal_parts,
}


def _attention(drafter: Any, windows: Sequence[int | None], heads: int) -> Attention:
    kv_heads, size = drafter.kv_heads, drafter.head_dim
    return Attention(windows=tuple(windows), heads=heads, kv_heads=kv_heads, head_dim=size)


def _starting(drafter: Drafter, *prefixes: str) -> list[str]:
    return [name for name in drafter.weights if name.startswith(prefixes)]


def _keys_values(names: Iterable[str]) -> list[str]:
    return [n for n in names if any(part in n for part in ("k_proj.", "v_proj.", "k_norm."))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows that a drafter works on."""

    rows: int
    filled: float
    item: int
    """Bytes per element."""
    learned: frozenset[str] = frozenset()
    """Weights of which every row has its own copy, since it learns."""


def read(drafter: Drafter, names: Iterable[str], tokens: float, batch: Batch) -> Work:
    """Weights applied to `tokens` tokens a row.

    Moved: s W, times R for what each row has its own copy of. Operations: 2 W R x tokens.
    """
    names = list(names)
    every = elements(drafter, names)
    own = elements(drafter, [n for n in names if n in batch.learned])
    moved = batch.item * (every + (batch.rows - 1) * own)
    return Work(moved, 2 * every * batch.rows * tokens)


def elements(drafter: Drafter, names: Iterable[str]) -> int:
    """Elements of some weights."""
    return sum(drafter.weights[name].numel() for name in names)


def draft(drafter: Drafter, parts: Parts, batch: Batch) -> Work:
    """A draft: what is read once, and for each pass body, head and attention.

    At Qwen3-8B shapes 21 % of a verification for DFlash-b16 (22 with `absorb`), 24 % for an EAGLE-3
    chain of 5 (25), as in exactness.md 7.
    """
    work = read(drafter, parts.once, 1, batch)
    for tokens, predicted in parts.passes:
        positions = batch.rows * predicted
        work += read(drafter, parts.body, tokens, batch)
        work += head(parts.hidden, parts.vocabulary, positions, batch.item)
        work += parts.attention.work(batch.rows, tokens, batch.filled, batch.item)
    return work


def absorb(drafter: Drafter, parts: Parts, features: int, length: int, batch: Batch) -> Work:
    """Make the G + 1 verified tokens context, those rejected among them.

    Moved: the weights of the context, s R (G + 1) x features read, and keys and values written.
    """
    a, positions = parts.attention, batch.rows * (length + 1)
    made = 2 * len(a.windows) * a.kv_heads * a.head_dim if parts.context else 0
    work = read(drafter, parts.context, length + 1, batch)
    return work + Work(batch.item * positions * (features + made))


def keep_round(vocabulary: int, length: int, batch: Batch) -> Work:
    """Copy the round's target logits to the replay buffer: 2 s R (G + 1) V."""
    return Work(2 * batch.item * batch.rows * (length + 1) * vocabulary)


def update(
    drafter: Drafter, parts: Parts, vocabulary: int, length: int, learn: LearnConfig, batch: Batch
) -> Work:
    """One update: `replay` of all blocks in as few calls as the learner makes, then `step`.

    Besides, 2 s W more for each further call that adds to the gradients, and 5 s R x blocks x G x V
    of logits: the target's read, the draft's and their gradients written and read.
    """
    length = trained_length(drafter, length)
    at_once = blocks_at_once(batch.rows, length, vocabulary)
    calls = -(-learn.blocks // at_once)
    learned = batch.rows * elements(drafter, drafter.learnable(learn.parameters))
    logits = batch.rows * learn.blocks * length * (vocabulary + 4 * parts.vocabulary)
    return total(
        (
            replay(drafter, parts, length, learn.blocks / calls, learn, batch) * calls,
            Work(batch.item * (2 * (calls - 1) * learned + logits)),
            step(learned, batch.item, moments=2 if momentum(learn) else 1),
        )
    )


def replay(
    drafter: Drafter, parts: Parts, length: int, blocks: float, learn: LearnConfig, batch: Batch
) -> Work:
    """Forward and backward over A blocks a row that are drafted again.

    Moved: body and head twice, once each way, keys and values too; s W of gradients. A chain does
    so in each of its G steps, and reads and writes the gradients (2 s W) in each but the first.

    Operations: 2 W a token forward, 2 W backward for the inputs, 2 W for the weights that learn;
    attention threefold.
    """
    rows, s = batch.rows, batch.item
    chain = isinstance(drafter, Eagle3 | Mtp) and not drafter.at_once
    steps, block = (length, 1) if chain else (1, parts.block)

    def attention(tokens: int) -> Work:
        return parts.attention.work(rows, tokens, batch.filled, s, blocks)

    learned = drafter.learnable(learn.parameters)
    body = rows * elements(drafter, [n for n in learned if n in parts.body])
    rest = rows * elements(drafter, [n for n in learned if n not in parts.body])
    once, across = attention(block), 2 * parts.hidden * parts.vocabulary
    works = [
        read(drafter, parts.once, blocks, batch),
        read(drafter, parts.body, blocks * block, batch) * (2 * steps),
        Work(2 * once.moved, 3 * once.operations) * steps,
        Work(s * across, 2 * across * rows * blocks * length),  # the head, both ways
        Work(s * (body * (2 * steps - 1) + rest), 2 * blocks * (body * block * steps + rest)),
    ]
    return total(works)


def step(learned: int, item: int, moments: int) -> Work:
    """Clip and Adam.

    Moved, per learned element of every row: its gradient read twice (2 s), float32 master and
    moments read and written (8 each), the live copy written (s). Without momentum the first moment
    is the gradient. With the 3 s of `replay` that is 36 bytes in bfloat16, without momentum 28, and
    37 and 30 GB with the head at Qwen3-8B / DFlash-b16 shapes (exactness.md 7: 37 to 40).
    Operations are left out: about 20 an element.
    """
    return Work(learned * (2 * item + 8 + 8 * moments + item))
