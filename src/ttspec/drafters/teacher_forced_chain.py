"""EAGLE-3's one layer over texts and chains whose tokens are known, with gradients made by hand.

Autograd would take some 300 small kernels a step. Here what steps have in common is done once for
all of them: norms of embeddings, rotations' angles, and gradients of matrices and gains, as one
product each. Between products, each function is one kernel where it is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.compiled import compiled, compiled_for_any, compiles_without_gradients
from ttspec.drafters.blocks import Blocks
from ttspec.drafters.context import ContextState, first_seen
from ttspec.drafters.layers import DOWN, rms_norm
from ttspec.drafters.rotary import Rope

if TYPE_CHECKING:
    from ttspec.drafters.eagle3 import Eagle3
    from ttspec.drafters.fused_chain import ChainState

LAST = "norm"
GAINS = "input_layernorm", "hidden_norm", "post_attention_layernorm", LAST
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Chains:
    """A chains in each of B rows, of T steps."""

    drafter: Eagle3
    tokens: Tensor
    """int64 [T, B, A], which each step reads."""
    angles: tuple[Tensor, Tensor]
    """Cosines and sines [T, B, A, D / 2] of where they stand."""
    seen: Tensor
    """bool [T, B, A, C + T * A]: slots of the context, and chains' own keys step by step."""


def fits(drafter: Eagle3, state: ContextState) -> bool:
    """Whether it pays: where gradients are wanted, and what is between products is compiled.

    Also the drafter must be of the kind that is done here, and all rows share its weights.
    """
    return torch.is_grad_enabled() and compiles_without_gradients() and is_supported(drafter, state)


def is_supported(drafter: Eagle3, state: ContextState) -> bool:
    """Whether the drafter is of the kind that is done here, and all rows share its weights."""
    usual = not drafter.qk_norm and drafter.activation_name in ("silu", "swish")
    changed = any(name.endswith(DOWN) for name in state.weights)
    return usual and not state.options.rebase and drafter.is_plain(state) and not changed


def make_context(
    drafter: Eagle3, state: ChainState, h: Tensor, tokens: Tensor, position: Tensor
) -> None:
    """Keep keys and values of whole texts beside a state, with gradients.

    Args:
        drafter: See `fits`.
        state: Has the weights.
        h: [B, L, H], fused features.
        tokens: int64 [B, L], the tokens after.
        position: int64 [B, L], where they stand, from -1 on.
    """
    weights = _weights(drafter, state, GAINS[:2], ATTENTION[1:3], ())
    with torch.no_grad():
        angles = rope_angles(state.rope, position, 1, h.dtype)
    state.texts = _Context.apply(drafter, (angles[0][0], angles[1][0]), tokens, h, *weights)  # type: ignore[assignment]


def chain_states(
    drafter: Eagle3, state: ChainState, h: Tensor, tokens: Tensor, blocks: Blocks
) -> Tensor:
    """What the head reads of every step, with gradients.

    Args:
        drafter: See `fits`.
        state: Has the weights, and keys and values: those of `make_context`, if there are any.
        h: [B, A, H], fused features.
        tokens: int64 [B, A, T], which the steps read.
        blocks: Begin with the first of them.

    Returns:
        [B, A, T, H].
    """
    if state.texts:
        (keys, values), first = state.texts, -1
    else:
        (keys, values), first = (x[0] for x in state.read(blocks.longest, blocks.start)), 0
    start, steps = blocks.start - 1, tokens.shape[-1]
    with torch.no_grad():
        angles = rope_angles(state.rope, start, steps, h.dtype)
        seen = visible_slots(start, steps, keys.shape[2], first, state.options.window)
    chains = Chains(drafter, tokens.permute(2, 0, 1), angles, seen)
    weights = _weights(drafter, state, GAINS, ATTENTION, MLP)
    out = cast(Tensor, _Chains.apply(chains, h, keys, values, *weights))
    return out.permute(1, 2, 0, 3)


def _weights(
    drafter: Eagle3,
    state: ContextState,
    gains: Sequence[str],
    attention: Sequence[str],
    mlp: Sequence[str],
) -> list[Tensor]:
    """Some of the layer's weights: gains [H] first, then matrices [out, in]."""
    names = [n if n == LAST else f"midlayer.{n}" for n in gains]
    names += [f"midlayer.self_attn.{n}_proj" for n in attention]
    names += [f"midlayer.mlp.{n}_proj" for n in mlp]
    one = drafter.weights_of_one(state.weights)
    return [one[f"{n}.weight"] for n in names]


