"""One recipe a kind of drafter: how a new one begins, and what a step's loss is.

All follow the published training (drafters.md 1d, 2d, 3d): EAGLE-3 and MTP run their own chain over
whole sequences (training-time test), DFlash and its kin fill blocks at random anchors
(block_recipes.py), PARD reads mask tokens after every token, fewer of them the deeper they are. A
draft model is PARD without masks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.causal import Causal
from ttspec.drafters.checkpoint import make_drafter
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.mtp_layer import MtpLayer, one_layer, sizes_of
from ttspec.drafters.taps import default_eagle3_taps
from ttspec.errors import OptionError
from ttspec.models.target import Target
from ttspec.training.batches import Batch, Example, anchors, masked_rows
from ttspec.training.block_recipes import (
    DFlash2Recipe,
    DFlashRecipe,
    DominoRecipe,
    DSparkRecipe,
    JetSpecRecipe,
)
from ttspec.training.config import TrainConfig
from ttspec.training.recipe import Recipe, mask_token

KEPT, LEAST_KEPT = 0.7, 0.2
"""Share of PARD's masks of one depth that are kept at the next, and the smallest share."""
C = TypeVar("C", Eagle3, Mtp)


class ChainRecipe(Recipe[C]):
    """Training-time test: block - 1 steps over whole sequences (drafters.md 1d)."""

    def loss(self, drafter: C, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over steps, step j weighed 0.8^j, at random anchors of every dialogue."""
        steps = self.config.block - 1
        blocks = anchors(batch, self.config.anchors, steps)
        features, states = self.states.of(batch, drafter.taps)
        outs = self.replayed(drafter, batch, blocks, features)
        row = torch.arange(len(states), device=states.device)[:, None]
        total, right = states.new_zeros((), dtype=torch.float32), []
        for j in range(steps):  # one at a time: logits are wide
            labels, learned = blocks.labels[..., j], blocks.mask[..., j]
            at = (blocks.start + j).clamp(max=states.shape[1] - 1)  # past the end none is learned
            logits = drafter.logits(outs[:, :, j])
            values = self.row_loss(logits, states[row, at], drafter.draft_ids)
            total = total + 0.8**j * (values * learned).sum() / learned.numel()
            best = logits.argmax(-1)
            best = best if drafter.draft_ids is None else drafter.draft_ids[best]
            right.append(((best == labels) & learned).sum() / learned.sum().clamp(min=1))
        return total, torch.stack(right)


class Eagle3Recipe(ChainRecipe[Eagle3]):
    """One layer over three taps, and a head for the most frequent tokens."""

    kind = "eagle3"

    def new(self, examples: list[Example]) -> Eagle3:
        """A random layer; the head is the target's, cut to the most frequent tokens."""
        c = self.config
        size = min(c.draft_vocabulary, int(self.target.config.vocab_size))
        taps = default_eagle3_taps(self.layers)
        config = {
            **self.layer_config(),
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "draft_vocab_size": size,
            # At the top level vLLM reads them as we do; nested in eagle_config, a layer early.
            "eagle_aux_hidden_state_layer_ids": list(taps),
            "norm_before_residual": True,
            "ttspec": {"length": c.block - 1, "rebuilt": ["lm_head.weight"]},
        }
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
        return drafter

    def trained(self, drafter: Eagle3) -> list[str]:
        """The head too, if it is not the target's."""
        names = super().trained(drafter)
        return [*names, "lm_head.weight"] if "lm_head.weight" in drafter.weights else names


class MtpRecipe(ChainRecipe[Mtp]):
    """A layer of the target's own family, which begins as the target's last one."""

    kind, lr = "mtp", 3e-4  # it begins with trained weights; at 1e-3 gradients became infinite

    def __init__(self, target: Target, config: TrainConfig) -> None:
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
        own = dict(MtpLayer(drafter.model_config).named_parameters())  # norms begin neutral
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
            config |= {"spd_type": "pard", "pard_token": mask_token(self.target)}
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

    def drafted(self, longest: int) -> int:
        """Every token, and masks in place of padding."""
        return longest

    def loss(self, drafter: Causal, batch: Batch) -> tuple[Tensor, Tensor]:
        """All rows alike, whatever their depth."""
        depth = self.config.block - 1 if self.kind == "pard" else 1
        rows = masked_rows(batch, depth, KEPT, LEAST_KEPT)
        ids = torch.where(rows.depth > 0, getattr(drafter, "mask_token", 0), rows.ids)
        hidden = drafter.training_forward(ids, rows.position, rows.seen)
        row, at = rows.has_label.nonzero(as_tuple=True)
        place = rows.position[row, at]
        _, states = self.states.of(batch, ())
        labels = batch.ids[row, place + 1]
        tied = drafter.weights["model.embed_tokens.weight"]
        logits = F.linear(hidden[row, at], drafter.weights.get("lm_head.weight", tied))
        values = self.row_loss(logits, states[row, place])
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
    "dflash2": DFlash2Recipe,
    "domino": DominoRecipe,
    "dspark": DSparkRecipe,
    "jetspec": JetSpecRecipe,
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
