"""Rotary positions of a drafter: what its config.json says of them, and the rotation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ttspec.compiled import compiled_once

DEFAULT_BASE = 10000.0
PLAIN = ("default", "mrope")
"""Kinds without scaling. The three axes of a multimodal one are one and the same over text."""


def rope_parameters(config: Mapping[str, Any], kinds: Collection[str] = ()) -> dict[str, Any]:
    """What a config.json says of rotary positions, old keys or new, in the newer form.

    As transformers reads it: `rope_theta` and `partial_rotary_factor` in the table win over those
    beside it, which an export may leave behind at a default.

    Args:
        config: With `rope_parameters` or `rope_scaling`, or neither.
        kinds: Kinds of layers that are meant, where each kind has a table of its own. None is
            full attention, if there is any.

    Returns:
        `rope_type`, and what else is given.

    Raises:
        ValueError: Two tables contradict each other, or kinds of layers rotate differently.
    """
    older, newer = (dict(config.get(k) or {}) for k in ("rope_scaling", "rope_parameters"))
    for table in (older, newer):
        if old := table.pop("type", None):
            table.setdefault("rope_type", old)
    if odd := [k for k in older if k in newer and older[k] != newer[k]]:
        raise ValueError(f"rope_scaling and rope_parameters give different {', '.join(odd)}")
    table = older | newer
    by_kind = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    if by_kind:
        first = "full_attention" if "full_attention" in by_kind else next(iter(by_kind))
        tables = [by_kind[k] for k in sorted(set(kinds) or {first})]
        if any(t != tables[0] for t in tables):
            raise ValueError(
                f"rope_parameters of {' and '.join(sorted(set(kinds)))} layers differ, and a "
                "drafter's layers share one"
            )
        table = dict(tables[0])
    for key in ("rope_theta", "partial_rotary_factor"):
        if table.get(key) is None and config.get(key) is not None:
            table[key] = config[key]
    table["rope_type"] = table.get("rope_type") or table.pop("type", None) or "default"
    return {k: v for k, v in table.items() if v is not None}


def is_interleaved(*places: Mapping[str, Any]) -> bool:
    """Whether neighbouring dimensions of a head are rotated, instead of its two halves.

    Raises:
        ValueError: Parts of a config contradict each other.
    """
    interleaved = {not p["is_neox_style"] for p in places if p.get("is_neox_style") is not None}
    for key in ("rope_interleave", "rope_interleaved"):
        interleaved |= {bool(p[key]) for p in places if p.get(key) is not None}
    if len(interleaved) > 1:
        raise ValueError("is_neox_style and rope_interleave contradict each other")
    return True in interleaved


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. Angles are computed: no table is too short."""

    frequencies: Tensor
    """float32 [R / 2], of the R leading dimensions of a head that rotate."""
    base: float
    factor: float = 1.0
    """Scales rotated keys and queries; only YaRN's is not 1."""
    interleaved: bool = False
    """Pairs are neighbours; else a pair is one dimension of each half."""

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        head_dim: int,
        base: float | None = None,
        kinds: Collection[str] = (),
        *,
        interleaved: bool = False,
    ) -> Rope:
        """What a config.json asks for; `base` overrides its rope_theta.

        Without a rope_theta the base is 10000, as published EAGLE-3 heads were trained
        (drafters.md 6.2). Scaled kinds (llama3, linear, yarn, dynamic) are transformers' own.

        Raises:
            KeyError, TypeError, ValueError: It cannot be.
        """
        rope = rope_parameters(config, kinds)
        kind, theta = rope["rope_type"], float(base or rope.get("rope_theta") or DEFAULT_BASE)
        size = int(head_dim * float(rope.get("partial_rotary_factor") or 1.0))
        if size % 2 or not 0 < size <= head_dim or theta <= 0:
            raise ValueError(f"{size} of {head_dim} dimensions cannot rotate with base {theta:g}")
        if kind == "longrope":
            raise ValueError("rope_type is longrope, whose frequencies follow the text's length")
        if kind in PLAIN:
            steps = torch.arange(0, size, 2, dtype=torch.float32) / size
            return cls(theta**-steps, theta, interleaved=interleaved)
        own = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=head_dim,
                num_attention_heads=1,
                head_dim=head_dim,
                max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
                rope_parameters={**rope, "rope_theta": theta},
            )
        )
        return cls(own.inv_freq.float(), theta, float(own.attention_scaling), interleaved)

    def to(self, device: torch.device) -> Rope:
        """The same on another device."""
        return replace(self, frequencies=self.frequencies.to(device))

    def angles(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., R / 2] at positions int64 [...]."""
        angle = position[..., None].float() * self.frequencies
        cos, sin = self.factor * angle.cos(), self.factor * angle.sin()
        return cos.to(dtype), sin.to(dtype)

    def __call__(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotate x [B, heads, T, D] by position int64 [B, T]."""
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Rotation.apply(self, x, position))
        return self.rotate(x, position)

    def rotate(self, x: Tensor, position: Tensor, *, back: bool = False) -> Tensor:
        """The same without a gradient, or the other way (`back`), as gradients go."""
        half = self.frequencies.shape[0]
        cos, sin = self.angles(position[:, None], x.dtype)
        sin = -sin if back else sin
        if self.interleaved:
            a, b = x[..., : 2 * half].unflatten(-1, (half, 2)).unbind(-1)
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
            return torch.cat([turned, x[..., 2 * half :]], dim=-1)
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)


class _Rotation(torch.autograd.Function):
    """A kernel each way where it is compiled; autograd would take thirty."""

    @staticmethod
    def forward(ctx: Any, rope: Rope, x: Tensor, position: Tensor) -> Tensor:
        ctx.rope, ctx.position = rope, position
        return _rotate(rope, x.detach(), position, back=False)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor, None]:
        return None, _rotate(ctx.rope, outer[0], ctx.position, back=True), None


@compiled_once
def _rotate(rope: Rope, x: Tensor, position: Tensor, *, back: bool) -> Tensor:
    return rope.rotate(x, position, back=back)
