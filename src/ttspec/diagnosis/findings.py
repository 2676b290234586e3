"""What the files of a pair say about how well it will draft, before anything is generated.

A drafter that was misread still runs and its text stays right; it only drafts badly. Each function
here looks at one way in which that happens (drafters.md 6) and says what to do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.decoding.engine import Engine
from ttspec.decoding.template import thinking_of
from ttspec.drafters.base import Drafter
from ttspec.drafters.dflash import DFlash, default_taps
from ttspec.drafters.rotary import DEFAULT_BASE, PLAIN, rope_parameters
from ttspec.drafters.vocabulary import tokenizer_of
from ttspec.models.target import Target

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "problem")
BOUNDARY_IDS = "aux_hidden_state_layer_ids"
EAGLE_IDS = "eagle_aux_hidden_state_layer_ids"
BLOCKS = (BOUNDARY_IDS, "dflash_config.target_layer_ids")
TAP_KEYS = {
    "dflash": BLOCKS,
    "dflash2": BLOCKS,
    "domino": BLOCKS,
    "dspark": (BOUNDARY_IDS, "target_layer_ids", "dflash_config.target_layer_ids"),
    **dict.fromkeys(("eagle3", "peagle"), (EAGLE_IDS, f"eagle_config.{EAGLE_IDS}")),
    "pard": ("pard2_target_layers",),
}
"""Where a config.json names its taps, by kind; the first that is there counts."""
FAR_APART = 8.0
"""Rotary bases further apart than this factor are told."""
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    """`problem` is wrong; `warning` is likely to cost acceptance; `note` is good to know."""
    text: str
    """What was found, and what to do about it."""


def examine(engine: Engine) -> list[Finding]:
    """Everything that the files of a bound pair say."""
    target, drafter = engine.target, engine.drafter
    found = []
    if drafter is not None and drafter.weights:
        found = [
            _vocabulary(target, drafter),
            _mask_token(target, drafter),
            _taps(drafter, int(target.config.num_hidden_layers)),
            _rope_base(target, drafter),
            _rope_scaling(target, drafter),
            _norm_epsilon(target, drafter),
            _positions(target, drafter),
            _window(target, drafter),
            _dtype(target, drafter),
        ]
    return [f for f in (*found, _thinking(target.tokenizer)) if f is not None]


@dataclass(frozen=True, slots=True)
class Rotary:
    """What a config says about rotary positions."""

    base: float | None
    kind: str
    factor: float | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rotary:
        """From a config's keys, old or new; of several kinds of layers the full ones count."""
        rope = rope_parameters(config)
        base = rope.get("rope_theta")
        kind = "default" if rope["rope_type"] in PLAIN else str(rope["rope_type"])
        return cls(float(base) if base else None, kind, rope.get("factor"))

    def __str__(self) -> str:
        scale = f", factor {self.factor:g}" if self.factor and self.kind != "default" else ""
        return "none" if self.kind == "default" else f"{self.kind}{scale}"


def target_base(target: Target) -> float | None:
    """The target's rotary base, if it has one."""
    return Rotary.of(target.config.to_dict()).base


def draft_base(drafter: Drafter) -> float | None:
    """The rotary base that the drafter runs with."""
    given = Rotary.of(_body(drafter)).base
    model = getattr(drafter, "model_config", None)
    if given is None and model is not None:  # what transformers filled in
        return Rotary.of(model.get_text_config().to_dict()).base
    return given or DEFAULT_BASE


def base_text(base: float) -> str:
    """A rotary base as a user writes it."""
    return f"{base:.0f}" if base == int(base) else f"{base:g}"


def given_taps(drafter: Drafter) -> tuple[str, list[int]]:
    """The config key that names the taps, and its ids; the usual key and none if none does."""
    keys = TAP_KEYS[drafter.kind]
    for key in keys:
        value: Any = drafter.config
        for part in key.split("."):
            value = (value or {}).get(part)
        if value:
            return key, [int(k) for k in value]
    return keys[-1], []


