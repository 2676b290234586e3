"""A plain draft model: any transformers causal LM with the target's vocabulary, or part of it.

The model's own code runs, with the weights it is given: one set for all rows, or one per row.
Keys and values of the context are read from our cache and joined to those of the new tokens. The
last few committed tokens are fed again in every round, so nothing has to remember which of them
were drafts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import (
    BEHIND,
    Choose,
    Drafter,
    DraftState,
    FeatureState,
    Shapes,
    feature_ring,
    placed,
)
from ttspec.drafters.layers import Rope, Weights, low_rank, rebased
from ttspec.drafters.vocabulary import LEAST_SHARED, Shared, common, padded
from ttspec.errors import CheckpointError, OptionError
from ttspec.models.attention import NAME as FOLDED
from ttspec.models.attention import use_folded_attention
from ttspec.models.target import attention_windows, cache_keyword
from ttspec.records import Lesson, Proposal, Verification
from ttspec.rowcache import Beside, InPlace, reach_of, unwritten
from ttspec.spans import reach_to_see, spans

AT_ONCE = 512
"""Tokens read at once where many were left unread."""


@dataclass(slots=True)
class CausalState(FeatureState):
    """The rows' tokens, in the drafter's own vocabulary, and their keys and values."""

    tokens: Tensor
    """int64 [B, slots + 1]; the last slot takes what falls outside."""
    keys: Tensor
    """[layers, B, kv heads, slots + 1, head size], rotated."""
    values: Tensor
    rope: Rope | None
    """Rotation, where it was overridden or is needed to re-base positions."""
    anchor: Weights
    """The drafter's own, of published shapes."""
    folded: bool
    """Whether the model's attention can be told what is seen from slot to slot."""

    def write(self, tokens: Tensor, position: Tensor, row: Tensor) -> None:
        """Put tokens [B, T] at their positions."""
        self.tokens[row[:, None], position.clamp(max=self.slots)] = tokens

    @property
    def spans(self) -> bool:
        """Re-based keys are not read where they lie; `vmap` over rows' own weights reads a mask."""
        own = len(self.tokens) > 1 and any(
            w.dim() > self.anchor[n].dim() for n, w in self.weights.items() if n in self.anchor
        )
        return self.folded and not self.options.rebase and not own

    def store(self, keys: Tensor, values: Tensor, position: Tensor, row: Tensor) -> None:
        """Put keys and values [layers, B, kv heads, T, D] at their positions, if they are slots."""
        slot = position.masked_fill((position < 0) | (position >= self.slots), self.slots)
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[:, row[:, None], :, slot] = new.permute(1, 3, 0, 2, 4)


class Projection(torch.nn.Linear):
    """A matrix of the model, which may have a low-rank change, of all rows or of each."""

    down: Tensor
    up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """X [B, ..., in] -> [B, ..., out]."""
        y = super().forward(input)
        return low_rank(y, input, self.down, self.up) if self.down.numel() else y


