"""A Hugging Face causal LM made verifiable: many tokens a row, rows of different lengths, features.

The model's own code runs. What is ours is the cache, the mask and the positions. This file does
not know drafters, sampling or text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.compiled import is_compiling
from ttspec.errors import TargetError
from ttspec.models.attention import NAME as FOLDED
from ttspec.models.attention import use_folded_attention
from ttspec.models.experts import asks_host
from ttspec.models.fixed_rotary import fix_rotary
from ttspec.models.fused_forward import FusedForward, fits_model
from ttspec.models.generation_config import sampling_defaults
from ttspec.models.layers import MergedLinear, compiled_layers, merge_linears
from ttspec.models.loading import DeviceMap, Files, open_files
from ttspec.models.packed import pack_linears
from ttspec.models.quantised import stored_nbytes
from ttspec.models.recurrent import StateCache, use_states
from ttspec.models.source import Source, resolve
from ttspec.models.unsupported import (
    attention_windows,
    last_position,
    refuse_generation,
    refuse_model,
)
from ttspec.rowcache import INVARIANT_STEP, STEP, RowCache, causal_mask, reach_of
from ttspec.spans import has_kernel, is_batch_invariant
from ttspec.spans import spans as spans_of


@dataclass(slots=True)
class Target:
    """The model that defines the output. Make one with `load_target` or `wrap_target`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path | None
    origin: str
    context: int
    """Positions the model was made for."""
    ends: tuple[int, ...]
    """End tokens."""
    defaults: dict[str, Any]
    """Sampling defaults by field of `SamplingConfig`, from generation_config.json."""
    windows: tuple[int | None, ...]
    """Attention window of each layer; None sees everything, 0 is a recurrent layer's."""
    taps: tuple[int, ...] = ()
    """Which hidden states are features, as indices into the `hidden_states` tuple."""
    _merged: list[list[MergedLinear]] | None = None
    """Projections of each layer, once they were merged."""
    _fused: FusedForward | None = None
    """Its forward of few tokens by fused kernels, if these do it."""

    @property
    def device(self) -> torch.device:
        """Where tokens are read: that of the embedding, where layers are spread over several."""
        return self.embedding.device

    @property
    def is_split(self) -> bool:
        """Whether its layers are on several devices."""
        places = getattr(self.model, "hf_device_map", None) or {}
        return len({str(place) for place in places.values()}) > 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take, with those that lie there packed as well."""
        parts = chain(self.model.parameters(), self.model.buffers())
        return sum(map(stored_nbytes, parts))

    @property
    def recurrent(self) -> bool:
        """Whether it has layers whose state goes back no further than the last round."""
        return 0 in self.windows

    @property
    def is_mixture(self) -> bool:
        """Whether its layers choose among experts."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return any(getattr(self.config, name, None) for name in names)

    @property
    def can_capture(self) -> bool:
        """Whether a captured graph can hold its forward: it is on one GPU, and asks no host."""
        return not (self.is_split or (self.is_mixture and asks_host(self.model)))

    @property
    def reads_spans(self) -> bool:
        """Whether its attention reads no more than is seen, told from slot to slot."""
        return self.model.config._attn_implementation == FOLDED and has_kernel(self.dtype)

    @property
    def config(self) -> Any:
        """The text model's transformers config."""
        return self.model.config.get_text_config()

    @property
    def embedding(self) -> Tensor:
        """The raw embedding table [V, H]."""
        return self.model.get_input_embeddings().weight  # type: ignore[return-value]

    @property
    def head(self) -> Tensor:
        """The output head [V, H]; of a split target a copy, where the embedding is."""
        head: Tensor = self.model.get_output_embeddings().weight  # type: ignore[union-attr,assignment]
        return head.to(self.device)

    def cache(self, rows: int, slots: int, width: int = 1) -> RowCache:
        """An empty cache; `width` is the most tokens that are read at a time without `counts`."""
        return StateCache(rows, slots, width) if self.recurrent else RowCache(rows, slots)

    @torch.no_grad()
    def forward(
        self,
        cache: RowCache,
        tokens: Tensor,
        start: Tensor,
        longest: int,
        *,
        subset: Tensor | None = None,
        counts: Tensor | None = None,
        logits: int | Tensor | None = None,
        spans: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Read tokens at their rows' positions; write their keys and values.

        Recurrent layers begin at 0, where the last forward's tokens end, or within these if they
        were read without `counts`. A row whose start is past all slots stays as it is.

        Args:
            cache: Where keys and values go; nothing below `start` is changed.
            tokens: int64 [B, T].
            start: int64 [B], position of each row's first token.
            longest: The largest start, known on the host.
            subset: int64 [B], the cache rows that are fed; None is all.
            counts: int64 [B], how many of each row's tokens are text, the rest padding; None where
                the next forward's start will say how many were.
            logits: Of so many last tokens, or of those in these columns, int64 [N]; 0 skips the
                head, None is all T.
            spans: Say what is seen from slot to slot, on the device, instead of by a mask. Needs
                `reads_spans`, and a `longest` of all slots.

        Returns:
            logits [B, T, V] (None when skipped) and features [B, T, W], W = taps x hidden size.
        """
        compiles = False
        if spans and hasattr(self.model.base_model, "layers"):
            # Recurrent layers read text in pieces: each number of them would be compiled.
            compiles = is_compiling() and not (self.recurrent and counts is not None)
            self._merge_layers(compiles)
            if self._fused and self._fused.takes(cache, tokens):
                return self._fused(cache, tokens, start, self.taps, logits, subset)
        step = INVARIANT_STEP if is_batch_invariant() else STEP
        reach = reach_of(longest + tokens.shape[1], cache.slots, step)
        position = start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        cache.set_slots(position, reach, subset, counts)
        mask = self._mask(position, reach, cache.slots, spans=spans)
        if (last := last_position(self.config)) is not None:
            position = position.clamp(max=last)  # what is past all slots is dead, and in no table
        needs_head = isinstance(logits, Tensor) or logits != 0
        model = self.model if needs_head else self.model.base_model
        keyword, keep = cache_keyword(model), dict[str, Any]()
        if needs_head and logits is not None and _keeps_logits(type(model)):
            keep = {"logits_to_keep": logits}
        layers: Any = nullcontext()
        if compiles:
            assert self._merged is not None
            layers = compiled_layers(self.model.base_model, self._merged, cache, keyword)
        with layers:
            out = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                output_hidden_states=bool(self.taps),
                **keep,
                **{keyword: cache},
            )
        features = tokens.new_empty(*tokens.shape, 0, dtype=self.dtype)
        if self.taps:  # of a split target each is where its layer is
            states = [out.hidden_states[i].to(tokens.device) for i in self.taps]
            features = torch.cat(states, dim=-1)
        if not needs_head:
            return None, features
        found = out.logits
        if not keep and logits is not None:
            found = found[:, logits if isinstance(logits, Tensor) else slice(-logits, None)]
        return found.to(tokens.device), features

    def _merge_layers(self, compiles: bool) -> None:
        """Merge projections of all layers, once: for layers as fused kernels, or compiled."""
        if self._merged is not None:
            return
        fits = fits_model(self.model, self.windows)
        if compiles or fits:
            layers = self.model.base_model.layers
            self._merged = [merge_linears(layer) for layer in layers]  # type: ignore[union-attr]
        if fits and self._merged:
            self._fused = FusedForward(self.model, self._merged, self.windows)

    def _mask(self, position: Tensor, reach: int, slots: int, *, spans: bool) -> Any:
        """What is seen from positions int64 [B, T]: a tensor, or one for each kind of layer."""
        windows = set(self.windows) - {0}
        if spans:
            masks = {w: self._spans(position, slots, w) for w in windows}
        else:
            masks = {w: causal_mask(position, reach, w) for w in windows}
            # Eager attention adds its mask to the scores; so does torch's on a CPU, which would
            # make a boolean one into such a mask in every layer.
            kind = self.model.config._attn_implementation
            if kind == "eager" or self.device.type == "cpu":
                low = torch.finfo(self.dtype).min
                blank = {w: torch.zeros_like(m, dtype=self.dtype) for w, m in masks.items()}
                masks = {w: blank[w].masked_fill_(~m, low) for w, m in masks.items()}
        if not self.recurrent and len(masks) == 1:
            return masks[self.windows[0]]
        kinds = zip(self.config.layer_types, self.windows, strict=True)
        return {kind: masks.get(window) for kind, window in kinds}

    @staticmethod
    def _spans(position: Tensor, slots: int, window: int | None) -> Tensor:
        first = torch.zeros_like(position) if window is None else position - window + 1
        return spans_of(first, position.clamp(max=slots - 1), position[:, 0] >= slots)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole sequences without a cache, for training.

        Args:
            tokens: int64 [N, L], padded on the right.

        Returns:
            features [N, L, W], and what the head reads [N, L, H].
        """
        out = self.model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True)
        states = [state.to(tokens.device) for state in out.hidden_states]
        last = out.last_hidden_state.to(tokens.device)  # after the final norm
        return torch.cat([last[..., :0], *(states[i] for i in self.taps)], dim=-1), last

    @torch.no_grad()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """What the head says of what it reads [..., H]: logits [..., V]."""
        states = hidden.reshape(1, -1, hidden.shape[-1])
        tokens = states.new_zeros(states.shape[:2], dtype=torch.long)
        # The model's own code, since some scale or cap what the head says; some ask the decoder.
        below = {id(m): m for m in (self.model.base_model, self.model.get_decoder())}.values()
        for module in below:
            module.forward = lambda *_, **__: _Read(states)
        try:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for module in below:
                del module.forward
        return logits.view(*hidden.shape[:-1], logits.shape[-1]).to(hidden.device)


