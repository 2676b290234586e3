"""Layers with a recurrent state, rolled back as keys are: by where the next forward starts.

A gated delta net sums its text up in one matrix a head, which cannot be cut back as keys can. So
a forward of drafts does not write its state: it keeps what its tokens would add, and the next
forward, by its `start`, says how many of them stayed. Those are added first. What is kept of a
token is what it writes (its delta), which depends on no later token: adding some is one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ttspec.errors import TargetError
from ttspec.models.delta_rule import HAS_KERNEL, advance, advance_and_read, like, read_block
from ttspec.rowcache import RowCache

GATED = (
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "Qwen3NextGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
)
"""Classes of transformers whose forward we know. Others are alike, and differ in what matters."""
CHUNK = 64
"""Tokens whose effects on each other are solved for together."""


@dataclass(slots=True)
class LayerState:
    """What one layer holds of every row, at fixed addresses."""

    base: Tensor
    """int64 [rows], the tokens that are in `state` and `window`."""
    state: Tensor
    """float32 [rows, Hv, Dk, Dv]."""
    window: Tensor
    """[rows, K - 1, C], the convolution's last inputs."""
    inputs: Tensor
    """[rows, width, C], its inputs after those: of the last forward's tokens."""
    keys: Tensor
    """float32 [rows, Hk, width, Dk], of the same tokens, normalised."""
    deltas: Tensor
    """float32 [rows, Hv, width, Dv], what each would write to its key's place."""
    decays: Tensor
    """float32 [rows, Hv, width], logarithm of what each leaves of what was before."""

    @classmethod
    def empty(cls, module: nn.Module, rows: int, width: int, like: Tensor) -> LayerState:
        """Zeros for a module's states, its inputs in the dtype of `like`."""
        m: Any = module
        channels, window = m.conv_dim, m.conv_kernel_size - 1
        key_heads, heads, size, wide = m.num_k_heads, m.num_v_heads, m.head_k_dim, m.head_v_dim
        exact = {"dtype": torch.float32, "device": like.device}
        return cls(
            base=torch.zeros(rows, dtype=torch.long, device=like.device),
            state=torch.zeros(rows, heads, size, wide, **exact),
            window=like.new_zeros(rows, window, channels),
            inputs=like.new_zeros(rows, width, channels),
            keys=torch.zeros(rows, key_heads, width, size, **exact),
            deltas=torch.zeros(rows, heads, width, wide, **exact),
            decays=torch.zeros(rows, heads, width, **exact),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(getattr(self, name).nbytes for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class LayerStates:
    """One layer's states, and where in their text the next forward's tokens begin."""

    own: LayerState
    start: Tensor
    """int64 [B]."""
    rest: Tensor
    """bool [B], rows that take no part."""
    counts: Tensor | None
    """int64 [B], how many tokens stay; None where they are drafts."""
    subset: Tensor | None
    """int64 [B], the rows that are fed; None is all."""

    def read(self, module: nn.Module, inputs: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """As of `StateCache`."""
        m: Any = module
        own, start, rest, counts = self.own, self.start, self.rest, self.counts
        rows = slice(None) if self.subset is None else self.subset
        fresh, width = start == 0, own.inputs.shape[1]
        count = (start - own.base[rows]).clamp(0, width).masked_fill(fresh | rest, 0)

        window = own.window[rows].masked_fill(fresh[:, None, None], 0)
        window = _last(torch.cat([window, own.inputs[rows]], 1), count, window.shape[1])
        together = torch.cat([window, inputs], 1)
        sizes = m.head_k_dim, m.head_k_dim, m.head_v_dim
        parts = _convolved(m, together).float().split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, sizes, strict=True))
        q, k = _normal(q) * m.head_k_dim**-0.5, _normal(k)
        if counts is not None:
            stays = torch.arange(inputs.shape[1], device=start.device) < counts[:, None]
            decay, beta = (part * stays[..., None] for part in (decay, beta))

        drafts = counts is None
        if drafts and self.subset is None and inputs.is_cuda and HAS_KERNEL:
            kept, tokens = [own.keys, own.decays], [q, k, v, decay, beta]
            out = advance_and_read(own.state, own.deltas, kept, [count, start, rest], tokens)
        else:
            state = own.state[rows].masked_fill_(fresh[:, None, None, None], 0)
            advance(state, own.keys[rows], own.deltas[rows], own.decays[rows], count)
            outs: list[Tensor] = []
            tokens = [part.transpose(1, 2) for part in (q, k, v, decay, beta)]
            for part in zip(
                *(t.split(inputs.shape[1] if drafts else CHUNK, 2) for t in tokens), strict=True
            ):
                out, deltas = read_block(state, *part)
                outs.append(out.transpose(1, 2))
                if drafts:
                    _keep(own.deltas, deltas, rows, rest)
                else:  # what does not stay leaves the state as it is
                    advance(state, part[1], deltas, part[3])
            out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
            if self.subset is not None:
                own.state[rows] = state
        if counts is not None:
            own.window[rows] = _last(together, counts, window.shape[1])
            own.base[rows] = start + counts
            return out
        own.window[rows] = window
        _keep(own.inputs[:, None], inputs[:, None], rows, rest)
        _keep(own.keys, k.transpose(1, 2), rows, rest)
        _keep(own.decays, decay.transpose(1, 2), rows, rest)
        own.base[rows] = torch.where(rest, own.base[rows], start)
        return out


class StateCache(RowCache):
    """Keys and values of the attention layers, states of the recurrent ones.

    A row's state knows where it stands. A forward may start there, at 0, which empties it, or
    within what the last forward read; the caller sees to it.
    """

    def __init__(self, rows: int, slots: int, width: int) -> None:
        """Make room for `rows` rows of `slots` tokens, read up to `width` at a time as drafts."""
        super().__init__(rows, slots)
        self.width = width
        self.states: dict[int, LayerState] = {}
        self._start: Tensor
        self._rests: Tensor
        self._counts: Tensor | None = None

    def set_slots(
        self, slot: Tensor, reach: int, subset: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        """As of `RowCache`; with `counts` int64 [B] the tokens are no drafts: so many stay."""
        if counts is None and slot.shape[1] > self.width:
            raise ValueError(
                f"{slot.shape[1]} tokens are read as drafts, but the cache keeps {self.width}; "
                "say with counts how many of them stay, or make the cache wider."
            )
        super().set_slots(slot, reach, subset)
        self._start, self._counts = slot[:, 0].contiguous(), counts
        self._rests = self._start >= self.slots

    @property
    def nbytes(self) -> int:
        """Bytes held at present."""
        return super().nbytes + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """See `RowCache.state_bytes`."""
        return sum(state.nbytes for state in self.states.values())

    def layer(self, index: int) -> Any:
        """As of `RowCache`; of a recurrent layer its `LayerStates`."""
        if index not in self.states:
            return super().layer(index)
        own = self.states[index]
        place = own.base.device  # where the layer is
        counts, subset = (t if t is None else t.to(place) for t in (self._counts, self._subset))
        return LayerStates(own, self._start.to(place), self._rests.to(place), counts, subset)

    def read(self, module: nn.Module, inputs: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        """Go on from where each row's forward starts, and let a module's tokens be read.

        Args:
            module: Whose tokens these are.
            inputs: [B, T, C], queries, keys and values before the convolution.
            decay: float32 [B, T, Hv], logarithm of what each token leaves of the state, 0 at most.
            beta: float32 [B, T, Hv], how much of its key's place each token writes anew.

        Returns:
            float32 [B, T, Hv, Dv].
        """
        index: Any = module.layer_idx
        if index not in self.states:
            self.states[index] = LayerState.empty(module, self.rows, self.width, inputs)
        return self.layer(index).read(module, inputs, decay, beta)


def use_states(model: nn.Module, layers: list[int]) -> None:
    """Let a model's recurrent layers keep their states in a `StateCache` when they are given one.

    Without one, or with a cache of transformers, their own forward runs.

    `layers` are the numbers of its recurrent ones.

    Raises:
        TargetError: One of them is of a class that we do not know.
    """
    gated = {int(m.layer_idx): m for m in model.modules() if type(m).__name__ in GATED}  # type: ignore[arg-type]
    if set(gated) != set(layers) or (getattr(model, "_is_stateful", False) and not gated):
        known = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "layer_idx")})
        raise TargetError(
            f"The target has recurrent layers, and is made of {', '.join(known)}; their state "
            f"cannot be rolled back.\nSupported are {', '.join(GATED)}."
        )
    for module in gated.values():
        module.forward = MethodType(_forward, module)


