"""Layers with a recurrent state, rolled back as keys are: by where the next forward starts.

A gated delta net sums its text up in one matrix a head, which cannot be cut back as keys can. So
a forward of drafts does not write its state: it keeps what its tokens would add, and the next
forward, by its `start`, says how many of them stayed. Those are added first. What is kept of a
token is what it writes (its delta), which depends on no later token: adding some is one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ttspec.errors import TargetError
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
BLOCK = 32
"""Columns of a state that one program of a GPU works on."""


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
        self._start, self._counts = slot[:, 0], counts

    @property
    def nbytes(self) -> int:
        """Bytes held at present."""
        return super().nbytes + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """See `RowCache.state_bytes`."""
        return sum(state.nbytes for state in self.states.values())

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
        m: Any = module
        if m.layer_idx not in self.states:
            self.states[m.layer_idx] = LayerState.empty(m, self.rows, self.width, inputs)
        own, start = self.states[m.layer_idx], self._start.to(inputs.device)  # where the layer is
        counts = None if self._counts is None else self._counts.to(inputs.device)
        rows = slice(None) if self._subset is None else self._subset.to(inputs.device)
        fresh, rest = start == 0, start >= self.slots
        count = (start - own.base[rows]).clamp(0, self.width).masked_fill(fresh | rest, 0)

        window = own.window[rows].masked_fill(fresh[:, None, None], 0)
        window = _last(torch.cat([window, own.inputs[rows]], 1), count, window.shape[1])
        together = torch.cat([window, inputs], 1)
        q, k, v = _convolved(m, together).float().split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        q, k = (_normal(part, m.num_k_heads) for part in (q, k))
        q, v = q * m.head_k_dim**-0.5, _heads(v, m.num_v_heads)
        decay, beta = decay.transpose(1, 2), beta.transpose(1, 2)
        if counts is not None:
            stays = torch.arange(inputs.shape[1], device=start.device) < counts[:, None]
            decay, beta = (part * stays[:, None] for part in (decay, beta))

        if counts is None and self._subset is None and inputs.is_cuda and has_kernel():
            out, deltas = on_gpu(own, count, fresh, q, k, v, decay, beta)
        else:
            state = own.state[rows].masked_fill_(fresh[:, None, None, None], 0)
            advance(state, own.keys[rows], own.deltas[rows], own.decays[rows], count)
            outs, deltas = [], v
            size = inputs.shape[1] if counts is None else CHUNK
            for part in zip(*(t.split(size, 2) for t in (q, k, v, decay, beta)), strict=True):
                out, deltas = read_block(state, *part)
                outs.append(out)
                if counts is not None:  # what does not stay leaves the state as it is
                    advance(state, part[1], deltas, part[3])
            out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
            if self._subset is not None:
                own.state[rows] = state
        if counts is not None:
            own.window[rows] = _last(together, counts, window.shape[1])
            own.base[rows] = start + counts
            return out.transpose(1, 2)
        own.window[rows] = window
        stores = own.inputs[:, None], own.keys, own.deltas, own.decays
        for store, new in zip(stores, (inputs[:, None], k, deltas, decay), strict=True):
            _keep(store, new, rows, rest)
        own.base[rows] = torch.where(rest, own.base[rows], start)
        return out.transpose(1, 2)


def advance(
    state: Tensor, keys: Tensor, deltas: Tensor, decay: Tensor, count: Tensor | None = None
) -> None:
    """Let states go on by some tokens.

    Args:
        state: float32 [B, Hv, Dk, Dv], changed in place.
        keys: float32 [B, Hk, T, Dk].
        deltas: float32 [B, Hv, T, Dv], of `read_block`.
        decay: float32 [B, Hv, T], likewise.
        count: int64 [B], how many of the tokens; None is all.
    """
    decays = decay.cumsum(2)
    if count is None:
        last, left = decays[..., -1:], decays
    else:
        last = F.pad(decays, (1, 0)).gather(2, _like(count, decays).expand(-1, decays.shape[1], 1))
        later = torch.arange(decays.shape[2], device=count.device) >= _like(count, decays)
        left = decays.masked_fill(later, torch.inf)
    written = _for_values(keys, deltas) * (last - left).exp()[..., None]
    state.mul_(last.exp()[..., None])
    state.flatten(0, 1).baddbmm_(written.transpose(2, 3).flatten(0, 1), deltas.flatten(0, 1))


def read_block(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over a few tokens, the state left as it is.

    Token t makes of S: S' = exp(decay_t) S; S = S' + key_t delta_t, with delta_t = beta_t (value_t
    - S' key_t), and reads S query_t. With what the state holds for the keys known, the deltas are
    the solution of one triangular system.

    Args:
        state: float32 [B, Hv, Dk, Dv].
        query: float32 [B, Hk, T, Dk].
        key: float32 [B, Hk, T, Dk].
        value: float32 [B, Hv, T, Dv].
        decay: float32 [B, Hv, T].
        beta: float32 [B, Hv, T].

    Returns:
        What is read and the deltas, [B, Hv, T, Dv].
    """
    query, key = _for_values(query, value), _for_values(key, value)
    decays = decay.cumsum(2)
    since = decays[..., :, None] - decays[..., None, :]
    later = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).triu(1)
    since = since.masked_fill(later, -torch.inf).exp()
    left, beta = decays.exp()[..., None], beta[..., None]
    # The solver takes the diagonal for ones.
    system = beta * since * (key @ key.transpose(2, 3))
    right_side = beta * (value - left * (key @ state))
    deltas = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    out = left * (query @ state) + (since * (query @ key.transpose(2, 3))) @ deltas
    return out, deltas


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
    if not isinstance(states, StateCache):
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


