"""What target, drafter, caches and learning take in memory, estimated before any of it is taken.

Weights come from the files' headers, the rest from shapes. The loader, the engine, `bench` and the
server ask it how much fits. What cannot be estimated is None, and nothing is refused for it.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.captured_prompts import CHUNK_TOKENS
from ttspec.decoding.prefill import MAX_BATCHED_TOKENS
from ttspec.decoding.stages import round_widths
from ttspec.drafters.base import Drafter
from ttspec.errors import ResourceError
from ttspec.free_memory import free_memory, mib
from ttspec.learning.distillation import blocks_at_once
from ttspec.learning.live_weights import (
    bytes_of_copy,
    bytes_of_memory,
    learned_numbers,
    resolve_learn_config,
)
from ttspec.losses import LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_A_CPU
from ttspec.models.capture import FEW
from ttspec.models.target import Target
from ttspec.models.unsupported import ORDINARY, RECURRENT

ODD_CACHES = ("num_kv_shared_layers", "global_head_dim", "num_global_key_value_heads")
"""Config entries with which layers' keys differ in ways that are not counted here."""
FLOAT, LONG = 4, 8
"""Bytes of a number."""
USABLE_SHARE = 0.9
"""Share of what is free that rows may be chosen for: not all that is taken is estimated."""
FEWER_ROWS = "Use a smaller --context, fewer rows, --no-learn or --learn.weights lora."
SMALLER_WEIGHTS = (
    "Use another --dtype, a quantised or smaller target, --device-map auto or more memory."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes, at full length; None is not known."""

    target: int | None = None
    drafter: int | None = None
    target_cache: int | None = None
    drafter_cache: int | None = None
    learning: int | None = None
    replay_buffer: int | None = None
    working: int | None = None

    @property
    def total(self) -> int:
        """Of all that is known."""
        return sum(size for _, size in self._parts())

    @property
    def at_once(self) -> int:
        """Of what is taken before a cache is full."""
        return (self.learning or 0) + (self.replay_buffer or 0) + (self.working or 0)

    def __str__(self) -> str:
        """The parts that take anything, and their sum."""
        parts = [f"{name} {mib(size)}" for name, size in self._parts() if size]
        return f"{mib(self.total)} ({', '.join(parts)})" if len(parts) > 1 else " ".join(parts)

    def _parts(self) -> list[tuple[str, int]]:
        named = {
            "target": self.target,
            "drafter": self.drafter,
            "target's cache": self.target_cache,
            "drafter's cache": self.drafter_cache,
            "learning": self.learning,
            "lessons": self.replay_buffer,
            "work": self.working,
        }
        return [(name, size) for name, size in named.items() if size is not None]


def forecast_run(
    target: Target,
    drafter: Drafter | None,
    config: GenerateConfig,
    rows: int,
    slots: int,
    prompt: int | None = None,
) -> Forecast:
    """What a decoder will take besides the weights, every cache full, every row learning.

    `prompt` are the tokens of the longest one; None is as many as a row has slots.
    """
    learn = config.learn
    drafts, _, width = round_widths(drafter, config.draft, batch_invariant=config.deterministic)
    if not drafts:
        drafter = None
    if drafter is None or not drafter.weights:
        learn = None
    if drafter and learn:
        learn = resolve_learn_config(learn, drafter, rows)
    cache = target_cache_bytes(target.config, rows, slots, target.dtype, width=width)
    if own := getattr(target, "cache_bytes", None):  # it keeps something else
        cache = own(rows, slots)
    return Forecast(
        target_cache=cache,
        drafter_cache=drafter_cache_bytes(drafter, rows, slots, config.draft) if drafter else 0,
        learning=learning_bytes(drafter, learn, rows) if drafter and learn else 0,
        replay_buffer=replay_buffer_bytes(target, learn, rows, drafts),
        working=peak_bytes(
            target,
            drafter,
            config,
            learn,
            rows=rows,
            prompt=prompt or slots,
            drafts=drafts,
            width=width,
        ),
    )


def fitting_rows(need: Callable[[int], Forecast], target: Target, most: int) -> int:
    """How many rows fit, caches full: 1 to `most`; `most` where nothing is known.

    `need` says what so many rows take.
    """
    free = free_memory(target.device)
    if free is None or target.is_split:
        return most
    rows = range(1, most + 1)
    return max(1, bisect_left(rows, True, key=lambda n: need(n).total > USABLE_SHARE * free))


def target_cache_bytes(
    config: Any, rows: int, slots: int, dtype: torch.dtype, *, width: int = 1
) -> int | None:
    """Bytes of a `RowCache` for a target, every layer allocated; None if they are not known.

    Args:
        config: The target's transformers config.
        rows: Conversations side by side.
        slots: Tokens of each; a cache has one more for what falls outside.
        dtype: Of keys and values.
        width: Tokens of a verification, which recurrent layers keep beside their states.
    """
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ODD_CACHES):
        return None
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key, value = getattr(text, "qk_head_dim", size), getattr(text, "v_head_dim", size)
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(kind in ORDINARY for kind in types)
    states = sum(kind == RECURRENT for kind in types) * rows
    if states:
        states *= state_bytes(text, width, dtype)
    return layers * rows * heads * (slots + 1) * (key + value) * dtype.itemsize + states


def state_bytes(text: Any, width: int, dtype: torch.dtype) -> int:
    """Bytes of one row's state in one gated delta net, with what a verification leaves to it."""
    key_heads, heads = text.linear_num_key_heads, text.linear_num_value_heads
    size, wide = text.linear_key_head_dim, text.linear_value_head_dim
    channels = 2 * key_heads * size + heads * wide
    inputs = channels * (text.linear_conv_kernel_dim - 1 + width) * dtype.itemsize
    kept = width * (key_heads * size + heads * wide + heads)
    return 8 + inputs + 4 * (heads * size * wide + kept)


def drafter_cache_bytes(drafter: Drafter, rows: int, slots: int, options: DraftConfig) -> int:
    """Bytes of what a bound drafter keeps of the text: its state is made without memory."""
    on_meta = copy.copy(drafter)
    if drafter.weights:  # n-grams have none, keep ids only, and know no embedding
        on_meta.embedding = drafter.embedding.to("meta")
    return on_meta.start(rows, slots, options).nbytes


def drafter_weight_bytes(drafter: Drafter | None, dtype: torch.dtype) -> int:
    """Bytes of a drafter's weights once they are in the target's dtype."""
    weights = drafter.weights.values() if drafter else ()
    return sum(w.numel() * (dtype.itemsize if w.is_floating_point() else 8) for w in weights)


def learning_bytes(drafter: Drafter, config: LearnConfig, rows: int) -> int:
    """Bytes of all copies of what learns: `learning_row_bytes` for each row, or once for all."""
    if not drafter.weights:
        return 0
    config = resolve_learn_config(config, drafter, rows)
    copies = 1 if config.scope == "shared" else rows
    return copies * learning_row_bytes(drafter, config) + bytes_of_memory(config, drafter)


def learning_row_bytes(drafter: Drafter, config: LearnConfig) -> int:
    """Bytes a copy: float32 master, gradient and two moments, the live copy and its gradient."""
    if not drafter.weights:
        return 0
    gradient = learned_numbers(config, drafter) * drafter.embedding.element_size()
    return bytes_of_copy(config, drafter) + gradient


def require_weights(
    target: int, drafter: int, devices: list[torch.device], *, name: str, split: bool = False
) -> str | None:
    """Refuse weights that do not fit, before they are read.

    Args:
        target: Bytes of the target's weights.
        drafter: Bytes of the drafter's.
        devices: Where they go.
        name: The target's.
        split: The target is spread over the devices, and who gets what is not known: nothing is
            refused then.

    Returns:
        A notice, if one is due all the same.

    Raises:
        ResourceError: There is less memory than they take.
    """
    free = [free_memory(device) for device in devices]
    need = Forecast(target=target, drafter=drafter)
    if None in free or need.total <= sum(filter(None, free)):
        return None
    there = mib(sum(filter(None, free)))
    text = f"The weights of {name} take {need}; {_named(devices)}: {there} free."
    if split:
        return text
    raise ResourceError(f"{text}\n{SMALLER_WEIGHTS}")


def require_room(
    need: Forecast, device: torch.device, *, rows: int, slots: int, split: bool = False
) -> str | None:
    """Refuse caches and learning that do not fit, before they are made.

    On a CPU a cache takes memory only as it is filled, and most are never full: there only what
    learning and a round take at once is refused. Returns and raises as `require_weights`.
    """
    free = free_memory(device)
    if free is None or need.total <= free:
        return None
    lines = f"{rows} row{'s' if rows > 1 else ''} of {slots:,} tokens take {need}"
    text = f"{lines}; {device.type}: {mib(free)} free."
    if split or (device.type == "cpu" and need.at_once <= free):
        return f"{text} It will do unless they are filled. {FEWER_ROWS}"
    raise ResourceError(f"{text}\n{FEWER_ROWS}")


def _named(devices: list[torch.device]) -> str:
    return devices[0].type if len(devices) == 1 else f"{len(devices)} {devices[0].type} devices"


# What comes and goes while rounds, prompts and updates are computed. What grows with rows and
# vocabulary or with the model's width is counted; the rest is small.


def peak_bytes(
    target: Target,
    drafter: Drafter | None,
    config: GenerateConfig,
    learn: LearnConfig | None,
    *,
    rows: int,
    prompt: int,
    drafts: int,
    width: int,
) -> int:
    """Bytes at the height of a prompt's chunk, a round or an update.

    `prompt` are the tokens of the longest one, `drafts` and `width` those of a round.
    """
    chunk = forward_bytes(target, min(rows * min(CHUNK_TOKENS, prompt), MAX_BATCHED_TOKENS))
    verification = forward_bytes(target, rows * width)
    verification += sampling_bytes(target, config, rows * width)
    update = update_bytes(target, drafter, learn, rows, drafts) if drafter and learn else 0
    if target.device.type != "cuda":
        return max(chunk, verification, update)
    # Graphs keep what they need, those of some shapes what they return; a prompt's is elsewhere.
    others = FEW - 1 if config.draft.adaptive else 0
    kept = others * graph_output_bytes(target, config, rows * width)
    return chunk + verification + update + kept


def forward_bytes(target: Target, tokens: int) -> int:
    """Of a forward pass: states between layers, of which all are kept where some are features."""
    text = target.config
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    states = (layers + 1 + len(target.taps)) * hidden if target.taps else 2 * hidden
    inner = int(getattr(text, "intermediate_size", 0) or 0)
    experts = int(getattr(text, "num_experts_per_tok", 0) or 0)
    inner = max(inner, experts * int(getattr(text, "moe_intermediate_size", 0) or 0))
    return tokens * target.dtype.itemsize * (states + 2 * hidden + 2 * inner)


def sampling_bytes(target: Target, config: GenerateConfig, positions: int) -> int:
    """Of logits and of what makes tokens of them."""
    each = target.dtype.itemsize + (FLOAT if target.dtype.itemsize < FLOAT else 0)
    sampling = replace(config, seed=0).sampling(target.defaults)
    if sampling.temperature > 0:
        each = 2 * LONG + FLOAT  # noise while it is made
        if sampling.top_p < 1:
            # Noise, logits, scaled; sorted, where from, and two sums over them.
            each = target.dtype.itemsize + 3 * FLOAT + LONG + 3 * FLOAT
    return positions * int(target.config.vocab_size) * each


def graph_output_bytes(target: Target, config: GenerateConfig, positions: int) -> int:
    """Of what the graphs of one shape of round return: logits, features, and noise if there is."""
    size, sampling = target.dtype.itemsize, replace(config, seed=0).sampling(target.defaults)
    noise = FLOAT if sampling.temperature > 0 and sampling.acceptance == "invariant" else 0
    features = len(target.taps) * int(target.config.hidden_size) * size
    return positions * (int(target.config.vocab_size) * (size + noise) + features)


def replay_buffer_bytes(target: Target, learn: LearnConfig | None, rows: int, drafts: int) -> int:
    """Of the target's logits that `ReplayBuffer` keeps, which stay."""
    if learn is None or not drafts:
        return 0
    kept = learn.blocks * drafts
    if learn.supervision == "hindsight":
        kept = (learn.blocks + 2) * (drafts + 1) + 1
    return rows * kept * int(target.config.vocab_size) * target.dtype.itemsize


def update_bytes(
    target: Target, drafter: Drafter, learn: LearnConfig, rows: int, drafts: int
) -> int:
    """Of a batch's logits, those of the blocks that are drafted again, and their gradients."""
    vocabulary, size = int(target.config.vocab_size), target.dtype.itemsize
    of_block = rows * drafts * vocabulary
    batch = of_block * learn.blocks * size
    at_once = min(learn.blocks, blocks_at_once(rows, drafts, vocabulary))
    drafted = len(drafter.draft_ids) if drafter.draft_ids is not None else vocabulary
    again = rows * drafts * drafted * at_once
    covered = size if drafter.draft_ids is not None else 0
    on_cpu = target.device.type == "cpu"
    loss = min(LOGITS_AT_ONCE_ON_A_CPU if on_cpu else LOGITS_AT_ONCE, again)
    return batch + again * (3 * size + covered) + 5 * FLOAT * loss