def _body(drafter: Drafter) -> Mapping[str, Any]:
    return drafter.config.get("transformer_layer_config") or drafter.config


def _vocabulary(target: Target, drafter: Drafter) -> Finding:
    size, known = int(target.config.vocab_size), len(target.tokenizer)
    notes: list[tuple[Level, str]] = []
    mapped = "vocabulary" in drafter.interpretation
    try:
        tokenizer = tokenizer_of(drafter.path)
        own = None if tokenizer is None else tokenizer.get_vocab()
    except (OSError, ValueError, KeyError) as error:
        own = None
        notes.append(("warning", f"its tokenizer cannot be read ({str(error).splitlines()[0]})"))
    theirs = target.tokenizer.get_vocab()
    moved = [t for t, i in theirs.items() if own and t in own and own[t] != i]
    if moved and not mapped:
        text = (
            f"its tokenizer gives {len(moved):,} tokens another id than the target's, such as "
            f"{moved[0]!r}: it was made for another target; give this target's drafter"
        )
        notes.append(("problem", text))
    elif own and not mapped and own.keys() != theirs.keys():
        odd = len(own.keys() ^ theirs.keys())
        notes.append(("note", f"{odd:,} tokens are in one tokenizer only; the others have one id"))
    if drafter.draft_ids is not None:
        ids = drafter.draft_ids
        count = int((ids < known).sum())
        share = count / known
        text = f"{count:,} of {known:,} target tokens ({share:.0%}) can be drafted"
        if mapped and share < 1:
            text += ", those that both tokenizers know; no other is ever proposed"
            notes.append(("note" if share >= 0.9 else "warning", text))
        elif share < 1:
            notes.append(("note", text + ", a reduced vocabulary; no other is ever proposed"))
        first = torch.arange(len(ids), device=ids.device)
        if "d2t" in drafter.weights and torch.equal(ids, first):
            text = f"d2t is all zeros, so only the target's first {len(ids):,} ids are drafted"
            notes.append(("warning", f"{text}; fetch the drafter again: its map may be lost"))
    return _worst("vocabulary", notes, f"{size:,} tokens, as the target")


def _mask_token(target: Target, drafter: Drafter) -> Finding | None:
    mask = getattr(drafter, "mask_token", None)
    if mask is None:
        return None
    tokenizer = target.tokenizer
    if mask >= len(tokenizer):
        return Finding(name="mask token", level="ok", text=f"{mask}, a row without a token")
    token = tokenizer.convert_ids_to_tokens(mask)
    if mask in tokenizer.added_tokens_decoder or mask in tokenizer.all_special_ids:
        return Finding(name="mask token", level="ok", text=f"{mask} {token!r}, a special token")
    text = (
        f"{mask} is {token!r}, a token of ordinary text; "
        "compare mask_token_id or pard_token in its config.json with the published one"
    )
    return Finding(name="mask token", level="warning", text=text)


def _taps(drafter: Drafter, layers: int) -> Finding | None:
    if not drafter.taps:
        return None
    if drafter.kind not in TAP_KEYS:
        return Finding(name="taps", level="ok", text=drafter.interpretation["taps"])
    key, ids = given_taps(drafter)
    reads = f"hidden states {list(drafter.taps)} of 0 to {layers}"
    notes: list[tuple[Level, str]] = []
    if not ids:
        text = f"no {key}: a default rule chose {reads}"
        # Of these E, vLLM and SGLang agree, and official heads rely on it.
        if drafter.kind in ("eagle3", "peagle"):
            notes.append(("note", f"{text}, as every engine reads such a head"))
        else:
            notes.append(("warning", f"{text}; if it was trained on others, add the key"))
        return _worst("taps", notes, "")
    after = ids[0] >= 0 and drafter.taps[0] == ids[0] + 1
    rule = "outputs of layers, so k + 1" if after else "hidden states, as they are"
    fine = f"{key} {ids} read as {rule}: {reads}"
    usual = default_taps(len(ids), layers) if isinstance(drafter, DFlash) else []
    odd = {
        BOUNDARY_IDS: ids == usual,
        **dict.fromkeys(TAP_KEYS["dspark"][1:], ids == [k + 1 for k in usual]),
        EAGLE_IDS: after,
        f"eagle_config.{EAGLE_IDS}": not after,
    }
    if odd.get(key):
        text = "these ids look like the other convention, one layer apart; measure with --probe"
        notes.append(("warning", f"{fine}; {text}"))
    made_for = drafter.config.get("num_target_layers")
    if made_for is not None and int(made_for) != layers:
        text = f"num_target_layers is {made_for}, the target has {layers}: made for another target"
        notes.append(("warning", f"{text}; {fine}"))
    return _worst("taps", notes, fine)