def _heads(states: Tensor, heads: int) -> Tensor:
    """[B, T, heads x D] as [B, heads, T, D]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normal(states: Tensor, heads: int) -> Tensor:
    states = _heads(states, heads)
    return states * torch.rsqrt((states * states).sum(-1, keepdim=True) + 1e-6)


def _for_values(keys: Tensor, values: Tensor) -> Tensor:
    """Keys [B, Hk, T, D] for every head of values: heads side by side share a key head."""
    group = values.shape[1] // keys.shape[1]
    return keys if group == 1 else keys.repeat_interleave(group, 1)


def _like(count: Tensor, decays: Tensor) -> Tensor:
    return count.view(-1, *[1] * (decays.dim() - 1))


def _keep(kept: Tensor, new: Tensor, rows: Any, rest: Tensor) -> None:
    """Write what the tokens of [B, ., T, ...] would add; rows at rest keep what they have."""
    width = new.shape[2]
    old = kept[rows][:, :, :width]
    kept[rows, :, :width] = torch.where(_like(rest, new), old, new)


@cache
def has_kernel() -> bool:
    """Whether Triton is there, which torch brings where it can use a GPU."""
    return find_spec("triton") is not None


def on_gpu(
    own: LayerState,
    count: Tensor,
    fresh: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:
    """`advance`, then `read_block`, in one pass over the states of all rows.

    Args:
        own: Its state becomes that after `count` of its kept tokens.
        count: int64 [rows].
        fresh: bool [rows], rows whose state is taken for zero.
        query: This and what follows as in `read_block`.
        key: float32 [rows, Hk, T, Dk].
        value: float32 [rows, Hv, T, Dv].
        decay: float32 [rows, Hv, T].
        beta: float32 [rows, Hv, T].

    Returns:
        As `read_block`.
    """
    rows, heads, size, wide = own.state.shape
    query, key, value, decay, beta = (t.contiguous() for t in (query, key, value, decay, beta))
    out, deltas = torch.empty_like(value), torch.empty_like(value)
    block = min(BLOCK, 1 << (wide - 1).bit_length())
    with torch.cuda.device(value.device):  # Triton launches on the current one
        _kernels().advance_and_read[-(-wide // block), heads, rows](
            own.state,
            own.keys,
            own.deltas,
            own.decays,
            count,
            fresh.int(),
            query,
            key,
            value,
            decay,
            beta,
            out,
            deltas,
            value.shape[2],
            own.keys.shape[2],
            heads=heads,
            key_heads=key.shape[1],
            size=size,
            wide=wide,
            deep=1 << (size - 1).bit_length(),
            block=block,
            num_warps=4,
        )
    return out, deltas


@cache
def _kernels() -> Any:
    from ttspec.models import recurrent_kernels

    return recurrent_kernels