def _forward(m: Any, hidden_states: Tensor, *args: Any, **given: Any) -> Tensor:
    """A gated delta net's forward; `m` is transformers' module."""
    states = given.get("cache", given.get("cache_params"))  # renamed in transformers 5.24
    if not isinstance(states, StateCache | LayerStates):
        return type(m).forward(m, hidden_states, *args, **given)
    inputs, gate, a, b = _projected(m, hidden_states)
    decay = -m.A_log.float().exp() * F.softplus(a.float() + m.dt_bias)
    beta = b.sigmoid().float() * (2 if getattr(m, "allow_neg_eigval", False) else 1)
    out = states.read(m, inputs, decay, beta).to(hidden_states.dtype)
    norm, project = (m.o_norm, m.o_proj) if hasattr(m, "o_norm") else (m.norm, m.out_proj)
    normed = norm(out.reshape(-1, m.head_v_dim), gate.reshape(-1, m.head_v_dim))
    return project(normed.reshape(*hidden_states.shape[:2], -1))


def _projected(m: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, C], the gate, a and b [B, T, Hv], as each class has them."""
    if hasattr(m, "in_proj_qkv"):  # Qwen3.5
        return m.in_proj_qkv(hidden), m.in_proj_z(hidden), m.in_proj_a(hidden), m.in_proj_b(hidden)
    if hasattr(m, "q_proj"):  # OLMo
        inputs = torch.cat([m.q_proj(hidden), m.k_proj(hidden), m.v_proj(hidden)], -1)
        return inputs, m.g_proj(hidden), m.a_proj(hidden), m.b_proj(hidden)
    # Qwen3-Next lays a key head's parts side by side.
    group = m.num_v_heads // m.num_k_heads
    wide, size = group * m.head_v_dim, m.head_k_dim
    parts = m.in_proj_qkvz(hidden).unflatten(-1, (m.num_k_heads, -1))
    q, k, v, gate = (p.flatten(2) for p in parts.split([size, size, wide, wide], dim=-1))
    b, a = (
        p.flatten(2) for p in m.in_proj_ba(hidden).unflatten(-1, (m.num_k_heads, -1)).chunk(2, -1)
    )
    return torch.cat([q, k, v], -1), gate, a, b


def _convolved(m: Any, inputs: Tensor) -> Tensor:
    """The causal convolution [B, T, C] of inputs [B, K - 1 + T, C], and its activation."""
    # A few products: in bfloat16 a CPU's convolution takes a hundred times as long.
    weight, x = m.conv1d.weight[:, 0].float().T, inputs.float()  # none has a bias
    size = x.shape[1] - len(weight) + 1
    out = x[:, :size] * weight[0]
    for i in range(1, len(weight)):
        out = torch.addcmul(out, x[:, i : i + size], weight[i])
    return ACT2FN[m.activation](out.to(inputs.dtype))


def _last(inputs: Tensor, count: Tensor, size: int) -> Tensor:
    """Of inputs [B, size + T, C], the last `size` of the first size + count."""
    at = count[:, None] + torch.arange(size, device=count.device)
    return inputs.gather(1, at[..., None].expand(-1, -1, inputs.shape[2]))


def _normal(states: Tensor) -> Tensor:
    return states * torch.rsqrt((states * states).sum(-1, keepdim=True) + 1e-6)


def _keep(kept: Tensor, new: Tensor, rows: Any, rest: Tensor) -> None:
    """Write what the tokens of [B, ., T, ...] would add; rows at rest keep what they have."""
    width = new.shape[2]
    old = kept[rows][:, :, :width]
    kept[rows, :, :width] = torch.where(like(rest, new), old, new)
