"""The loops of other implementations: transformers' `generate`, and the package `dflash`.

Each runs on the run's target: the same weights, through transformers' own attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StaticCache
from transformers import __version__ as transformers_version

from ttspec.bench.arms import ArmSpec
from ttspec.bench.peer_rounds import Watch
from ttspec.config import SamplingConfig
from ttspec.decoding.engine import Engine
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.rotary import Rope
from ttspec.models.attention import NAME as FOLDED
from ttspec.models.target import Target, cache_keyword

Generate = Callable[[Tensor, int, Watch], Tensor]
"""From tokens [1, P] and how many to generate at most to tokens [1, P + N]."""


class SkippedError(Exception):
    """Why a peer cannot run here, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """What is asked of every peer."""

    max_new_tokens: int
    sampling: SamplingConfig
    slots: int
    """Tokens that a conversation may have in all."""
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop on a target, ready to run."""

    generate: Generate
    model: nn.Module
    """The target's modules once more, with the same weights: hooks and attention of its own."""
    helper: nn.Module | None = None
    """What drafts, where it is a model."""
    streams: bool = False
    """Watched as a streamer, not by hooks, which a compiled forward would trace."""


def open_loop(arm: ArmSpec, engine: Engine, asked: PeerOptions) -> Loop:
    """The loop that an arm names.

    Raises:
        SkippedError: It cannot run here.
    """
    target = engine.target
    model = _twin(target.model)
    if arm.kind == "dflash":
        return _package_dflash(_dflash_drafter(engine), model, target, asked)
    config, extra = _config(target, asked), {}
    streams = arm.kind in ("hf", "hf-compiled")
    if arm.kind == "hf-compiled":
        if not _compiles(target.device):
            raise SkippedError("transformers compiles `generate` on GPUs only")
        extra["static"] = StaticCache(config=model.config, max_cache_len=asked.slots)
    elif arm.kind == "hf-dflash":
        config["speculation_type"] = "dflash"
        extra["assistant_model"] = _transformers_dflash(_dflash_drafter(engine))
    return Loop(
        generate=partial(_generate, model, config, extra, streams),
        model=model,
        helper=extra.get("assistant_model"),
        streams=streams,
    )


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda"


