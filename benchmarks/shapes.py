"""Models of published shapes with random weights, to measure speed where no checkpoint is at hand.

Says nothing about acceptance: what random models write means nothing, and they agree on nothing.
`shapes.json` has the published configs, each with its source.
"""

from __future__ import annotations

import hashlib
import json
import re
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from ttspec.drafters.base import Drafter
from ttspec.drafters.causal import Causal
from ttspec.drafters.checkpoint import kind_of, make_drafter
from ttspec.errors import OptionError
from ttspec.models.attention import use_folded_attention
from ttspec.models.target import Target, wrap_target
from ttspec.models.unsupported import attention_windows

SCALE = 0.02
"""Standard deviation of random matrices, as transformers initialises; norms are 1."""
LEAST_LAYERS = 2
"""Fewer have no place for EAGLE-3's taps."""
_LAYERS = re.compile(r"^(?P<pair>[^:]+):layers=(?P<layers>\d+)$")
_FILES = "or two config.json files, TARGET.json,DRAFTER.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairShapes:
    """What a target and its drafter look like, without a weight."""

    name: str
    target: dict[str, Any]
    """config.json of the target."""
    drafter: dict[str, Any]
    """config.json of the drafter."""
    published_layers: int
    """Of the target; `target` may have been given fewer."""

    @property
    def layers(self) -> str:
        """The target's layers, and of how many."""
        own = self.target["num_hidden_layers"]
        fewer = own != self.published_layers
        return f"{own} of {self.published_layers}" if fewer else str(own)

    @property
    def sha256(self) -> str:
        """What tells these configs from others."""
        text = json.dumps([self.target, self.drafter], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def _published() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Pairs that are known by name."""
    return list(_published()["drafters"])


def find_shapes(name: str) -> PairShapes:
    """Published shapes by name, with fewer layers as in NAME:layers=2, or two config files.

    Raises:
        OptionError: There is no such pair, or a file is no config.
    """
    if name.count(",") == 1:
        target, drafter = (_read(Path(part.strip())) for part in name.split(","))
        layers = target.get("num_hidden_layers")
        if not isinstance(layers, int):
            raise OptionError(
                f"{name.partition(',')[0]} has no num_hidden_layers.\n"
                "Give the config.json of a text model first, then its drafter's."
            )
        short = ",".join(Path(part.strip()).name for part in name.split(","))
        return PairShapes(name=short, target=target, drafter=drafter, published_layers=layers)
    fewer = _LAYERS.match(name)
    pair = fewer["pair"] if fewer else name
    if pair not in names():
        raise OptionError(
            f"--random-weights is {name!r}; allowed are {', '.join(names())}, {_FILES}.\n"
            "A name may have fewer target layers, as in qwen3-8b+dflash:layers=2."
        )
    target = deepcopy(_published()["targets"][pair.partition("+")[0]]["config"])
    drafter = deepcopy(_published()["drafters"][pair]["config"])
    whole = target["num_hidden_layers"]
    if fewer:
        _shorten(name, target, drafter, int(fewer["layers"]))
    return PairShapes(name=name, target=target, drafter=drafter, published_layers=whole)


def random_target(pair: PairShapes, device: torch.device, dtype: torch.dtype) -> Target:
    """A target of these shapes, made on the device in its dtype.

    It has no text: its tokenizer decodes every token to nothing, and no token ends an answer.

    Raises:
        TargetError: Its layers are of a kind that cannot be rolled back.
        OptionError: The config is of no causal language model.
    """
    own = {k: v for k, v in pair.target.items() if k not in ("auto_map", "eos_token_id")}
    try:
        config = CONFIG_MAPPING[own["model_type"]].from_dict(own)
    except KeyError as error:
        raise OptionError(
            f"The target's config of {pair.name} has model_type {own.get('model_type')!r}, which "
            "transformers does not know.\nGive the config.json of a causal language model."
        ) from error
    attention_windows(config, states=True)  # refuse before memory is taken
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # no_init_weights leaves it out
    _fill(dict(model.named_parameters()), device, seed=0)
    use_folded_attention(model)
    target = wrap_target(model, _tokenizer())
    name = re.split("[+,]", pair.name)[0]
    return replace(target, name=f"{name} (random weights)", origin="random weights", ends=())


def bare_drafter(pair: PairShapes) -> Drafter:
    """The pair's drafter, which has no weights yet; see `give_weights`.

    Raises:
        CheckpointError: The config is of no drafter, or not complete.
        OptionError: It is of no kind that is known.
    """
    kind = kind_of(pair.drafter)
    if kind is None:
        raise OptionError(
            f"The drafter's config of {pair.name} describes {pair.drafter.get('architectures')}, "
            "which is no drafter that ttspec knows.\nGive its published config.json."
        )
    return make_drafter(kind, pair.drafter, name=f"{kind} (random weights)")


def give_weights(drafter: Drafter, device: torch.device, dtype: torch.dtype) -> None:
    """Give a drafter random weights, made on the device in the target's dtype."""
    shapes = drafter.shapes()
    weights = {n: torch.empty(shape, device=device, dtype=dtype) for n, shape in shapes.items()}
    _fill(weights, device, seed=1)
    if "d2t" in weights:
        vocabulary: int = drafter.vocabulary  # type: ignore[attr-defined]
        weights["d2t"] = _spread(len(weights["d2t"]), vocabulary).to(device)
    drafter.weights = weights
    if isinstance(drafter, Causal):
        with torch.device(device):
            _ = drafter.module  # else it is made on the host when the drafter is bound


@torch.no_grad()
def _fill(weights: dict[str, Tensor], device: torch.device, seed: int) -> None:
    """Small random matrices, norms of 1; in place, for 8B weights are not to be held twice."""
    generator = None
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
    for weight in weights.values():
        if weight.dim() == 1:
            weight.fill_(1)
        else:
            weight.normal_(0, SCALE, generator=generator)


def _spread(draft: int, vocabulary: int) -> Tensor:
    """d2t int64 [V_draft] of a draft vocabulary that lies evenly in the target's."""
    own = torch.arange(draft)
    return own * vocabulary // draft - own


def _shorten(name: str, target: dict[str, Any], drafter: dict[str, Any], layers: int) -> None:
    """Give the target fewer layers, and the drafter taps that are there."""
    whole = target["num_hidden_layers"]
    if not LEAST_LAYERS <= layers <= whole:
        raise OptionError(
            f"--random-weights is {name!r}; allowed are {LEAST_LAYERS} to {whole} layers.\n"
            "The drafter keeps its own."
        )
    target["num_hidden_layers"] = layers
    if "layer_types" in target:
        target["layer_types"] = target["layer_types"][:layers]
    if "num_target_layers" in drafter:
        drafter["num_target_layers"] = layers
    taps = (drafter.get("dflash_config") or {}).get("target_layer_ids")
    if taps:
        taps[:] = [tap * layers // whole for tap in taps]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON: {error}"
        raise OptionError(
            f"--random-weights: {path} cannot be read: {reason}.\n"
            f"Give one of {', '.join(names())}, {_FILES}."
        ) from error
    if not isinstance(config, dict):
        raise OptionError(f"{path} is no JSON object.\nGive a config.json.")
    return config


def _tokenizer() -> PreTrainedTokenizerFast:
    """Knows no text: there is no tokenizer without a checkpoint, and tokens mean nothing here."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({}, [])))
