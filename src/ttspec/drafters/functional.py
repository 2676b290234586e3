"""A transformers model as a function of its weights: one set for all rows, or one per row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.context import FeatureState, empty_context, feature_ring
from ttspec.drafters.layers import Weights, low_rank, product
from ttspec.drafters.rotary import DEFAULT_BASE, Rope, rope_parameters
from ttspec.errors import OptionError
from ttspec.models.attention import NAME as FOLDED
from ttspec.models.attention import use_folded_attention
from ttspec.models.target import cache_keyword
from ttspec.models.unsupported import attention_windows, last_position
from ttspec.rowcache import LayerCache

Module = TypeVar("Module", bound=torch.nn.Module)
Masks = dict[int | None, Tensor]
"""What each token sees, by the window of a layer: bool [B, 1, N, S], or spans [B, 1, N, 2]."""
_CALLING = Lock()
"""Threads take turns: `functional_call` puts the weights into the module for as long as it runs."""


class Projection(torch.nn.Linear):
    """A matrix of the model, which may have a low-rank change, of all rows or of each."""

    down: Tensor
    up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """X [B, ..., in] -> [B, ..., out]; or all tokens of all rows in one, beside experts."""
        y = product(input, self.weight, self.bias)
        if not self.down.numel():
            return y
        if input.dim() == 2 and self.down.dim() == 3:
            rows = len(self.down)
            x = input.unflatten(0, (rows, -1))
            return low_rank(y.unflatten(0, (rows, -1)), x, self.down, self.up).flatten(0, 1)
        return low_rank(y, input, self.down, self.up)


def functional_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose own parameters are never used."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # no_init_weights leaves it out
    use_folded_attention(model)
    return as_function(model)


def as_function(model: Module) -> Module:
    """The same without parameters of its own; its matrices may have low-rank changes."""
    for module in list(model.modules()):
        if type(module) is torch.nn.Linear:
            module.__class__ = Projection
            for part in ("down", "up"):  # none; `functional_call` puts rows' own here
                module.register_buffer(part, torch.empty(0, 0, 0), persistent=False)
    for parameter in model.parameters():  # its name and dimensions are asked, no more
        parameter.data = parameter.data.new_empty([0] * parameter.dim())
    return model.eval().requires_grad_(False)


def call_with(module: torch.nn.Module, weights: Weights, *args: Any, **given: Any) -> Any:
    """What a module says with these weights in place of its own, in any thread."""
    with _CALLING:
        return functional_call(module, dict(weights), args, given)


@dataclass(slots=True)
class FunctionalState(FeatureState):
    """The context of a drafter that transformers computes."""

    anchor: Weights
    """The drafter's own, of published shapes."""
    takes_spans: bool
    """Whether the model's attention can be told what is seen from slot to slot."""

    @property
    def spans(self) -> bool:
        """As for every drafter; and `vmap` over rows' own weights cannot write in place."""
        own = self.keys.shape[1] > 1 and any(
            w.dim() > self.anchor[n].dim() for n, w in self.weights.items() if n in self.anchor
        )
        return self.takes_spans and not self.options.rebase and not own


