"""What rounds, prompts and updates take in memory while they are computed, from shapes.

Only `memory_forecast.py` asks. What grows with rows and vocabulary or with the model's width is
counted; the rest is small. Everything is in bytes.
"""

from __future__ import annotations

from dataclasses import replace

from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.prefill import CHUNK_TOKENS, MAX_BATCHED_TOKENS
from ttspec.drafters.base import Drafter
from ttspec.learning.distillation import blocks_at_once
from ttspec.losses import LOGITS_AT_ONCE as LOSSES_AT_ONCE
from ttspec.losses import LOGITS_AT_ONCE_ON_A_CPU as LOSSES_AT_ONCE_ON_A_CPU
from ttspec.models.capture import FEW
from ttspec.models.target import Target

FLOAT, LONG = 4, 8


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
    loss = min(LOSSES_AT_ONCE_ON_A_CPU if on_cpu else LOSSES_AT_ONCE, again)
    return batch + again * (3 * size + covered) + 5 * FLOAT * loss