def _twin(model: nn.Module) -> Any:
    """The same modules with the same weights, and transformers' own attention."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin: Any = copy.deepcopy(model, shared)
    if twin.config._attn_implementation == FOLDED:
        twin.set_attn_implementation("sdpa")
    twin.generation_config = GenerationConfig()  # what it would add to ours is in `sampling`
    return twin


def _config(target: Target, asked: PeerOptions) -> dict[str, Any]:
    """Fields of a `GenerationConfig` that choose the tokens that we would, or draw as we would."""
    sampling = asked.sampling
    ends = [] if asked.ignore_eos else list(target.ends)
    padding = target.tokenizer.pad_token_id
    chosen: dict[str, Any] = {
        "eos_token_id": ends or None,
        "pad_token_id": padding if padding is not None else (list(target.ends) or [0])[0],
        "do_sample": sampling.temperature > 0,
    }
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            raise SkippedError(f"transformers has no {name}")
    if sampling.penalises:
        wanted = {
            "repetition_penalty": float(sampling.repetition_penalty),
            "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
            "min_new_tokens": sampling.min_new_tokens,
            "min_length": sampling.min_length,
            "sequence_bias": [[[token], bias] for token, bias in sampling.logit_bias],
            "bad_words_ids": [list(word) for word in sampling.bad_words_ids],
            "suppress_tokens": list(sampling.suppress_tokens),
            "begin_suppress_tokens": list(sampling.begin_suppress_tokens),
        }
        chosen |= {name: value for name, value in wanted.items() if value}
    if sampling.temperature > 0:
        names = ("temperature", "top_k", "top_p")
        chosen |= {name: getattr(sampling, name) for name in names}
        chosen |= {"min_p": sampling.min_p} if sampling.min_p else {}
    return chosen


def _generate(
    model: Any,
    base: Mapping[str, Any],
    extra: Mapping[str, Any],
    streams: bool,
    ids: Tensor,
    most: int,
    watch: Watch,
) -> Tensor:
    """What `generate` of transformers says."""
    extra = dict(extra)
    if static := extra.pop("static", None):
        static.reset()
        extra[cache_keyword(model)] = static
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(**base, max_new_tokens=most),
        streamer=watch if streams else None,
        **extra,
    )


def _dflash_drafter(engine: Engine) -> DFlash:
    drafter = engine.drafter
    if not isinstance(drafter, DFlash):
        have = "there is none" if drafter is None else f"{drafter.name} is of kind {drafter.kind}"
        raise SkippedError(f"it needs a DFlash drafter, and {have}")
    return drafter


def _transformers_dflash(drafter: DFlash) -> nn.Module:
    """The drafter as the one model class that transformers has for its DFlash generator."""
    try:
        from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
        from transformers.generation.candidate_generator import (
            DFlashTokenCandidateGenerator,  # noqa: F401
        )
    except ImportError:
        reason = f"transformers {transformers_version} has no DFlash generator"
        raise SkippedError(reason) from None
    plain = Rope.of({"rope_theta": drafter.rope.base}, drafter.head_dim).frequencies
    scaled = not torch.equal(drafter.rope.frequencies.cpu(), plain)
    unusual = drafter.rope.interleaved or drafter.biased or drafter.activation_name != "silu"
    unusual = unusual or drafter.softcap or drafter.embedding_scale * drafter.logit_scale != 1
    if unusual or scaled or any(drafter.causal):
        raise SkippedError(
            "transformers' DFlash model has neither scaled or interleaved RoPE, nor layers that "
            "look back only, nor biases, scales or another activation than silu"
        )
    config = MuseGlimmerAssistantConfig(
        hidden_size=drafter.hidden,
        intermediate_size=drafter.intermediate,
        num_hidden_layers=drafter.layers,
        num_attention_heads=drafter.heads,
        num_key_value_heads=drafter.kv_heads,
        head_dim=drafter.head_dim,
        rms_norm_eps=drafter.eps,
        rope_parameters={"rope_theta": drafter.rope.base, "rope_type": "default"},
        sliding_window=next((w for w in drafter.windows if w), 0),
        layer_types=["sliding_attention" if w else "full_attention" for w in drafter.windows],
        block_size=drafter.block,
        mask_token_id=drafter.mask_token,
        target_layer_ids=[tap - 1 for tap in drafter.taps],
    )
    with torch.device("meta"):
        model = MuseGlimmerAssistantModel(config)
    model.rotary_emb = type(model.rotary_emb)(config).to(drafter.embedding.device)
    there = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}
    weights = {}
    for name, weight in drafter.weights.items():
        old = next((old for old in there if name.startswith(old)), None)
        weights[name.replace(old, there[old]) if old else name] = weight
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise SkippedError(f"{drafter.name} is not what transformers expects: {first}") from error
    return model.eval().requires_grad_(False)


def _package_dflash(drafter: DFlash, model: nn.Module, target: Target, asked: PeerOptions) -> Loop:
    """The drafter as the package `dflash` loads it, and the package's own loop."""
    try:
        import dflash  # type: ignore[import-not-found] # noqa: F401 - it may be absent
        from dflash.model import (  # type: ignore[import-not-found]
            DFlashDraftModel,
            dflash_generate,
        )
    except ImportError as error:
        if error.name == "dflash":
            reason = "the package dflash is not installed (pip install --no-deps dflash)"
            raise SkippedError(reason) from None
        raise SkippedError(f"the package dflash does not import here: {error}") from error
    sampling = asked.sampling
    if sampling.temperature > 0 and sampling.min_p:
        raise SkippedError("the package dflash has no min_p")
    if sampling.penalises:
        raise SkippedError("the package dflash has no penalties")
    if drafter.path is None:
        raise SkippedError(f"the package dflash reads folders, and {drafter.name} has none")
    own, report = DFlashDraftModel.from_pretrained(
        drafter.path, dtype=target.dtype, attn_implementation="sdpa", output_loading_info=True
    )
    if absent := report["missing_keys"] or report["mismatched_keys"]:
        name = min(map(str, absent))
        raise SkippedError(f"the package dflash finds no {name} in {drafter.path}")
    own = nn.Module.to(own.eval(), target.device).requires_grad_(False)
    ends = None if asked.ignore_eos else list(target.ends)

    def generate(ids: Tensor, most: int, _: Watch) -> Tensor:
        return dflash_generate(
            own,
            model,
            ids,
            most,
            stop_token_ids=ends,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )

    return Loop(generate=generate, model=model, helper=own)