class FunctionalDrafter(Drafter):
    """A drafter that transformers computes: its rotation and its low-rank changes."""

    model_config: Any
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    """Of values; None is `head_dim`."""

    @cached_property
    @abstractmethod
    def module(self) -> Any:
        """The model, made by `as_function`; its own parameters are never used."""

    @cached_property
    def function(self) -> ModelFunction:
        """The model as a function of its weights."""
        return ModelFunction(self.module)

    def _place_module(self, device: torch.device) -> None:
        """Make the module anew: one that a copy of this drafter calls stays where it is."""
        for name in ("module", "function"):
            vars(self).pop(name, None)
        self.module.to(device)

    def _read_rope(self) -> None:
        """Say what the rotary base is; the model rotates by itself."""
        text = self.model_config.get_text_config().to_dict()
        base = rope_parameters(text).get("rope_theta") or DEFAULT_BASE
        self._plain_rope = Rope.of({"rope_theta": base}, 2)
        self._ropes: dict[tuple[DraftConfig, torch.device], Rope] = {}
        self.interpretation["rope base"] = f"{self._plain_rope.base:g}"

    def _context(self, rows: int, slots: int, options: DraftConfig, width: int) -> dict[str, Any]:
        """The fields of an empty `FunctionalState`, with features of this width."""
        like = self.embedding
        known = options, like.device  # a forecast starts on meta
        if known not in self._ropes:  # kept: where this is captured nothing comes from the host
            self._ropes[known] = self._rope(options).to(like.device)
        folded = self.module.config._attn_implementation == FOLDED
        return {
            "weights": self.weights,
            "options": options,
            "rope": self._ropes[known],
            "anchor": self.weights,
            "takes_spans": folded and self.value_dim in (None, self.head_dim),
            **empty_context(
                self.layers, rows, self.kv_heads, slots, self.head_dim, like, self.value_dim
            ),
            **feature_ring(rows, width, like),
        }

    def _rope(self, options: DraftConfig) -> Rope:
        """The model's rotation where positions are changed; else it is not looked at."""
        if not options.rope_base and not options.rebase:
            return self._plain_rope
        text = self.model_config.get_text_config().to_dict()
        if self.value_dim in (None, self.head_dim):  # else only the end of a key is rotated
            with suppress(KeyError, TypeError, ValueError):
                rope = Rope.of(text, self.head_dim, options.rope_base)
                if self.function.rope_buffers(rope):
                    return rope
        raise OptionError(
            f"Drafter {self.name} has no rotary embedding that ttspec knows: rope_base and rebase "
            "are not possible.\nUse draft.window instead."
        )

    def with_rope(self, state: FunctionalState, weights: Weights) -> Weights:
        """Weights, and rotary frequencies where they were overridden."""
        override = state.options.rope_base
        return {**weights, **self.function.rope_buffers(state.rope)} if override else weights

    def plain_matrices(self) -> set[str]:
        """Matrices that can have low-rank changes: transformers lays out some otherwise."""
        return {n for n, m in self.module.named_modules() if isinstance(m, Projection)}


class ConcatenatedCache(Cache):
    """Old keys and values as they are, with which new ones are concatenated; nothing is written."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Context [layers, B, kv heads, S, D]."""
        super().__init__(layers=[])
        self._keys, self._values = keys, values
        self.new_keys: list[Tensor] = []
        self.new_values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Keep the new [B, kv heads, N, D]; return the context and them."""
        self.new_keys.append(key_states)
        self.new_values.append(value_states)
        keys = torch.cat([self._keys[layer_idx], key_states], dim=2)
        return keys, torch.cat([self._values[layer_idx], value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """0: positions and masks are always given explicitly."""
        return 0


class InPlaceCache(Cache):
    """Old keys and values, into which new ones are written where they belong."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        super().__init__(layers=[])
        self._layers = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """See `LayerCache.update`."""
        return self._layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """0: positions and masks are always given explicitly."""
        return 0


class ModelInputs(NamedTuple):
    """N new tokens of B rows that a model reads at once."""

    inputs: dict[str, Tensor]
    """[B, N, ...], by the model's own names."""
    position: Tensor
    """int64 [B, N]."""
    masks: Masks
    keep: int = 0
    """Logits of so many last tokens; 0 is all."""

    def at(self, index: Any) -> ModelInputs:
        """Of every tensor what is at this index."""
        inputs = {n: x[index] for n, x in self.inputs.items()}
        masks = {window: mask[index] for window, mask in self.masks.items()}
        return ModelInputs(inputs, self.position[index], masks, self.keep)