def _rope_base(target: Target, drafter: Drafter) -> Finding | None:
    own, theirs = draft_base(drafter), target_base(target)
    if own is None:
        return None
    given = Rotary.of(_body(drafter)).base is not None
    where = "given" if given else "a default: its config.json has no rope_theta"
    text = f"{base_text(own)} ({where}), "
    text += f"target {base_text(theirs)}" if theirs else "target has none"
    far = theirs is not None and abs(math.log(own / theirs)) > math.log(FAR_APART)
    cure = "; measure with --probe, and run with --draft.rope-base if another one is better"
    level: Level = "ok"
    if drafter.kind == "eagle3" and own == DEFAULT_BASE:
        level = "note" if far or not given else "ok"
        text += "; as the published training code"
    elif (
        drafter.kind == "eagle3"
        and "transformer_layer_config" not in drafter.config
        and "rebuilt" not in (drafter.config.get("ttspec") or {})  # trained here, as it says
    ):
        # drafters.md 6.2: AngelSlim's code still does, SpecForge's did until late 2025
        angel = "Eagle3LlamaForCausalLM" in str(drafter.config.get("architectures"))
        level = "warning" if angel or far else "note"
        text += (
            f"; some training code used {base_text(DEFAULT_BASE)} whatever rope_theta says{cure}"
        )
    elif far and given and hasattr(drafter, "model_config"):
        text += "; a draft model was trained with a base of its own"
    elif far:
        level = "warning"
        text += f"; far apart{cure}"
    elif not given:
        level = "note"
    return Finding(name="rope base", level=level, text=text)


def _rope_scaling(target: Target, drafter: Drafter) -> Finding | None:
    own, theirs = Rotary.of(_body(drafter)), Rotary.of(target.config.to_dict())
    if theirs.base is None:
        return None
    if str(own) == str(theirs):
        return Finding(name="rope scaling", level="ok", text=f"{own}, as the target")
    level: Level = "note" if hasattr(drafter, "model_config") else "warning"
    text = f"{own}, target {theirs}"
    if drafter.kind == "eagle3" and own.kind == "default":
        level, text = "note", f"{text}; as the published training code"
    elif level == "warning":
        text += "; if it was trained with the target's, copy rope_scaling into its config.json"
    return Finding(name="rope scaling", level=level, text=text)


def _norm_epsilon(target: Target, drafter: Drafter) -> Finding | None:
    """A value that transformers filled in."""
    model = getattr(drafter, "model_config", None)
    own = getattr(model.get_text_config(), "rms_norm_eps", None) if model is not None else None
    if own is None or "rms_norm_eps" in _body(drafter):
        return None
    theirs = getattr(target.config, "rms_norm_eps", None)
    same = theirs is None or math.isclose(own, theirs, rel_tol=1e-3)
    text = f"no rms_norm_eps in its config.json: {own:g}, transformers' default"
    if not same:
        text += f", target {theirs:g}; add the one it was trained with"
    return Finding(name="rms_norm_eps", level="note" if same else "warning", text=text)