class Causal(Drafter):
    """A draft model from its config.json and its weights by transformers' names."""

    kind = "causal"
    learning_rate = 3e-5

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, Tensor],
        *,
        name: str = "causal",
        path: Path | None = None,
        names: Collection[str] = (),
    ) -> None:
        """Read a transformers config; `names` are the tensors that the files hold."""
        self.config, self.weights, self.name, self.path = config, weights, name, path
        self._names = names
        own = {k: v for k, v in config.items() if k not in ("ttspec", "auto_map")}
        self.model_config = CONFIG_MAPPING[own["model_type"]].from_dict(own)
        text = self.model_config.get_text_config()
        self.layers = int(text.num_hidden_layers)
        self.kv_heads = int(getattr(text, "num_key_value_heads", 0) or text.num_attention_heads)
        self.head_dim = int(
            getattr(text, "head_dim", 0) or text.hidden_size // text.num_attention_heads
        )
        self.windows = attention_windows(self.model_config)
        self.rebuilt = set((config.get("ttspec") or {}).get("rebuilt") or [])
        self.length = int((config.get("ttspec") or {}).get("length") or self.default_length)
        self.facts = {"rope base": f"{Rope.of(config, self.head_dim).base:g}"}
        self._shared = Shared()
        self.embedding = torch.empty(0)

    default_length = 5
    """Drafts a round where the config says nothing."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """The transformers model; its own parameters are never used."""
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(self.model_config)
        model.tie_weights()  # no_init_weights leaves it out
        for module in list(model.modules()):
            if type(module) is torch.nn.Linear:
                module.__class__ = Projection
                for part in ("down", "up"):  # none; `functional_call` puts rows' own here
                    module.register_buffer(part, torch.empty(0, 0, 0), persistent=False)
        use_folded_attention(model)
        return model.eval().requires_grad_(False)

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.model_config)
        return {n: tuple(p.shape) for n, p in model.named_parameters() if n not in self.rebuilt}

    def optional(self) -> list[Shapes]:
        """A tied head may be in the files all the same."""
        text = self.model_config.get_text_config()
        return [{"lm_head.weight": (text.vocab_size, text.hidden_size)}]

    def bind(
        self,
        embedding: Tensor,
        head: Tensor,
        layers: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Receive the target's embedding, head and tokenizer; map vocabularies.

        Raises:
            CheckpointError: The vocabularies have too little in common.
        """
        self._bind_taps(layers)
        self.embedding = embedding
        tables = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
        for name in self.rebuilt:  # bit copies of the target's
            width = self.model_config.get_text_config().hidden_size
            self._require("hidden size", width, embedding.shape[1])
            self.weights[name] = tables[name]
        if self.model_config.tie_word_embeddings:
            self.weights.pop("lm_head.weight", None)
        self.weights = placed(self.weights, embedding)
        torch.nn.Module.to(self.model, embedding.device)
        ours = int(self.model_config.get_text_config().vocab_size)
        own = self._tokenizer()
        if own is None:
            self._require("vocabulary", ours, embedding.shape[0])
        if own is None or tokenizer is None or own.get_vocab() == tokenizer.get_vocab():
            shared = padded(embedding.shape[0], ours)
        else:
            shared = common(embedding.shape[0], ours, tokenizer, own)
            self.facts["vocabulary"] = f"{shared.share:.0%} of the target's tokens are its own too"
            if shared.share < LEAST_SHARED:
                raise CheckpointError(
                    f"Drafter {self.name} knows only {shared.share:.0%} of the target's tokens.\n"
                    "Give a draft model with the target's tokenizer."
                )
        self._shared = shared.on(embedding.device, embedding.shape[0], ours)
        self.draft_ids = self._shared.theirs

    def start(self, rows: int, slots: int, options: DraftConfig) -> CausalState:
        """An empty context for `rows` rows, with the anchor weights."""
        shape = (self.layers, rows, self.kv_heads, slots + 1, self.head_dim)
        device = self.embedding.device
        rope = None
        if options.rope_base or options.rebase:
            rope = Rope.of(self.config, self.head_dim, options.rope_base).to(device)
            if not self._rope_buffers(rope):
                raise OptionError(
                    f"Drafter {self.name} has no rotary embedding that ttspec knows: rope_base and "
                    "rebase are not possible.\nUse draft.window instead."
                )
        return CausalState(
            weights=self.weights,
            options=options,
            slots=slots,
            tokens=torch.zeros(rows, slots + 1, dtype=torch.long, device=device),
            keys=unwritten(shape, self.embedding),
            values=unwritten(shape, self.embedding),
            rope=rope,
            anchor=self.weights,
            folded=self.model.config._attn_implementation == FOLDED,
            **feature_ring(rows, len(self.taps) * self.embedding.shape[1], self.embedding),
        )

    @torch.no_grad()
    def extend(
        self,
        state: DraftState,
        tokens: Tensor,
        features: Tensor,
        start: Tensor,
        subset: Tensor | None = None,
    ) -> None:
        """Read tokens, and those before that may not have been read; see `Drafter.extend`."""
        assert isinstance(state, CausalState)
        row = torch.arange(len(start), device=start.device) if subset is None else subset
        self._note(state, tokens, features, start, row)
        count = self.length + tokens.shape[1]
        position = start[:, None] + torch.arange(-self.length, count - self.length).to(start.device)
        self._read_again(state, position, row, subset)

    def catch_up(self, state: DraftState, start: Tensor, count: int) -> None:
        """Read the last tokens before `start`; see `Drafter.catch_up`."""
        assert isinstance(state, CausalState)
        row = torch.arange(len(start), device=start.device)
        rest = (start >= state.slots)[:, None]
        for begin in range(-count, 0, AT_ONCE):
            piece = torch.arange(begin, min(begin + AT_ONCE, 0), device=start.device)
            position = start[:, None] + piece
            self._read_again(state, position.masked_fill(rest, state.slots), row, None)

    @torch.no_grad()
    def _read_again(
        self, state: CausalState, position: Tensor, row: Tensor, subset: Tensor | None
    ) -> None:
        """Make keys and values of known tokens at position int64 [B, T] of rows int64 [B]."""
        ids = state.tokens[row[:, None], position.clamp(0, state.slots)]
        first = position[:, 0].clamp(min=0)
        first = first.masked_fill(first >= state.slots, 0)  # rows at rest
        reach = reach_of(int(first.max()), state.slots)
        weights = self._live(state, subset)
        before = self._before(state, position, row)
        _, keys, values = self._read(
            state, weights, ids, position, reach, row=subset, keep=1, before=before
        )
        state.store(keys, values, position, row)

    def absorb(self, state: DraftState, verification: Verification) -> None:
        """Note what was verified; it is read when the next tokens are drafted."""
        assert isinstance(state, CausalState)
        v = verification
        row = torch.arange(len(v.start), device=v.start.device)
        self._note(state, v.fed, v.features, v.start, row)

    @torch.no_grad()
    def propose(
        self,
        state: DraftState,
        pending: Tensor,
        start: Tensor,
        count: Tensor,
        length: int,
        longest: int,
        choose: Choose,
    ) -> Proposal:
        """Draft token by token; see `Drafter.propose`."""
        assert isinstance(state, CausalState)
        ids, position = self._last(state, pending, start, length)
        tokens: list[Tensor] = []
        qs: list[Tensor] = []
        for step in range(length):
            logits = self._draft(state, ids, position, start, longest + step, keep=1)
            token, q = choose(logits, step)
            tokens.append(token)
            if q is not None:
                qs.append(q)
            ids, position = self._own(token), start[:, None] + step + 1
        return Proposal(
            tokens=torch.cat(tokens, dim=1), count=count, q=torch.cat(qs, dim=1) if qs else None
        )

    def _replay(
        self,
        state: DraftState,
        lesson: Lesson,
        length: int,
        longest: int,
    ) -> Tensor:
        assert isinstance(state, CausalState)
        ids = self._block_ids(lesson.tokens[..., :length])
        rows, blocks, _ = ids.shape
        offset = torch.arange(length, device=ids.device)
        position = (lesson.start[..., None] + offset).flatten(1)
        begin = lesson.start.repeat_interleave(length, dim=1)
        index = torch.arange(blocks * length, device=ids.device)
        same = (index[:, None] // length == index // length).expand(rows, -1, -1)
        before = None
        if lesson.before is not None:
            before = lesson.before.repeat_interleave(length, dim=1)
        logits, *_ = self._read(
            state,
            state.weights,
            ids.flatten(1),
            position,
            reach_of(longest, state.slots),
            origin=lesson.start[:, 0],
            begin=begin,
            same=same,
            before=before,
        )
        return logits.unflatten(1, (blocks, length))

    def teach(self, ids: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """Read whole sequences, with gradients to all of `weights`.

        Args:
            ids: int64 [N, R].
            position: int64 [N, R].
            seen: bool [N, R, R], what each row attends to.

        Returns:
            [N, R, H], what the head reads.
        """
        out = functional_call(
            self.model,
            self.weights,
            (),
            {
                "input_ids": ids,
                "position_ids": position,
                "attention_mask": seen[:, None],
                "use_cache": False,
                "output_hidden_states": True,
                "logits_to_keep": 1,
            },
        )
        return out.hidden_states[-1]  # after the final norm

    def learnable(self, parameters: str) -> list[str]:
        """All but the tables."""
        tables = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        frozen = {id(m.weight) for m in tables if m is not None}
        names = [n for n, p in self.model.named_parameters() if id(p) not in frozen]
        layers = [n for n in names if ".layers." in n]
        last = [n for n in layers if f".layers.{self.layers - 1}." in n]
        return {
            "full": names,
            "last": [n for n in last if any(p in n for p in BEHIND)],
        }[parameters]

    def matrices(self, parameters: str) -> list[str]:
        """See `Drafter.matrices`; a matrix that transformers lays out otherwise gets no change."""
        plain = {n for n, m in self.model.named_modules() if isinstance(m, Projection)}
        return [n for n in super().matrices(parameters) if n in plain]

    def _block_ids(self, tokens: Tensor) -> Tensor:
        """What is fed to draft a block of target tokens [..., length] again."""
        return self._own(tokens)

    def _before(self, state: CausalState, position: Tensor, row: Tensor) -> Tensor | None:  # noqa: ARG002
        """Features [B, N, W] to read along with tokens at `position`; see `Pard`."""
        return None

    def _note(
        self, state: CausalState, tokens: Tensor, features: Tensor, start: Tensor, row: Tensor
    ) -> None:
        position = start[:, None] + torch.arange(tokens.shape[1], device=start.device)
        state.write(self._own(tokens), position, row)
        state.remember(features, position, row)

    def _last(
        self, state: CausalState, pending: Tensor, start: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """The pending token and the `length` before it, of which some may be unread."""
        position = start[:, None] + torch.arange(-length, 1, device=start.device)
        row = torch.arange(len(start), device=start.device)[:, None]
        ids = state.tokens[row, position.clamp(0, state.slots)]
        ids[:, -1] = self._own(pending)
        return ids, position

    def _draft(
        self,
        state: CausalState,
        ids: Tensor,
        position: Tensor,
        start: Tensor,
        longest: int,
        *,
        keep: int,
        known: int | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """Read tokens [B, N] and keep their keys; logits [B, keep, V_draft] of the last ones.

        `known` is how many of them are tokens, not masks; None is all. `longest` is the host's
        bound of where the last token before `keep` stands.
        """
        row = torch.arange(len(start), device=start.device)
        rest = start >= state.slots  # begins past the last slot and takes no part
        if not state.spans:
            reach = reach_of(longest, state.slots)
            logits, *made = self._read(
                state, state.weights, ids, position, reach, origin=start, keep=keep, before=before
            )
            at = position[:, :known].masked_fill(rest[:, None], state.slots)
            keys, values = (x[..., :known, :] for x in made)  # masks are no context
            state.store(keys, values, at, row)
            return logits
        # What is written past the start is dead after this draft, keys of masks as well.
        outside = (position < 0) | (position >= state.slots) | rest[:, None]
        slot = position.masked_fill(outside, state.slots)
        last = position.clamp(max=state.slots - 1)
        own = state.options.window
        seen = {}
        for w in set(self.windows):
            first = torch.zeros_like(position) if own is None else position - own
            first = first if w is None else first.maximum(position - w + 1)
            seen[w] = spans(first, last, rest)
        reach = reach_to_see(longest + keep, state.keys)
        cache = InPlace(state.keys, state.values, row[:, None], slot, reach)
        buffers = self._rope_buffers(state.rope) if state.options.rope_base else {}
        named, stacked = self._named({**state.weights, **buffers})
        named = {n: w[0] if stacked[n] else w for n, w in named.items()}
        inputs = self._inputs(state.weights, ids, before)
        logits = self._call(named, inputs, position, seen, cache, keep)
        return logits if self._shared.ours is None else logits[..., self._shared.ours]

    def _read(
        self,
        state: CausalState,
        weights: Weights,
        ids: Tensor,
        position: Tensor,
        reach: int,
        *,
        row: Tensor | None = None,
        origin: Tensor | None = None,
        begin: Tensor | None = None,
        same: Tensor | None = None,
        keep: int = 0,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model over N new tokens a row, which see the context and each other.

        Args:
            state: The context.
            weights: One set, or some of them one per row.
            ids: int64 [B, N].
            position: int64 [B, N]; below 0 is padding.
            reach: Slots of the context to read.
            row: int64 [B], the rows meant; None is all.
            origin: int64 [B], from where re-based distances count; None is the first position.
            begin: int64 [B, N]: context slots below it are seen; None is the first position.
            same: bool [B, N, N], which new tokens may see each other; None is all.
            keep: Logits of so many last tokens; 0 is all.
            before: [B, N, W] features to read along; see `Pard`.

        Returns:
            logits [B, keep, V_draft], keys and values [layers, B, kv heads, N, D].
        """
        keys, values = state.keys[:, :, :, :reach], state.values[:, :, :, :reach]
        if row is not None:  # some rows, or all of them in another order
            keys, values = keys[:, row], values[:, row]
        if begin is None:
            begin = position[:, :1].expand_as(position)
        if state.options.rebase:
            assert state.rope is not None
            turned = rebased(
                keys.flatten(0, 1),
                (begin[:, 0] if origin is None else origin)[:, None].repeat(self.layers, 1),
                max(state.options.rebase, self.length),  # what is fed again stays where it is
                state.rope,
            )
            keys = turned.unflatten(0, keys.shape[:2])
        slot = torch.arange(reach, device=ids.device)
        far = (slot < begin[..., None]).expand(-1, -1, reach)
        own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        near = (position[:, None] <= position[..., None]) & (position[:, None] >= 0)
        near = (near if same is None else near & same) | own  # a row that sees nothing is NaN
        distance = torch.cat(
            [position[..., None] - slot, position[..., None] - position[:, None]], -1
        )
        seen = torch.cat([far, near], dim=-1)
        if state.options.window is not None:
            seen = seen & (distance <= state.options.window)
        masks = {
            w: (seen if w is None else seen & (distance < w))[:, None] for w in set(self.windows)
        }
        buffers = self._rope_buffers(state.rope) if state.options.rope_base else {}
        inputs = self._inputs(weights, ids, before)
        return self._run({**weights, **buffers}, inputs, position, masks, keys, values, keep)

    def _inputs(self, weights: Weights, ids: Tensor, before: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002
        """What the model's forward is given for tokens [B, N]."""
        return {"input_ids": ids}

    def _run(
        self,
        weights: Weights,
        inputs: dict[str, Tensor],
        position: Tensor,
        masks: dict[int | None, Tensor],
        keys: Tensor,
        values: Tensor,
        keep: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One call of the model, or one per row side by side where rows have their own weights."""
        named, stacked = self._named(weights)

        def call(
            named: dict[str, Tensor],
            inputs: dict[str, Tensor],
            position: Tensor,
            masks: dict[int | None, Tensor],
            keys: Tensor,
            values: Tensor,
        ) -> tuple[Tensor, Tensor, Tensor]:
            cache = Beside(keys, values)
            logits = self._call(named, inputs, position, masks, cache, keep)
            return logits, torch.stack(cache.new_keys), torch.stack(cache.new_values)

        if not any(stacked.values()):
            logits, k, v = call(named, inputs, position, masks, keys, values)
        elif len(position) == 1:
            named = {n: w[0] if stacked[n] else w for n, w in named.items()}
            logits, k, v = call(named, inputs, position, masks, keys, values)
        else:
            # A row is a batch of one. The fused kernels have no rule for rows' own batches.
            with sdpa_kernel(SDPBackend.MATH):
                rows = ({n: x[:, None] for n, x in inputs.items()}, position[:, None])
                rows += ({w: m[:, None] for w, m in masks.items()}, keys[:, :, None])
                dims = ({n: 0 if s else None for n, s in stacked.items()}, 0, 0, 0, 1, 1)
                logits, k, v = vmap(call, dims, (0, 1, 1))(named, *rows, values[:, :, None])
            logits, k, v = logits[:, 0], k[:, :, 0], v[:, :, 0]
        rows = self._shared.ours
        return (logits if rows is None else logits[..., rows]), k, v

    def _call(
        self,
        named: dict[str, Tensor],
        inputs: dict[str, Tensor],
        position: Tensor,
        masks: dict[int | None, Tensor],
        cache: Cache,
        keep: int,
    ) -> Tensor:
        """The model's own code; logits of the last `keep` tokens, 0 is all."""
        mask: Any = masks[self.windows[0]]
        if len(masks) > 1:
            types = self.model_config.get_text_config().layer_types
            mask = {kind: masks[w] for kind, w in zip(types, self.windows, strict=True)}
        out = functional_call(
            self.model,
            named,
            (),
            {
                **inputs,
                "position_ids": position.clamp(min=0),
                "attention_mask": mask,
                cache_keyword(self.model): cache,
                "use_cache": True,
                "logits_to_keep": keep,
            },
        )
        return out.logits

    def _named(self, weights: Weights) -> tuple[dict[str, Tensor], dict[str, bool]]:
        """What the model takes of some weights, and which of it is one per row."""
        named = {n: w for n, w in weights.items() if n in self._own_names}
        return named, {n: w.dim() > self._own_names[n] for n, w in named.items()}

    @cached_property
    def _own_names(self) -> dict[str, int]:
        """Parameters and buffers of the model, with their number of dimensions."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {n: p.dim() for n, p in named}

    def _rope_buffers(self, rope: Rope | None) -> dict[str, Tensor]:
        """The model's rotary frequencies, to be replaced."""
        if rope is None:
            return {}
        found = {n: b for n, b in self.model.named_buffers() if n.endswith("rotary_emb.inv_freq")}
        fits = [n for n, b in found.items() if b.shape == rope.frequencies.shape]
        return dict.fromkeys(fits, rope.frequencies) if len(fits) == len(found) else {}

    def _own(self, tokens: Tensor) -> Tensor:
        """The target's tokens in the drafter's own vocabulary."""
        own = self._shared.own
        return tokens if own is None else own[tokens]

    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The draft model's own tokenizer, if its folder has one."""
        if self.path is None or not any(self.path.glob("tokenizer*")):
            return None
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
