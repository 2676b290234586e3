"""One recipe a kind of drafter: how a new one begins, and what a step's loss is.

All follow the published training (drafters.md 1d, 2d, 3d): EAGLE-3 and MTP run their own chain over
whole sequences (training-time test), DFlash fills blocks at random anchors, PARD reads mask tokens
after every token, fewer of them the deeper they are. A draft model is PARD without masks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.base import Drafter
from ttspec.drafters.causal import Causal
from ttspec.drafters.checkpoint import make_drafter
from ttspec.drafters.dflash import DFlash, default_taps
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.eagle3 import default_taps as eagle3_taps
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.mtp_layer import one_layer, sizes_of
from ttspec.drafters.rotary import DEFAULT_BASE, rope_parameters
from ttspec.errors import OptionError
from ttspec.losses import cross_entropy, forward_kl, position_weights
from ttspec.models.target import Target
from ttspec.training.batches import Batch, Example, anchors, masked_rows
from ttspec.training.config import TrainConfig

D = TypeVar("D", bound=Drafter)
C = TypeVar("C", Eagle3, Mtp)


class Recipe(ABC, Generic[D]):
    """How one kind is trained."""

    def __init__(self, target: Target, config: TrainConfig) -> None:
        """Train for `target`."""
        self.target, self.config = target, config
        self.layers = int(target.config.num_hidden_layers)
        if self.layers < 5 or config.block < 2:
            raise OptionError("A drafter needs a block of 2 and a target of 5 layers or more.")
        for name in ("keep", "keep_least"):
            value = getattr(config, name)
            if not 0 < value <= 1:
                raise OptionError(f"{name} is {value}; allowed is above 0, at most 1.")

    @abstractmethod
    def new(self, examples: list[Example]) -> D:
        """A drafter that knows nothing yet."""

    @abstractmethod
    def loss(self, drafter: D, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and per drafted position the share of right most likely tokens."""

    def trained(self, drafter: D) -> list[str]:
        """Names of the weights that train: all but what the target lends."""
        lent = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")
        return [n for n in drafter.weights if not n.endswith(lent)]

    def body(self) -> dict[str, Any]:
        """Config entries of a layer shaped like the target's."""
        c = self.target.config
        heads = int(c.num_attention_heads)
        return {
            "hidden_size": int(c.hidden_size),
            "intermediate_size": int(c.intermediate_size),
            "num_attention_heads": heads,
            "num_key_value_heads": int(c.num_key_value_heads),
            "head_dim": int(getattr(c, "head_dim", None) or c.hidden_size // heads),
            "rms_norm_eps": float(c.rms_norm_eps),
            "rope_theta": float(rope_parameters(c.to_dict()).get("rope_theta", DEFAULT_BASE)),
            "max_position_embeddings": int(c.max_position_embeddings),
            "vocab_size": int(c.vocab_size),
            "tie_word_embeddings": False,
            "attention_bias": False,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }

    def random(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """First weights: norms of 1, the rest small."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return {
            name: torch.ones(shape)
            if len(shape) == 1
            else 0.02 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }

    def judge(self, q: Tensor, states: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        """Loss per row.

        Args:
            q: Draft logits [..., V_draft].
            states: What the target's head reads, [..., H], at the token before.
            labels: int64 [...], the tokens of the text.
            ids: The target's token for each draft token; None is the same.
        """
        if self.config.loss == "ce" and ids is None:
            return cross_entropy(labels, q)
        p = self.target.judge(states)
        if ids is None:
            return forward_kl(p, q)
        # Over the tokens that can be drafted, weighed by the target's probability of those.
        covered = p[..., ids]
        share = (covered.float().logsumexp(-1) - p.float().logsumexp(-1)).exp()
        if self.config.loss == "kl":
            return forward_kl(covered, q) * share
        place = torch.searchsorted(ids, labels.contiguous()).clamp(max=len(ids) - 1)
        return cross_entropy(place, q) * (ids[place] == labels)


class DFlashRecipe(Recipe[DFlash]):
    """Blocks at random anchors (drafters.md 2d)."""

    def new(self, examples: list[Example]) -> DFlash:  # noqa: ARG002
        """Random layers of the target's width."""
        c = self.config
        layers = c.layers or 3
        config = {
            **self.body(),
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": layers,
            "block_size": c.block,
            "num_target_layers": self.layers,
            "layer_types": ["full_attention"] * layers,
            "dflash_config": {
                "mask_token_id": _mask_token(self.target),
                "target_layer_ids": default_taps(c.taps or layers, self.layers),
            },
        }
        drafter = make_drafter("dflash", config)
        assert isinstance(drafter, DFlash)
        drafter.weights = self.random(drafter.shapes())
        return drafter

    def loss(self, drafter: DFlash, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows of all blocks, weighed by their place in the block."""
        length = self.config.block - 1
        blocks = anchors(batch, self.config.anchors, length)
        features, states = self.target.read(batch.ids)
        logits = drafter.teach(features, blocks.tokens, blocks.start, length)
        row = torch.arange(len(states), device=states.device)[:, None, None]
        at = blocks.start[..., None] + torch.arange(length, device=states.device)
        at = at.clamp(max=states.shape[1] - 1)  # past the end nothing is taught
        if self.config.loss == "kl":
            values = forward_kl(self.target.judge(states[row, at]), logits)
        else:
            values = cross_entropy(blocks.labels, logits)
        weight = position_weights(length, self.config.decay, logits.device) * blocks.mask
        right = (logits.argmax(-1) == blocks.labels) & blocks.mask
        accuracy = right.sum((0, 1)) / blocks.mask.sum((0, 1)).clamp(min=1)
        return (values * weight).sum() / weight.sum().clamp(min=1e-6), accuracy


class ChainRecipe(Recipe[C]):
    """Training-time test: block - 1 steps over whole sequences (drafters.md 1d)."""

    def loss(self, drafter: C, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over steps, step j weighed 0.8^j, at random anchors of every dialogue."""
        steps = self.config.block - 1
        blocks = anchors(batch, self.config.anchors, steps)
        features, states = self.target.read(batch.ids)
        outs = drafter.teach(features, batch.ids, steps)
        row = torch.arange(len(states), device=states.device)[:, None]
        total, right = states.new_zeros((), dtype=torch.float32), []
        for j, out in enumerate(outs):
            labels, learned = blocks.labels[..., j], blocks.mask[..., j]
            at = (blocks.start + j).clamp(max=states.shape[1] - 1)  # past the end none is learned
            # The row before the anchor reads the anchor's token and predicts the one after.
            logits = drafter.logits(out[row, blocks.start - 1])
            values = self.judge(logits, states[row, at], labels, drafter.draft_ids)
            total = total + 0.8**j * (values * learned).sum() / learned.numel()
            best = logits.argmax(-1)
            best = best if drafter.draft_ids is None else drafter.draft_ids[best]
            right.append(((best == labels) & learned).sum() / learned.sum().clamp(min=1))
        return total, torch.stack(right)


class Eagle3Recipe(ChainRecipe[Eagle3]):
    """One layer over three taps, and a head for the most frequent tokens."""

    def new(self, examples: list[Example]) -> Eagle3:
        """A random layer; the head is the target's, cut to the most frequent tokens."""
        c = self.config
        size = min(c.draft_vocabulary, int(self.target.config.vocab_size))
        taps = eagle3_taps(self.layers)
        config = {
            **self.body(),
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "draft_vocab_size": size,
            # At the top level vLLM reads them as we do; nested in eagle_config, a layer early.
            "eagle_aux_hidden_state_layer_ids": list(taps),
            "norm_before_residual": True,
            "ttspec": {"length": c.block - 1},
        }
        if c.head == "frozen":
            config["ttspec"]["rebuilt"] = ["lm_head.weight"]
        drafter = make_drafter("eagle3", config)
        assert isinstance(drafter, Eagle3)
        drafter.weights = self.random({n: s for n, s in drafter.shapes().items() if n != "d2t"})
        norm = getattr(self.target.model.base_model, "norm", None)
        if norm is not None:  # the head expects states that went through it
            drafter.weights["norm.weight"] = norm.weight.detach().float().cpu().clone()
        used = frequent_tokens(examples, size, int(self.target.config.vocab_size))
        if size < self.target.config.vocab_size:
            drafter.weights["d2t"] = used - torch.arange(size)
            kept = torch.zeros(int(self.target.config.vocab_size), dtype=torch.bool)
            drafter.weights["t2d"] = kept.index_fill(0, used, True)
        if c.head == "trained":
            drafter.weights["lm_head.weight"] = self.target.head[used].float().cpu()
        return drafter

    def trained(self, drafter: Eagle3) -> list[str]:
        """The head too, if it is not the target's."""
        names = super().trained(drafter)
        return [*names, "lm_head.weight"] if "lm_head.weight" in drafter.weights else names


class MtpRecipe(ChainRecipe[Mtp]):
    """A layer of the target's own family, which begins as the target's last one."""

    def __init__(self, target: Target, config: TrainConfig) -> None:
        """Train for `target`."""
        super().__init__(target, config)
        try:
            sizes_of(one_layer(target.config))
        except Exception as error:  # whatever a family's code raises
            raise OptionError(
                f"A layer of the target's family ({target.config.model_type}) does not run alone, "
                "as an MTP head's must.\nTrain another kind, such as eagle3."
            ) from error

    def new(self, examples: list[Example]) -> Mtp:  # noqa: ARG002
        """What the first step reads is the target's last state; the next token is learned."""
        config = self.target.config.to_dict()
        config.pop("_name_or_path", None)  # a path of this machine
        config["architectures"] = ["MTPDraftModel"]
        config["ttspec"] = {"length": self.config.block - 1}
        drafter = make_drafter("mtp", config)
        assert isinstance(drafter, Mtp)
        own = dict(drafter.layer.named_parameters())  # norms are neutral from the start
        drafter.weights = {n: w for n, w in own.items() if w.dim() == 1 and "norm" in n}
        drafter.weights = {n: w.detach().float().clone() for n, w in drafter.weights.items()}
        model: Any = self.target.model.get_decoder()
        full = [i for i, window in enumerate(self.target.windows) if window != 0]
        last = {f"layers.0.{n}": w for n, w in model.layers[full[-1]].state_dict().items()}
        last |= {f"norm.{n}": w for n, w in model.norm.state_dict().items()}
        shapes = drafter.shapes()
        fits = {n: w for n, w in last.items() if tuple(w.shape) == shapes.get(n)}
        drafter.weights |= {n: w.detach().float().cpu().clone() for n, w in fits.items()}
        left = {n: shape for n, shape in shapes.items() if n not in drafter.weights}
        drafter.weights |= self.random(left)
        size = drafter.hidden
        drafter.weights["fc.weight"][:, size:] += torch.eye(size)
        return drafter


class PardRecipe(Recipe[Causal]):
    """Masks after every token, with conditional drop (drafters.md 3d)."""

    kind, default_layers = "pard", 6

    def __init__(self, target: Target, config: TrainConfig) -> None:
        """Train for `target`."""
        super().__init__(target, config)
        layers = config.layers or self.default_layers
        if config.init is None and layers >= self.layers:
            raise OptionError(
                f"layers is {layers}; a draft model of a target of {self.layers} layers has fewer."
            )

    def new(self, examples: list[Example]) -> Causal:  # noqa: ARG002
        """The target with fewer layers, spread evenly; embedding and head stay the target's."""
        c = self.config
        layers = c.layers or self.default_layers
        kept = [round(i * (self.layers - 1) / max(layers - 1, 1)) for i in range(layers)]
        config = self.target.config.to_dict()
        config.pop("_name_or_path", None)  # a path of this machine
        config["num_hidden_layers"] = layers
        if config.get("layer_types"):
            config["layer_types"] = [config["layer_types"][k] for k in kept]
        config["architectures"] = [type(self.target.model).__name__]
        tables = ["model.embed_tokens.weight"]
        if not config.get("tie_word_embeddings"):
            tables.append("lm_head.weight")
        config["ttspec"] = {"rebuilt": tables, "layers_of_target": kept}
        if self.kind == "pard":
            config |= {"spd_type": "pard", "pard_token": _mask_token(self.target)}
            config["ttspec"]["length"] = c.block - 1
        drafter = make_drafter(self.kind, config)
        assert isinstance(drafter, Causal)
        whole = self.target.model.state_dict()
        for name in drafter.shapes():  # model.layers.I.rest
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                parts[at] = str(kept[int(parts[at])])
            drafter.weights[name] = whole[".".join(parts)].detach().float().cpu()
        return drafter

    def loss(self, drafter: Causal, batch: Batch) -> tuple[Tensor, Tensor]:
        """All rows alike, whatever their depth."""
        depth = self.config.block - 1 if self.kind == "pard" else 1
        rows = masked_rows(batch, depth, self.config.keep, self.config.keep_least)
        ids = torch.where(rows.depth > 0, getattr(drafter, "mask_token", 0), rows.ids)
        hidden = drafter.teach(ids, rows.position, rows.seen)
        row, at = rows.taught.nonzero(as_tuple=True)
        place = rows.position[row, at]
        _, states = self.target.read(batch.ids)
        labels = batch.ids[row, place + 1]
        tied = drafter.weights["model.embed_tokens.weight"]
        logits = F.linear(hidden[row, at], drafter.weights.get("lm_head.weight", tied))
        values = self.judge(logits, states[row, place], labels, None)
        right = logits.argmax(-1) == labels
        which = rows.depth[row, at]
        accuracy = [
            (right & (which == d)).sum() / (which == d).sum().clamp(min=1) for d in range(depth)
        ]
        return values.mean(), torch.stack(accuracy)


class CausalRecipe(PardRecipe):
    """A plain draft model: the next token only."""

    kind = "causal"


RECIPES: dict[str, type[Recipe[Any]]] = {
    "dflash": DFlashRecipe,
    "eagle3": Eagle3Recipe,
    "mtp": MtpRecipe,
    "pard": PardRecipe,
    "causal": CausalRecipe,
}


def frequent_tokens(examples: list[Example], size: int, vocabulary: int) -> Tensor:
    """The most frequent tokens of the answers, ascending: int64 [size].

    Tokens that never occur fill up from the lowest.
    """
    counts = Counter(t for ids, spans in examples for b, e in spans for t in ids[b:e])
    ranked = sorted(range(vocabulary), key=lambda t: (-counts[t], t))
    return torch.tensor(sorted(ranked[:size]))


def _mask_token(target: Target) -> int:
    """A token that never occurs in text: padding rows first, then unused special tokens."""
    size = int(target.config.vocab_size)
    if len(target.tokenizer) < size:
        return size - 1
    special = set(target.tokenizer.all_special_ids) | set(target.ends)
    added = sorted(target.tokenizer.added_tokens_decoder)
    free = [token for token in added if token not in special]
    return free[-1] if free else max(special)
