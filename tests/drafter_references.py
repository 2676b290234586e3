"""Drafters written down plainly, from transformers' own parts: what ours must equal.

One row, whole sequences, no caches. What a config means is told by `Truth`, not read from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What a config must be read as; the defaults are those of the toy drafters."""

    rope: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4}
    )
    interleaved: bool = False
    part: float = 1.0
    act: str = "silu"
    eps: float = 1e-5
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    normed_residual: bool = False
    normed_output: bool = False
    windows: tuple[int | None, ...] = (None, None)
    causal: tuple[bool, ...] = (False, False)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    module = LlamaRMSNorm(len(weight), eps)
    module.weight = nn.Parameter(weight)
    return module(x)


def matrix(x: Tensor, weights: Weights, name: str) -> Tensor:
    return nn.functional.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def mlp(x: Tensor, weights: Weights, at: str, truth: Truth) -> Tensor:
    size, hidden = weights[at + "gate_proj.weight"].shape
    biased = at + "gate_proj.bias" in weights
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=size, hidden_act=truth.act, mlp_bias=biased
    )
    module = LlamaMLP(config)
    module.load_state_dict({n.removeprefix(at): w for n, w in weights.items() if n.startswith(at)})
    return module(x)


def rotate(x: Tensor, position: Tensor, truth: Truth) -> Tensor:
    """X [heads, T, 16] at position int64 [T]."""
    size = int(x.shape[-1] * truth.part)
    x, rest = x[..., :size], x[..., size:]
    config = LlamaConfig(
        hidden_size=size,
        num_attention_heads=1,
        head_dim=size,
        max_position_embeddings=512,
        rope_parameters=dict(truth.rope),
    )
    cos, sin = LlamaRotaryEmbedding(config)(x, position[None])
    if truth.interleaved:  # complex numbers
        turn = torch.complex(cos[0, :, : size // 2], sin[0, :, : size // 2])
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        x = torch.view_as_real(pairs * turn).flatten(-2)
    else:
        x = apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0]
    return torch.cat([x, rest], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[N, heads * D] of q [heads, N, D] over k, v [kv heads, S, D]; seen bool [N, S]."""
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (share @ v).transpose(0, 1).flatten(1)


def heads(x: Tensor, weights: Weights, name: str, truth: Truth) -> Tensor:
    """[heads, T, 16] of x [T, ...]."""
    y = matrix(x, weights, name + "_proj").unflatten(-1, (-1, 16))
    own = weights.get(name + "_norm.weight")
    return (y if own is None else norm(y, own, truth.eps)).transpose(0, 1)


def logits(x: Tensor, head: Tensor, truth: Truth) -> Tensor:
    out = x @ head.T * truth.logit_scale
    return out if truth.softcap is None else truth.softcap * torch.tanh(out / truth.softcap)


def dflash(
    weights: Weights, tables: Tensor, features: Tensor, block: Tensor, truth: Truth
) -> Tensor:
    """Logits [G, V] of a block [1 + G] of ids after features [n, W]; tables are [2, V, H]."""
    n, width = len(features), len(block)
    context = norm(matrix(features, weights, "fc"), weights["hidden_norm.weight"], truth.eps)
    x = tables[0][block] * truth.embedding_scale
    position = torch.arange(n + width)
    for i, (window, causal) in enumerate(zip(truth.windows, truth.causal, strict=True)):
        at = f"layers.{i}."
        own = {k.removeprefix(at): w for k, w in weights.items() if k.startswith(at)}
        y = norm(x, own["input_layernorm.weight"], truth.eps)
        both = torch.cat([context, y])
        q = rotate(heads(y, own, "self_attn.q", truth), position[n:], truth)
        k = rotate(heads(both, own, "self_attn.k", truth), position, truth)
        v = heads(both, own, "self_attn.v", truth)
        seen = torch.ones(width, n + width, dtype=torch.bool)
        if causal:
            seen &= position <= position[n:, None]
        if window:  # of the context; a block is always seen
            seen &= (position[n:, None] - position < window) | (position >= n)
        x = x + matrix(attention(q, k, v, seen), own, "self_attn.o_proj")
        y = norm(x, own["post_attention_layernorm.weight"], truth.eps)
        x = x + mlp(y, own, "mlp.", truth)
    x = norm(x, weights["norm.weight"], truth.eps)[1:]
    return logits(x, weights.get("lm_head.weight", tables[1]), truth)


def eagle3(
    weights: Weights, tables: Tensor, features: Tensor, tokens: Tensor, steps: int, truth: Truth
) -> Tensor:
    """Logits [G, V_draft] of a chain; features [n, W] and tokens [n + G] with what is drafted."""
    n = len(features)
    if "input_norm.weight" in weights:
        features = norm(features, weights["input_norm.weight"], truth.eps)
    count = sum(name.startswith("fc_norm.") for name in weights)
    if count:
        parts = enumerate(features.chunk(count, dim=-1))
        parts = [norm(x, weights[f"fc_norm.{i}.weight"], truth.eps) for i, x in parts]
        features = torch.cat(parts, dim=-1)
    states = matrix(features, weights, "fc")
    layers = ["midlayer.", *(f"layers.{i}." for i in range(1, len(truth.windows)))]
    layers = [at for at in layers if f"{at}mlp.up_proj.weight" in weights]
    head = weights.get("lm_head.weight", tables[1])
    found = []
    for _ in range(steps):  # row i reads token i + 1; all but the last are context
        y = h = states
        embedded = tables[0][tokens[1 : len(h) + 1]] * truth.embedding_scale
        position = torch.arange(len(h))
        for at, window in zip(layers, truth.windows, strict=False):
            own = {k.removeprefix(at): w for k, w in weights.items() if k.startswith(at)}
            x = norm(y if y is not h else embedded, own["input_layernorm.weight"], truth.eps)
            if y is h:
                normed = norm(h, own["hidden_norm.weight"], truth.eps)
                x, y = torch.cat([x, normed], dim=-1), normed if truth.normed_residual else y
            q = rotate(heads(x, own, "self_attn.q", truth), position, truth)
            k = rotate(heads(x, own, "self_attn.k", truth), position, truth)
            v = heads(x, own, "self_attn.v", truth)
            seen = position <= position[:, None]
            if window:  # of the context; a chain sees all of itself
                seen &= (position[:, None] - position < window) | (position >= n - 1)
            y = y + matrix(attention(q, k, v, seen), own, "self_attn.o_proj")
            z = norm(y, own["post_attention_layernorm.weight"], truth.eps)
            y = y + mlp(z, own, "mlp.", truth)
        last = norm(y, weights["norm.weight"], truth.eps)[-1:]
        found.append(logits(last, head, truth))
        states = torch.cat([states, last if truth.normed_output else y[-1:]])
    assert len(states) == n + steps
    return torch.cat(found)


def model(config: Mapping[str, Any], weights: Weights, ids: Tensor) -> Tensor:
    """Logits [T, V] of a draft model of transformers, as its own code reads its own config."""
    own = {k: v for k, v in config.items() if k != "ttspec"}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**own))
    made.load_state_dict(dict(weights), strict=False)
    return made.eval()(ids[None]).logits[0]
