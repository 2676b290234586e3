"""The arithmetic that drafters share: products with one weight or one per row, norms, rotation.

Pure functions on tensors; no drafter is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ttspec.compiled import is_compiling
from ttspec.rowcache import LayerCache
from ttspec.spans import span_attention

Weights = Mapping[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, new keys, new values, [B, (kv) heads, N, D]) -> attention over context and what is new,
[B, N, heads * D]."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X [B, ..., in] times one weight [out, in], or one per row [B, out, in]."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


DOWN, UP = ".down", ".up"
"""After a matrix's name: the two factors [r, in] and [out, r] of a low-rank change of it."""


def project(weights: Weights, name: str, x: Tensor) -> Tensor:
    """X [B, ..., in] times the matrix `{name}.weight`, with its low-rank change if it has one."""
    y, down = linear(x, weights[name + ".weight"]), weights.get(name + DOWN)
    return y if down is None else low_rank(y, x, down, weights[name + UP])


def low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Y [B, ..., out] plus x [B, ..., in] through [r, in] and [out, r], or through each row's own.

    Never multiplied out: rows that learn for themselves share the matrix, and reading it costs what
    it costs one row.
    """
    if down.dim() == 2:
        return y + F.linear(F.linear(x, down), up)
    if is_compiling():  # as sums: they melt into what is done to y, where products are kernels
        inner = (x.flatten(1, -2)[:, :, None] * down[:, None]).sum(-1)
        return y + (inner[:, :, None] * up[:, None]).sum(-1).view_as(y)
    inner = torch.bmm(x.flatten(1, -2), down.mT)
    return torch.baddbmm(y.flatten(1, -2), inner, up.mT).view_as(y)


def multiplied_out(weights: Weights) -> dict[str, Tensor]:
    """Weights with their low-rank changes in them, by published names only."""
    whole = {n: w for n, w in weights.items() if not n.endswith((DOWN, UP))}
    for name, down in weights.items():
        if name.endswith(DOWN):
            of = name.removesuffix(DOWN)
            weight, up = whole[of + ".weight"], weights[of + UP]
            whole[of + ".weight"] = (weight.float() + up.float() @ down.float()).to(weight)
    return whole


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32; weight [H], or one per row [B, H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dim() == 2:
        weight = weight.view(weight.shape[0], *[1] * (x.dim() - 2), -1)
    return weight * wide.to(x.dtype)


def gated_mlp(weights: Weights, at: str, x: Tensor) -> Tensor:
    """SwiGLU under the published names `{at}gate_proj.weight` and so on."""
    gate = F.silu(project(weights, at + "gate_proj", x))
    return project(weights, at + "down_proj", gate * project(weights, at + "up_proj", x))


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention in which query heads of one key head become query rows: no key is repeated.

    Args:
        query: [B, heads, N, D].
        key: [B, kv heads, S, D].
        value: [B, kv heads, S, D].
        mask: bool, [B, N, S] or [N, S].

    Returns:
        [B, N, heads * D].
    """
    count, group = query.shape[2], query.shape[1] // key.shape[1]
    query = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)  # [B, kv heads, group * N, D]
    mask = mask.repeat(*[1] * (mask.dim() - 2), group, 1)
    if mask.dim() == 3:
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out = out.unflatten(2, (group, count)).flatten(1, 2)  # [B, heads, N, D]
    return out.transpose(1, 2).flatten(2)


@dataclass(slots=True)
class ConcatenatedContext:
    """A layer's context, to which new keys and values are concatenated.

    Nothing is written: gradients pass, and several blocks may lie side by side.
    """

    keys: Tensor
    """[B, kv heads, S, D]; after the call with the new ones."""
    values: Tensor
    mask: Tensor
    """bool [B, N, S + N] or [N, S + N]."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attend`."""
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return grouped_attention(query, self.keys, self.values, self.mask)


@dataclass(frozen=True, slots=True)
class InPlaceContext(LayerCache):
    """A layer's context, into which new keys and values are written where they belong."""

    seen: Tensor
    """int64 [B, 1, N, 2], from `spans.spans`."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attend`; the next that come to these slots replace what is written now."""
        keys, values = self.update(keys, values)
        return span_attention(query, keys, values, self.seen).flatten(2)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding in the half-rotation form. Angles are computed: no table is too short."""

    frequencies: Tensor
    """float32 [R / 2], of the R leading dimensions of a head that rotate."""
    base: float
    factor: float = 1.0
    """Scales rotated keys and queries; only YaRN's is not 1."""

    @classmethod
    def of(cls, config: Mapping[str, Any], head_dim: int, base: float | None = None) -> Rope:
        """What a config.json asks for, old keys or new; `base` overrides its rope_theta.

        Without a rope_theta the base is 10000, as published EAGLE-3 heads were trained
        (drafters.md 6.2). Scaled kinds (llama3, linear, yarn, dynamic) are transformers' own.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = float(base or config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
            size = int(head_dim * part)
            steps = torch.arange(0, size, 2, dtype=torch.float32) / size
            return cls(theta**-steps, theta)
        own = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=head_dim,
                num_attention_heads=1,
                head_dim=head_dim,
                max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
                rope_parameters={**rope, "rope_type": kind, "rope_theta": theta},
            )
        )
        return cls(own.inv_freq.float(), theta, float(own.attention_scaling))

    def to(self, device: torch.device) -> Rope:
        """The same on another device."""
        return Rope(self.frequencies.to(device), self.base, self.factor)

    def __call__(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate x [B, heads, T, D] by position int64 [B, T]."""
        half = self.frequencies.shape[0]
        angle = position[:, None, :, None].float() * self.frequencies  # [B, 1, T, R/2]
        cos, sin = self.factor * angle.cos(), self.factor * angle.sin()
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)
