"""The arithmetic that drafters share: products with one weight or one per row, norms, attention.

Pure functions on tensors; no drafter is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ttspec.compiled import compiled, is_compiling
from ttspec.rowcache import LayerCache
from ttspec.spans import span_attention

Weights = Mapping[str, Tensor]
Activation = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, new keys, new values, [B, (kv) heads, N, D]) -> attention over context and what is new,
[B, N, heads * D]."""


def placed(weights: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Weights on the target's device, floating ones in its dtype."""
    return {k: w.to(like if w.is_floating_point() else like.device) for k, w in weights.items()}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X [B, ..., in] times one weight [out, in], or one per row [B, out, in]."""
    if weight.dim() == 2:
        return product(x, weight)
    if weight.shape[0] == 1:
        return product(x, weight[0])
    return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X [..., in] times a weight [out, in], plus a bias [out].

    In two dimensions: on a CPU in bfloat16 that of a slice takes 25 times as long in three
    (findings/torch_linear_of_a_slice.sh).
    """
    if torch.is_grad_enabled() and bias is None and hasattr(weight, PLACE):
        place = getattr(weight, PLACE)
        delattr(weight, PLACE)  # of another product with it the gradient is added elsewhere
        return cast(Tensor, _Product.apply(x, weight, place))
    if x.dim() < 3 or not x.is_cpu:
        return F.linear(x, weight, bias)
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


PLACE = "gradient_place"
"""Attribute of a weight: a tensor to which the first product with it writes its gradient."""


class _Product(torch.autograd.Function):
    """X [..., in] times a weight [out, in], whose gradient is written to a place like it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place
        return product(x.detach(), weight.detach())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_y = outer[0].reshape(-1, weight.shape[0])
        torch.mm(of_y.T, x.reshape(-1, weight.shape[1]), out=ctx.place)
        of_x = (of_y @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, ctx.place, None


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows [B, ..., r] of one table [V, r], or of one per row [B, V, r], for ids int64 [B, ...]."""
    ids = ids.clamp(max=table.shape[-2] - 1)  # tables are padded to sizes that differ
    if table.dim() == 2:
        return F.embedding(ids, table)
    row = torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.dim() - 1))
    return table[row, ids]


def cut_or_padded(x: Tensor, size: int) -> Tensor:
    """X [..., n] cut to `size`, or filled up with zeros: tables are padded to sizes that differ."""
    missing = size - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


DOWN, UP = ".down", ".up"
"""After a matrix's name: the two factors [r, in] and [out, r] of a low-rank change of it."""


def project(weights: Weights, name: str, x: Tensor) -> Tensor:
    """X [B, ..., in] times `{name}.weight`, with its bias and low-rank change if it has them."""
    y, down = linear(x, weights[name + ".weight"]), weights.get(name + DOWN)
    if down is not None:
        y = low_rank(y, x, down, weights[name + UP])
    bias = weights.get(name + ".bias")
    return y if bias is None else y + per_row(bias, x)


def low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Y [B, ..., out] plus x [B, ..., in] through [r, in] and [out, r], or through each row's own.

    Never multiplied out: rows that learn for themselves share the matrix, and reading it costs what
    it costs one row.
    """
    if down.dim() == 2:
        inner = F.linear(x, down).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), inner, up.T).view_as(y)
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
    # What is compiled fuses its parts; beside that they would be eight kernels.
    one_kernel = torch.is_grad_enabled() or (x.is_cuda and not torch.compiler.is_compiling())
    if one_kernel and weight.dim() == 1:  # and one or two back
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return per_row(weight, x) * wide.to(x.dtype)


def per_row(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [H], or one per row [B, H], of a shape that goes with x [B, ..., any]."""
    return vector if vector.dim() == 1 else vector.view(len(vector), *[1] * (x.dim() - 2), -1)


def activation_of(name: str) -> Activation:
    """What a config.json calls `hidden_act`.

    Raises:
        ValueError: transformers has none of that name.
    """
    if name in ("silu", "swish"):
        return F.silu
    if name not in ACT2FN:
        raise ValueError(f"hidden_act is {name!r}; known are {', '.join(sorted(ACT2FN))}")
    activation = ACT2FN[name].eval()
    if any(True for _ in activation.parameters()):
        raise ValueError(f"hidden_act is {name!r}, which has weights of its own")
    return activation


def gated_mlp(weights: Weights, at: str, x: Tensor, activation: Activation = F.silu) -> Tensor:
    """A gated MLP of x [B, ..., H], under the published names `{at}gate_proj.weight` and so on."""
    gate, up = (project(weights, at + name, x) for name in ("gate_proj", "up_proj"))
    if activation is F.silu and torch.is_grad_enabled():
        inner = cast(Tensor, _Gated.apply(gate, up))
    else:
        inner = activation(gate) * up
    return project(weights, at + "down_proj", inner)


class _Gated(torch.autograd.Function):
    """A kernel each way where it is compiled; autograd would take five."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate.detach(), up.detach())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _gated_back(gate, up, outer[0])


@compiled
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@compiled
def _gated_back(gate: Tensor, up: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    inner = F.silu(gate)
    return torch.ops.aten.silu_backward(outer * up, gate), outer * inner


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
