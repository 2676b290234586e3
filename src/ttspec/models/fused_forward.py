"""Dense targets on a GPU: a forward of few tokens as six kernels a layer, of more as nine.

Of more than 32, products are the device's own, which are quick once a matrix serves many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ttspec.fused import LONGEST, MANY, MANY_WIDE, WIDEST, Heads, attention, fits, gated, normed
from ttspec.models.layers import MergedLinear
from ttspec.products import MOST, Products, Scaled, is_wide
from ttspec.rowcache import RowCache
from ttspec.spans import is_batch_invariant

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Of transformers; by name, since to import them takes time."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds whose angles depend on the position alone."""


class FusedForward:
    """A model's forward for few tokens, from the weights that it has."""

    def __init__(
        self,
        model: PreTrainedModel,
        merged: list[list[MergedLinear]],
        windows: tuple[int | None, ...],
    ) -> None:
        """`merged`: of each layer its projections q, k, v and gate, up."""
        self.model: Any = model
        self.layers = list(model.model.layers)  # type: ignore[union-attr,arg-type]
        self.merged = merged
        self.windows = windows
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}
        self.eps: float = model.config.rms_norm_eps
        self.products = Products(self.eps, model.device)
        self.heads = [self._heads(layer.self_attn) for layer in self.layers]

    def takes(self, cache: RowCache, tokens: Tensor) -> bool:
        """Whether tokens [B, T] are few enough, and the cache was made."""
        most = MANY if self.model.config.hidden_size <= WIDEST else MANY_WIDE
        few = tokens.numel() <= most and tokens.shape[1] <= LONGEST
        return few and len(cache.keys) == len(self.layers) and not is_batch_invariant()

    def __call__(
        self,
        cache: RowCache,
        tokens: Tensor,
        start: Tensor,
        taps: tuple[int, ...],
        logits: int | Tensor | None,
        subset: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """As `Target.forward`."""
        rows, width = tokens.shape
        angles = self._angles(cache.slots)
        table = self.model.model.embed_tokens.weight
        # Of 4 to 16 tokens torch's embedding takes 3 to 7 us, an index 1.4; of one 1.6 and 2.6.
        x = F.embedding(tokens, table) if tokens.numel() == 1 else table[tokens]
        x = x.view(rows * width, -1)
        context = cache, start, angles, subset
        norm, head = self.model.model.norm, self.model.lm_head
        states, scaled = self._few(x, *context) if len(x) <= MOST else self._many(x, *context)
        x = states[-1]
        if {-1, len(self.layers)} & set(taps):
            states[-1] = norm(x)
        features = [states[i].view(rows, width, -1) for i in taps]
        read = torch.cat(features, dim=-1) if taps else x.new_empty(rows, width, 0)
        if isinstance(logits, Tensor):
            x, scaled = x.view(rows, width, -1)[:, logits].flatten(0, 1), None
        elif logits == 0:
            return None, read
        elif logits is not None and logits < width:
            x = x.view(rows, width, -1)[:, -logits:].flatten(0, 1).contiguous()
        if scaled is not None and is_wide(head.weight) and logits in (None, width):
            out = self.products.plain(scaled, head.weight, bias=head.bias)
        else:
            out = head(normed(x, norm.weight, self.eps)[1])
        return out.view(rows, -1, out.shape[-1]), read

    def _few(self, x: Tensor, *context: Any) -> tuple[list[Tensor], Scaled]:
        """The states [tokens, H] before each layer and after the last; and the last, scaled."""
        states, products = [x], self.products
        gains = [layer.input_layernorm.weight for layer in self.layers]
        gains.append(self.model.model.norm.weight)
        scaled = products.scaled(x, gains[0])
        for index, (layer, (qkv, mlp)) in enumerate(self._parts()):
            made = products.plain(scaled, qkv.weight, bias=qkv.bias)
            seen = self._attention(index, made, *context)
            out, gain = layer.self_attn.o_proj, layer.post_attention_layernorm.weight
            x, scaled = products.added(seen, out.weight, x, gain, out.bias)
            inner = products.gated(scaled, *mlp.weight.chunk(2))
            x, scaled = products.added(inner, layer.mlp.down_proj.weight, x, gains[index + 1])
            states.append(x)
        return states, scaled

    def _many(self, x: Tensor, *context: Any) -> tuple[list[Tensor], None]:
        """The same of more tokens than the kernels of few are for; and None."""
        states, more, eps = list[Tensor](), None, self.eps
        for index, (layer, (qkv, mlp)) in enumerate(self._parts()):
            x, z = normed(x, layer.input_layernorm.weight, eps, more)
            states.append(x)
            seen = self._attention(index, F.linear(z, qkv.weight, qkv.bias), *context)
            more, gain = layer.self_attn.o_proj(seen), layer.post_attention_layernorm.weight
            x, z = normed(x, gain, eps, more)
            more = layer.mlp.down_proj(gated(F.linear(z, mlp.weight)))
        return [*states, x if more is None else x + more], None

    def _parts(self) -> Iterator[tuple[Any, list[MergedLinear]]]:
        """Each layer, and its merged projections."""
        return zip(self.layers, self.merged, strict=True)

    def _attention(
        self,
        index: int,
        made: Tensor,
        cache: RowCache,
        start: Tensor,
        angles: tuple[Tensor, Tensor],
        subset: Tensor | None,
    ) -> Tensor:
        context = cache.keys[index], cache.values[index], start, angles, self.heads[index]
        return attention(made, *context, subset=subset, window=self.windows[index])

    def _heads(self, module: Any) -> Heads:
        query, key = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        return Heads(
            count=self.model.config.num_attention_heads,
            kv_count=self.model.config.num_key_value_heads,
            size=module.head_dim,
            scale=module.scaling,
            eps=self.eps,
            query_gain=None if query is None else query.weight,
            key_gain=None if key is None else key.weight,
        )

    def _angles(self, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [slots, head size / 2]."""
        if slots not in self.angles:
            like = self.model.model.embed_tokens.weight[:1, None]
            position = torch.arange(slots, device=like.device)[None]
            halves = self.model.model.rotary_emb(like, position)
            size = self.heads[0].size // 2
            cosine, sine = (half[0, :, :size].contiguous() for half in halves)
            self.angles[slots] = cosine, sine
        return self.angles[slots]


def fits_model(model: PreTrainedModel, windows: tuple[int | None, ...]) -> bool:
    """Whether a model's layers are of the kind that these kernels do."""
    config: Any = model.config
    kind = type(model)
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers."):
        return False
    if 0 in windows or config.rope_parameters.get("rope_type") not in ROTARY:
        return False
    layer: Any = model.model.layers[0]  # type: ignore[union-attr,index]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    plain = all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in linears)
    bare = layer.mlp.gate_proj.bias is None and layer.mlp.down_proj.bias is None
    return (
        plain
        and bare
        and fits(
            model.get_input_embeddings().weight,  # type: ignore[arg-type]
            hidden=config.hidden_size,
            head_size=layer.self_attn.head_dim,
            widths=[m.in_features for m in linears],
            activation=config.hidden_act,
        )
    )