class _Read:
    """What a base model returns, with states that were read before."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, _: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, _: str) -> None:
        return None


def load_target(
    name: str | Files,
    *,
    device: torch.device,
    dtype: torch.dtype,
    device_map: DeviceMap | None = None,
    notify: Callable[[str], None] | None = None,
) -> Target:
    """Load a target by built-in name, local folder, GGUF file or hub id, or from `find_target`.

    Raises:
        TargetError: It cannot be found, read, or verified by this package.
        ResourceError: It had to be fetched and could not be, or a package or memory is missing.
        OptionError: It cannot be spread as `device_map` says.
    """
    files = name if isinstance(name, Files) else find_target(name, notify)
    model, tokenizer = files.load(device, dtype, device_map)
    use_folded_attention(model)
    pack_linears(model)
    return wrap_target(model, tokenizer, source=files.source)


def find_target(name: str, notify: Callable[[str], None] | None = None) -> Files:
    """A target's files, of a kind that can be verified; no weight is read yet.

    Raises:
        TargetError, ResourceError: As `load_target`.
    """
    files = open_files(resolve(name, notify=notify))
    attention_windows(files.config, states=True)
    return files


def wrap_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, source: Source | None = None
) -> Target:
    """A target from a model and tokenizer that are loaded already.

    Raises:
        TargetError: The model's attention, vocabulary or generation config is not supported.
    """
    config = model.config.get_text_config()
    windows = attention_windows(model.config, states=True)
    refuse_model(model, windows)
    fix_rotary(model)
    use_states(model, [i for i, window in enumerate(windows) if window == 0])
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager", FOLDED):
        raise TargetError(
            f"The target's attention is {kind}; rows of different lengths need sdpa or eager.\n"
            'Load the model with attn_implementation="sdpa".'
        )
    model.eval().requires_grad_(False)
    generation = model.generation_config or GenerationConfig()
    refuse_generation(generation)
    defaults = sampling_defaults(generation, int(config.vocab_size))
    ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    ends = set(ends if isinstance(ends, Sequence) else [] if ends is None else [ends])
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)  # type: ignore[arg-type]
    if len(tokenizer) > config.vocab_size:
        raise TargetError(
            f"The tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}.\n"
            "Give the tokenizer that the model was trained with."
        )
    return Target(
        model=model,
        tokenizer=tokenizer,
        name=source.name if source else getattr(config, "_name_or_path", "") or "model",
        path=source.path if source else None,
        origin=source.origin if source else "given",
        context=int(config.max_position_embeddings),
        ends=tuple(sorted(ends)),
        defaults=defaults,
        windows=windows,
    )


def cache_keyword(model: torch.nn.Module) -> str:
    """What a model's forward calls its cache: transformers 5.24 renamed it."""
    return _cache_keyword(type(model))


@functools.cache
def _keeps_logits(kind: type[torch.nn.Module]) -> bool:
    return "logits_to_keep" in signature(kind.forward).parameters


@functools.cache
def _cache_keyword(kind: type[torch.nn.Module]) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"