class ModelFunction:
    """Calls a model with weights by its own names; others are left out."""

    def __init__(self, model: Any, windows: tuple[int | None, ...] | None = None) -> None:
        """Made by `functional_model`; `windows` of its layers are by default the config's."""
        self.model = model
        self.windows = attention_windows(model.config) if windows is None else windows
        named = [*model.named_parameters(), *model.named_buffers()]
        self._dims = {n: p.dim() for n, p in named}

    def __call__(self, weights: Weights, fed: ModelInputs, cache: Cache) -> Tensor:
        """Logits [B, N or `keep`, V] of new tokens, whose keys and values the cache takes.

        Weights of one row's own have that row's dimension, of size 1, or none.
        """
        named, _ = self._own(weights, one=True)
        return self._call(named, fed, cache)

    def concatenated(
        self, weights: Weights, fed: ModelInputs, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with context keys and values [layers, B, kv heads, S, D]; returns new ones too.

        One call of the model, or one per row side by side where rows have their own weights.
        """
        named, own = self._own(weights, one=len(fed.position) == 1)
        if not own:
            return self._beside(named, fed, keys, values)
        return self._rows_apart(named, own, fed, keys, values)

    def _own(self, weights: Weights, *, one: bool) -> tuple[Weights, set[str]]:
        """The model's weights, and which of them are one per row: with `one` row none is."""
        named = {n: w for n, w in weights.items() if n in self._dims}
        own = {n for n, w in named.items() if w.dim() > self._dims[n]}
        if one:
            return {n: w[0] if n in own else w for n, w in named.items()}, set()
        return named, own

    def _beside(
        self, named: Weights, fed: ModelInputs, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`concatenated` with one set of weights."""
        cache = ConcatenatedCache(keys, values)
        logits = self._call(named, fed, cache)
        return logits, torch.stack(cache.new_keys), torch.stack(cache.new_values)

    def _rows_apart(
        self, named: Weights, own: set[str], fed: ModelInputs, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`concatenated` with weights of which some, `own`, are one per row."""
        dims: Any = {n: 0 if n in own else None for n in named}, ModelInputs(0, 0, 0, None), 1, 1  # type: ignore[arg-type]
        # A row is a batch of one. The fused kernels have no rule for rows' own batches.
        alone = fed.at((slice(None), None)), keys[:, :, None], values[:, :, None]
        with sdpa_kernel(SDPBackend.MATH):
            logits, k, v = vmap(self._beside, dims, (0, 1, 1))(named, *alone)
        return logits[:, 0], k[:, :, 0], v[:, :, 0]

    def hidden(self, weights: Weights, ids: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """What the head reads [N, R, H] of whole sequences; see `Causal.training_forward`."""
        given = {
            "input_ids": ids,
            "position_ids": position,
            "attention_mask": seen[:, None],
            "use_cache": False,
            "output_hidden_states": True,
            "logits_to_keep": 1,
        }
        out = call_with(self.model, weights, **given)
        return out.hidden_states[-1]  # after the final norm

    def rope_buffers(self, rope: Rope) -> dict[str, Tensor]:
        """The model's rotary frequencies, to be replaced by others; empty if they do not fit."""
        found = {n: b for n, b in self.model.named_buffers() if n.endswith("rotary_emb.inv_freq")}
        fits = all(b.shape == rope.frequencies.shape for b in found.values())
        return dict.fromkeys(found, rope.frequencies) if fits else {}

    def _call(self, named: Weights, fed: ModelInputs, cache: Cache) -> Tensor:
        mask: Any = fed.masks[self.windows[0]]
        if len(fed.masks) > 1:
            types = self.model.config.get_text_config().layer_types
            mask = {kind: fed.masks[w] for kind, w in zip(types, self.windows, strict=True)}
        given = {
            **fed.inputs,
            "position_ids": fed.position.clamp(0, last_position(self.model.config)),
            "attention_mask": mask,
            cache_keyword(self.model): cache,
            "use_cache": True,
            "logits_to_keep": fed.keep,
        }
        return call_with(self.model, named, **given).logits
