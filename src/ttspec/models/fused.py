"""Dense targets on a GPU: a forward of a few tokens as six kernels a layer and one for the head.

At few tokens a small model's time goes into launching kernels and waiting for the last of them.
Here each does more, and fetches its weights while the one before it still runs. Sums are float32
and are rounded where the model's own code rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ttspec.models.layers import TOGETHER, Together
from ttspec.rowcache import RowCache
from ttspec.spans import is_batch_invariant

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Of transformers; by name, since to import them takes time."""
MOST = 16
"""Tokens of all rows."""
WIDEST = 1024
"""Hidden size past which the device's own products measured faster."""
KEYS = 64
"""Slots that are read together."""
LEAST = 128
"""Slots of a part of a row's context, at least."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds whose angles depend on the position alone."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut."""

    block: int
    """Outputs of a program."""
    splits: int
    """Parts of K, worked on by warps side by side."""
    share: int
    """Elements of K that one part takes at a time."""
    stages: int
    warps: int


class Fused:
    """A model's forward for few tokens, from the weights that it has."""

    def __init__(
        self,
        model: PreTrainedModel,
        together: list[list[Together]],
        windows: tuple[int | None, ...],
    ) -> None:
        """`together`: of each layer its projections q, k, v and gate, up laid together."""
        self.model: Any = model
        self.layers = list(model.model.layers)  # type: ignore[union-attr,arg-type]
        self.together = together
        self.windows = windows
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}
        config: Any = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size: int = self.layers[0].self_attn.head_dim
        self.eps: float = config.rms_norm_eps
        self.early = model.device.type == "cuda"
        """Whether kernels begin before the one before them has ended."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, together: list[list[Together]], windows: tuple[int | None, ...]
    ) -> Fused | None:
        """That of a model, if its layers are of the kind that these kernels do."""
        pairs = all(len(group) == len(TOGETHER) for group in together)
        return cls(model, together, windows) if pairs and _fits(model, windows) else None

    def takes(self, cache: RowCache, tokens: Tensor) -> bool:
        """Whether tokens [B, T] are few enough, and the cache was made."""
        made = len(cache.keys) == len(self.layers) and tokens.shape[0] == cache.rows
        return made and tokens.numel() <= MOST and not is_batch_invariant()

    def __call__(
        self,
        cache: RowCache,
        tokens: Tensor,
        start: Tensor,
        taps: tuple[int, ...],
        logits: int | None,
    ) -> tuple[Tensor | None, Tensor]:
        """As `Target.forward`, for all rows of the cache."""
        rows, width = tokens.shape
        angles = self._angles(cache.slots)
        x = F.embedding(tokens, self.model.model.embed_tokens.weight).view(rows * width, -1)
        states = [x]
        for index, layer in enumerate(self.layers):
            x = self._layer(index, layer, x, cache, start, width, angles)
            states.append(x)
        if {-1, len(self.layers)} & set(taps):
            states[-1] = self.model.model.norm(x)
        features = [states[i].view(rows, width, -1) for i in taps]
        read = torch.cat(features, dim=-1) if taps else x.new_empty(rows, width, 0)
        if logits == 0:
            return None, read
        if logits is not None and logits < width:
            x = x.view(rows, width, -1)[:, -logits:].reshape(rows * logits, -1)
        head = self.model.lm_head
        out = self._product(x, head.weight, head.bias, gain=self.model.model.norm.weight)
        return out.view(rows, -1, out.shape[-1]), read

    def _layer(
        self,
        index: int,
        layer: Any,
        x: Tensor,
        cache: RowCache,
        start: Tensor,
        width: int,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        joined, mlp = self.together[index]
        out = layer.self_attn.o_proj
        made = self._product(x, joined.weight, joined.bias, gain=layer.input_layernorm.weight)
        seen = self._attention(index, layer.self_attn, made, cache, start, width, angles)
        x = self._product(seen, out.weight, out.bias, residual=x)
        gain = layer.post_attention_layernorm.weight
        made = self._product(x, mlp.weight, mlp.bias, gain=gain, gated=True)
        return self._product(made, layer.mlp.down_proj.weight, layer.mlp.down_proj.bias, residual=x)

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        gain: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        count, width = x.shape
        outputs = weight.shape[0] // (1 + gated)
        out = x.new_empty(count, outputs)
        tiles = tiles_of(width, outputs, gated)
        _kernels().product[(-(-outputs // tiles.block),)](
            x,
            weight,
            weight if bias is None else bias,
            weight if gain is None else gain,
            x if residual is None else residual,
            out,
            self.eps,
            count,
            outputs,
            width=width,
            normed=gain is not None,
            gated=gated,
            biased=bias is not None,
            added=residual is not None,
            wide=8 if count <= 8 else 16,
            block=tiles.block,
            splits=tiles.splits,
            share=tiles.share,
            stages=tiles.stages,
            pdl=self.early,
            num_warps=tiles.warps,
            **_options(self.early),
        )
        return out

    def _attention(
        self,
        index: int,
        module: Any,
        made: Tensor,
        cache: RowCache,
        start: Tensor,
        width: int,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        count, rows = made.shape[0], start.shape[0]
        keys, values = cache.keys[index], cache.values[index]
        queries = self.heads // self.kv_heads * width
        tile = min(64, max(16, 1 << (queries - 1).bit_length()))
        tiles = -(-queries // tile)
        splits = splits_of(rows * self.kv_heads * tiles, cache.slots)
        parts = made.new_empty(count, self.heads, splits, self.size, dtype=torch.float32)
        weights = made.new_empty(count, self.heads, splits, 2, dtype=torch.float32)
        out = made.new_empty(count, self.heads * self.size)
        window = self.windows[index] or 0
        query_norm = getattr(module, "q_norm", None)
        kernels = _kernels()
        kernels.attend[(splits, self.kv_heads * tiles, rows)](
            made,
            keys,
            values,
            start,
            *angles,
            made if query_norm is None else query_norm.weight,
            made if query_norm is None else module.k_norm.weight,
            parts,
            weights,
            module.scaling * 1.4426950408889634,  # exp2 is what the device has
            self.eps,
            cache.slots,
            cache.slots - 1,
            window,
            width,
            tiles,
            keys.stride(0),
            keys.stride(1),
            heads=self.heads,
            kv_heads=self.kv_heads,
            size=self.size,
            normed=query_norm is not None,
            splits=splits,
            rows=tile,
            block=16,
            count=KEYS,
            least=LEAST,
            stages=2,
            pdl=self.early,
            num_warps=4,
            **_options(self.early),
        )
        kernels.combine[(count, self.heads)](
            parts,
            weights,
            start,
            out,
            cache.slots,
            window,
            width,
            heads=self.heads,
            size=self.size,
            splits=splits,
            count=KEYS,
            least=LEAST,
            pdl=self.early,
            num_warps=1,
            **_options(self.early),
        )
        return out

    def _angles(self, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [slots, head size / 2]."""
        if slots not in self.angles:
            like = self.model.model.embed_tokens.weight[:1, None]
            position = torch.arange(slots, device=like.device)[None]
            halves = self.model.model.rotary_emb(like, position)
            cosine, sine = (half[0, :, : self.size // 2].contiguous() for half in halves)
            self.angles[slots] = cosine, sine
        return self.angles[slots]


def tiles_of(width: int, outputs: int, gated: bool) -> Tiles:
    """How to cut a product of [tokens, width] and [outputs, width]."""
    if outputs > 16384:
        return Tiles(64, 4, 64, 3, 4)
    if width <= 1024:
        whole = 1 << (width - 1).bit_length()
        splits = min(8 if gated else 4, whole // 16)  # a product of fewer is none
        return Tiles(16, splits, whole // splits, 1, splits)
    return Tiles(16, 8, 64, 4, 8)


def splits_of(programs: int, slots: int) -> int:
    """In how many parts a context is read: enough for each processor, no more than help."""
    most = min(132 // programs, slots // LEAST, 64)
    return 1 << max(most.bit_length() - 1, 0) if most > 0 else 1


def _fits(model: PreTrainedModel, windows: tuple[int | None, ...]) -> bool:
    config: Any = model.config
    kind = type(model)
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers."):
        return False
    if model.dtype != torch.bfloat16 or model.device.type != "cuda":
        return False
    if config.hidden_size > WIDEST or config.hidden_act != "silu":
        return False
    if config.rope_parameters.get("rope_type") not in ROTARY:
        return False
    if 0 in windows or torch.cuda.get_device_capability(model.device) < (9, 0):
        return False
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    plain = all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in linears)
    even = all(m.in_features % 64 == 0 for m in linears)
    size = model.model.layers[0].self_attn.head_dim  # type: ignore[union-attr]
    return plain and even and size in (64, 128)


def _options(early: bool) -> dict[str, bool]:
    """How a kernel is launched; the interpreter knows no such word."""
    return {"launch_pdl": True} if early else {}


@cache
def _kernels() -> Any:
    from ttspec.models import fused_kernels  # Triton is there only where torch can use a GPU

    return fused_kernels