class _Context(torch.autograd.Function):
    """Rows are the L tokens of B texts, N in all."""

    @staticmethod
    def forward(
        ctx: Any, drafter: Eagle3, angles: tuple[Tensor, Tensor], tokens: Tensor, h: Tensor,
        token_gain: Tensor, gain: Tensor, *matrices: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        eps, read, h = drafter.eps, torch.cat(matrices), h.detach().flatten(0, 1)
        token_gain, gain = token_gain.detach(), gain.detach()
        embedded = F.embedding(tokens.flatten(), drafter.embedding)
        x = concat_normed(rms_normed(embedded, token_gain, eps), h, gain, eps)
        _, keys, values = rotary_qkv(x @ read.T, *angles, 0, drafter.kv_heads)
        ctx.save_for_backward(embedded, h, x, read, gain)
        ctx.angles, ctx.eps = angles, eps
        return keys.unflatten(0, (len(tokens), -1)), values.unflatten(0, (len(tokens), -1))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        embedded, h, x, read, gain = ctx.saved_tensors
        eps, size = ctx.eps, h.shape[-1]
        of_read = rotary_qkv_backward(None, *(part.flatten(0, 1) for part in outer), *ctx.angles)
        of_normed = of_read @ read[:, size:]
        of_h = rms_norm_backward(h, gain, of_normed, eps).unflatten(0, (len(outer[0]), -1))
        of_gains = (
            gain_gradient(embedded, of_read @ read[:, :size], eps),
            gain_gradient(h, of_normed, eps),
        )
        return None, None, None, of_h, *of_gains, *(of_read.T @ x).chunk(2)


class _Step(NamedTuple):
    """What a step of all chains keeps for its gradients."""

    h: Tensor  # the state that it was fed
    x: Tensor  # what is read: embedding and state, normalised
    query: Tensor
    p: Tensor  # shares of attention
    seen: Tensor  # what attention makes of them
    y: Tensor  # the state after attention
    z: Tensor  # the same, normalised
    made: Tensor  # gate and up of the MLP


class _Chains(torch.autograd.Function):
    """Rows of a step are the A chains of B rows, N in all; heads lie [B * kv heads, G * A, D]."""

    @staticmethod
    def forward(
        ctx: Any, chains: Chains, h: Tensor, keys: Tensor, values: Tensor, *weights: Tensor
    ) -> Tensor:
        drafter, (steps, rows, count) = chains.drafter, chains.tokens.shape
        eps, normed = drafter.eps, drafter.residual_is_normed
        # Compiled anew for what requires a gradient and what does not.
        h, keys, values = h.detach(), keys.detach(), values.detach()
        weights = tuple(w.detach() for w in weights)
        token_gain, gain, inner_gain, last_gain, q, k, v, out, gate, up, down = weights
        read, wide = torch.cat([q, k, v]), torch.cat([gate, up])
        embedded = F.embedding(chains.tokens.flatten(1), drafter.embedding)
        tokens = rms_normed(embedded.flatten(0, 1), token_gain, eps).view_as(embedded)
        h = h.flatten(0, 1)
        room = keys.new_zeros(*keys.shape[:2], steps * count, keys.shape[3])
        keys, values = (torch.cat([x, room], 2).flatten(0, 1) for x in (keys, values))
        own = keys.shape[1] - steps * count
        scale, kept = drafter.head_dim**-0.5, list[_Step]()
        for step in range(steps):
            x, begin = concat_normed(tokens[step], h, gain, eps), own + step * count
            angles = chains.angles[0][step], chains.angles[1][step]
            query, key, value = rotary_qkv(x @ read.T, *angles, drafter.heads, drafter.kv_heads)
            keys[:, begin : begin + count] = key
            values[:, begin : begin + count] = value
            p = attention_weights(wide_product(query, keys.mT), chains.seen[step], scale, h.dtype)
            seen = merge_heads(p @ values, rows, count)
            before = x[:, x.shape[1] // 2 :] if normed else h
            y = torch.addmm(before, seen, out.T)
            z = rms_normed(y, inner_gain, eps)
            made = z @ wide.T
            kept.append(_Step(h, x, query, p, seen, y, z, made))
            h = torch.addmm(y, silu_gate(made), down.T)
        ctx.chains, ctx.sizes = chains, (own, scale)
        last = torch.stack([*(one.h for one in kept[1:]), h])
        ctx.save_for_backward(keys, values, read, wide, last, *weights, *sum(kept, ()))
        return rms_normed(last.flatten(0, 1), last_gain, eps).view(steps, rows, count, -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        chains, (own, scale) = ctx.chains, ctx.sizes
        drafter, (steps, rows, count) = chains.drafter, chains.tokens.shape
        eps, normed = drafter.eps, drafter.residual_is_normed
        keys, values, read, wide, last, *saved = ctx.saved_tensors
        _, gain, inner_gain, last_gain, *_, out, _, _, down = saved[:11]
        kept = [_Step(*saved[i : i + 8]) for i in range(11, len(saved), 8)]
        size = last.shape[-1]
        of_last = outer[0].flatten(1, 2)
        flat = last.flatten(0, 1), last_gain, of_last.flatten(0, 1), eps
        of_states = rms_norm_backward(*flat).view_as(last)
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        of_y2, found = of_states[-1], list[tuple[Tensor, ...]]()
        for step in reversed(range(steps)):
            now = kept[step]
            of_made, inner = silu_gate_backward(now.made, of_y2 @ down)
            of_z = of_made @ wide
            of_y = rms_norm_backward(now.y, inner_gain, of_z, eps, of_y2)
            of_seen = split_heads(of_y @ out, rows, count, drafter.heads, drafter.kv_heads)
            of_scores = attention_weights_backward(now.p, wide_product(of_seen, values.mT), scale)
            of_keys.baddbmm_(of_scores.mT, now.query)
            of_values.baddbmm_(now.p.mT, of_seen)
            begin = own + step * count
            mine = of_keys[:, begin : begin + count], of_values[:, begin : begin + count]
            angles = chains.angles[0][step], chains.angles[1][step]
            of_read = rotary_qkv_backward(of_scores @ keys, *mine, *angles)
            of_normed = of_read @ read[:, size:]
            if normed:
                of_normed += of_y
            found.append((of_y2, of_made, inner, of_z, of_y, of_read, of_normed))
            more = [of_states[step - 1]] * (step > 0) + [of_y] * (not normed)
            of_y2 = rms_norm_backward(now.h, gain, of_normed, eps, *more)
        of_h = of_y2
        parts = zip(*((one.h, one.x, one.seen, one.y, one.z) for one in kept), strict=True)
        hs, xs, seens, ys, zs = map(torch.cat, parts)
        of_y2, of_made, inner, of_z, of_y, of_read, of_normed = (
            torch.cat(part[::-1]) for part in zip(*found, strict=True)
        )
        embedded = F.embedding(chains.tokens.flatten(), drafter.embedding)
        of_gains = (
            gain_gradient(embedded, of_read @ read[:, :size], eps),
            gain_gradient(hs, of_normed, eps),
            gain_gradient(ys, of_z, eps),
            gain_gradient(last.flatten(0, 1), of_last.flatten(0, 1), eps),
        )
        parts = [w.shape[0] for w in saved[4:7]]
        of_matrices = (
            *(of_read.T @ xs).split(parts),
            of_y.T @ seens,
            *(of_made.T @ zs).chunk(2),
            of_y2.T @ inner,
        )
        contexts = (x.unflatten(0, (rows, -1))[:, :, :own] for x in (of_keys, of_values))
        return None, of_h.unflatten(0, (rows, count)), *contexts, *of_gains, *of_matrices


def wide_product(one: Tensor, other: Tensor) -> Tensor:
    """[B, n, k] times [B, k, m]: [B, n, m], float32 where a GPU rounds otherwise."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.bmm(one, other, out_dtype=torch.float32)
    return torch.bmm(one, other)


@compiled
def rope_angles(rope: Rope, start: Tensor, steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, B, A, D / 2] of the steps of chains."""
    return rope.angles(start + torch.arange(steps, device=start.device)[:, None, None], dtype)


@compiled
def visible_slots(start: Tensor, steps: int, slots: int, first: int, nearest: int | None) -> Tensor:
    """What each step of chains sees, bool [T, B, A, C + T * A]: context, and their own keys.

    Args:
        start: int64 [B, A], where the chains begin.
        steps: T.
        slots: C, of which the first stands at `first`.
        first: See `slots`.
        nearest: As in `first_seen`.
    """
    step, chain = (torch.arange(n, device=start.device) for n in (steps, start.shape[1]))
    own = (chain[:, None] == chain)[None, :, None] & (step <= step[:, None])[:, None, :, None]
    own = own.flatten(2)[:, None].expand(-1, len(start), -1, -1)
    slot = torch.arange(first, first + slots, device=start.device)
    far = (slot < start[..., None]) & (slot >= first_seen(start, start, nearest)[..., None])
    return torch.cat([far.expand(steps, -1, -1, -1), own], -1)


@compiled_for_any(x=0)
def rms_normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x [N, H]."""
    return rms_norm(x, gain, eps)


@compiled_for_any(tokens=0, h=0)
def concat_normed(tokens: Tensor, h: Tensor, gain: Tensor, eps: float) -> Tensor:
    """What the layer reads [N, 2H]: normalised embeddings, and states to be normalised."""
    return torch.cat([tokens, rms_norm(h, gain, eps)], -1)


@compiled_for_any(x=0, outer=0)
def rms_norm_backward(x: Tensor, gain: Tensor, outer: Tensor, eps: float, *more: Tensor) -> Tensor:
    """Gradient of x [N, H] in `rms_norm`, and what is `more`."""
    wide, outer = x.float(), outer.float() * gain.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    wide = wide * scale
    found = scale * (outer - wide * (outer * wide).mean(-1, keepdim=True))
    return sum(more, found).to(x.dtype)


@compiled
def gain_gradient(x: Tensor, outer: Tensor, eps: float) -> Tensor:
    """Gradient of the gain in `rms_norm` of x [N, H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * outer.float()).sum(0).to(x.dtype)


@compiled
def silu_gate(made: Tensor) -> Tensor:
    """SiLU of the first half of each row of [N, 2 I], times the second: [N, I]."""
    gate, up = made.chunk(2, -1)
    return F.silu(gate) * up


@compiled
def silu_gate_backward(made: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [N, 2 I] of `made`, and what `silu_gate` makes of it; `outer` is [N, I]."""
    gate, up = (half.float() for half in made.chunk(2, -1))
    part = gate.sigmoid()
    inner, outer = gate * part, outer.float()
    slope = part * (1 + gate * (1 - part))
    found = torch.cat([outer * up * slope, outer * inner], -1)
    return found.to(made.dtype), (inner * up).to(made.dtype)


@compiled
def attention_weights(scores: Tensor, seen: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Softmax of scores [B * kv heads, G * A, S] over what is seen, bool [B, A, S]."""
    rows, count, slots = seen.shape
    x = scores.view(rows, -1, count, slots).float() * scale
    return x.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(dtype).view(scores.shape)


@compiled
def attention_weights_backward(p: Tensor, outer: Tensor, scale: float) -> Tensor:
    """Gradient of the scores, of what `attention_weights` made and its gradient: all of a shape."""
    wide, outer = p.float(), outer.float()
    return (wide * (outer - (wide * outer).sum(-1, keepdim=True)) * scale).to(p.dtype)


@compiled
def rotary_qkv(
    made: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B * kv, G * A, D] and keys [B * kv, A, D], rotated, and values, of [N, heads * D].

    cos and sin are [B, A, D / 2].
    """
    x = made.view(*cos.shape[:2], heads + 2 * kv_heads, -1).transpose(1, 2)
    query, key, value = x.split([heads, kv_heads, kv_heads], 1)
    query, key = (rotated(part, cos[:, None], sin[:, None]) for part in (query, key))
    shape = key.flatten(0, 1).shape
    query = query.reshape(shape[0], heads // kv_heads * shape[1], shape[2])
    return query, key.reshape(shape), value.reshape(shape)


@compiled
def rotary_qkv_backward(
    query: Tensor | None, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Gradient [N, heads * D] of what was turned, from those of queries, keys and values."""
    rows, count, half = cos.shape
    turn = [x.reshape(rows, -1, count, 2 * half) for x in (query, key) if x is not None]
    turn = [rotated(x, cos[:, None], -sin[:, None]) for x in turn]
    found = torch.cat([*turn, value.reshape(rows, -1, count, 2 * half)], 1)
    return found.transpose(1, 2).reshape(rows * count, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [..., D] as `Rope`, with angles [..., D / 2] that are known."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def merge_heads(x: Tensor, rows: int, count: int) -> Tensor:
    """[B * kv heads, G * A, D] as [N, heads * D]."""
    return x.reshape(rows, -1, count, x.shape[-1]).transpose(1, 2).reshape(rows * count, -1)


def split_heads(x: Tensor, rows: int, count: int, heads: int, kv_heads: int) -> Tensor:
    """[N, heads * D] as [B * kv heads, G * A, D]."""
    x = x.view(rows, count, heads, -1).transpose(1, 2)
    return x.reshape(rows * kv_heads, -1, x.shape[-1])