def _positions(target: Target, drafter: Drafter) -> Finding:
    own, name = _body(drafter).get("max_position_embeddings"), "positions"
    if own is None:
        text = "its config.json has no max_position_embeddings"
        return Finding(name=name, level="note", text=text)
    text = f"made for {int(own):,}, target {target.context:,}"
    if int(own) >= target.context:
        return Finding(name=name, level="ok", text=text)
    text += f"; acceptance falls past {int(own):,} tokens: learn, or give --draft.window"
    return Finding(name=name, level="warning", text=text)


def _window(target: Target, drafter: Drafter) -> Finding:
    body = _body(drafter)
    size, off = body.get("sliding_window"), body.get("use_sliding_window") is False
    sliding = sum(kind == "sliding_attention" for kind in body.get("layer_types") or ())
    windows = getattr(drafter, "windows", ())
    read = [w for w in windows if w]
    notes: list[tuple[Level, str]] = []
    full = "it is read with full attention, and acceptance falls further back than it was trained"
    if read and off:
        text = "layer_types says that layers slide, use_sliding_window: false that none does"
        notes.append(("warning", f"{text}; read as sliding. Make config.json say one thing"))
    elif size and off:
        text = f"sliding_window {size:,} is switched off by use_sliding_window: false"
        notes.append(("note", f"{text}; full attention"))
    elif sliding and not size:
        notes.append(
            ("warning", f"{sliding} layers slide, but no sliding_window says how far: {full}")
        )
    elif size and not read and drafter.kind == "eagle3":
        text = f"sliding_window {size:,} without layer_types is not read, as where it was trained"
        notes.append(("note", f"{text}: full attention; try --draft.window {size} past it"))
    elif size and not read:
        what = "has no layer_types beside it"
        notes.append(("warning", f"sliding_window {size:,} {what}: {full}; add layer_types"))
    if read and min(read) < target.context and not any(target.windows):
        text = f"{len(read)} of {len(windows)} layers see the last {min(read):,} tokens only"
        notes.append(("note", text))
    return _worst(
        "window", notes, "full attention" if not read else f"{min(read):,}, as the target"
    )


def _dtype(target: Target, drafter: Drafter) -> Finding | None:
    if drafter.path is None:
        return None
    sizes: Counter[str] = Counter()
    for file in sorted(drafter.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(key)
                name = STORED.get(part.get_dtype())
                if name is not None:  # a vocabulary map has no format to lose
                    sizes[name] += math.prod(part.get_shape())
    run = str(target.dtype).removeprefix("torch.")
    text = f"stored as {' and '.join(n for n, _ in sizes.most_common())}, run in {run}"
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}
    coarser = [n for n in sizes if bits[n] > bits[run]]
    level: Level = "ok"
    if run == "float16" and set(sizes) - {"float16"}:
        level = "warning"
        text += "; float16 has a smaller range, so large values overflow: use --dtype bfloat16"
    elif coarser:
        level = "note"
        text += "; weights are rounded, its head too: if acceptance is low, try --dtype float32"
    return Finding(name="dtype", level=level, text=text)


def _thinking(tokenizer: PreTrainedTokenizerBase) -> Finding:
    template = str(tokenizer.chat_template or "")
    name = "thinking"
    applied = thinking_of(tokenizer)
    if applied is None and "<think>" not in template:
        return Finding(name=name, level="ok", text="the chat template has no thinking mode")
    mode = "and no switch changes our prompts"
    if applied is not None:
        mode = f"and our prompts leave it {'on' if applied else 'off'} (--thinking, --no-thinking)"
    text = (
        f"the chat template has a thinking mode, {mode}; a drafter trained without thinking drafts "
        "worse with it, and the other way round; --raw takes a prompt written as you like"
    )
    return Finding(name=name, level="note", text=text)


def _worst(name: str, notes: list[tuple[Level, str]], fine: str) -> Finding:
    """One finding of several; `fine` where there is none."""
    if not notes:
        return Finding(name=name, level="ok", text=fine)
    worst, _ = max(notes, key=lambda pair: LEVELS.index(pair[0]))
    return Finding(name=name, level=worst, text="; ".join(text for _, text in notes))
