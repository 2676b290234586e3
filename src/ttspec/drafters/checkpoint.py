"""Drafters on disk: which kind a folder holds, reading it strictly, writing it.

The kind is recognised from the files alone, names are brought to one form, and every tensor is
accounted for. Pickles are never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.drafters.causal import Causal
from ttspec.drafters.config_keys import refuse_keys
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.dflash2 import DFlash2
from ttspec.drafters.domino import Domino
from ttspec.drafters.dspark import DSpark
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.mtp_names import native_names
from ttspec.drafters.pard import Pard
from ttspec.drafters.peagle import PEagle
from ttspec.drafters.vocabulary import ids_of
from ttspec.errors import CheckpointError, TtspecError, writing
from ttspec.models.weight_checks import refuse_layers

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT_DRAFTERS = {"smollm2-135m": "smollm2-135m-dflash"}
"""What `auto` means, by target name."""
KINDS: dict[str, type[Drafter]] = {
    c.kind: c for c in (Mtp, PEagle, Pard, Domino, DSpark, DFlash2, DFlash, Eagle3, Causal)
}
"""In the order in which a config is shown to them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
EAGLE = "EAGLE-1 or EAGLE-2 (it reads one hidden state of the target, and has no head of its own)"
UNREADABLE = {
    "dflare": "DFlare (each layer mixes the taps for itself)",
    "(gemma4|k3|qwen3omni)dspark|dsparkv": "DSpark on layers of another family than Qwen3's",
    "jetspec": "JetSpec of speculators (a causal block that is fed real tokens)",
    "(?<!p)(?<!p-)eagle(?!-?3)": EAGLE,
}
"""Relatives that would load in part and draft badly, by a pattern of their architecture's name."""
SINCE_EAGLE3 = {
    "d2t",
    "hidden_norm.weight",
    "lm_head.weight",
    "midlayer.hidden_norm.weight",
    "norm.weight",
}
"""Tensors of EAGLE-3 and DFlash; the official files of EAGLE-1 and EAGLE-2 have none of them."""
IGNORED = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$"  # computed from the config
    r"|^verifier_(norm|lm_head)\.weight$"  # copies of the target's, for training
)
"""Names of tensors that are in some files and that nobody needs."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.key}"


def load_drafter(name: str, folder: Path) -> Drafter:
    """Read a drafter from a local folder.

    Raises:
        CheckpointError: The files are missing, damaged, of no known kind, or do not fit.
    """
    config = read_config(folder)
    stored = _read_headers(folder)
    try:
        kind = kind_of(config, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {config.get('architectures')}, which is no drafter"
            " that ttspec knows.\n"
            f"Known kinds: {', '.join(KINDS)}, in original or speculators form."
        )
    return _load(kind, config, stored, name, folder)


def load_native_head(folder: Path, config: Any) -> Drafter | None:
    """Read the MTP head that a target was published with; None if its files hold none.

    Raises:
        CheckpointError: There is one of a form that ttspec does not read, or it is damaged.
    """
    stored = _read_headers(folder)
    names = native_names(config, stored)
    if not names:
        return None
    body = {**config.to_dict(), "architectures": ["MTPDraftModel"]}
    for key in ("_name_or_path", "transformers_version"):
        body.pop(key, None)
    return _load("mtp", body, {n: stored[n] for n in names}, "mtp", folder)


def _load(
    kind: str, config: Mapping[str, Any], stored: Mapping[str, Stored], name: str, folder: Path
) -> Drafter:
    """A drafter of a known kind with its weights."""
    found: dict[str, Stored] = {}
    for key, tensor in stored.items():
        if IGNORED.search(key):
            continue
        first = found.setdefault(canonical(kind, key), tensor)
        if first is not tensor:
            raise CheckpointError(
                f"{tensor} is another name of {first.key}.\nKeep one of the two tensors."
            )
    drafter = make_drafter(kind, config, found, name=name, path=folder)
    _require_tensors(folder, drafter, found)
    drafter.weights = _read_weights(drafter, found)
    if "d2t" in drafter.weights:
        _check_map(drafter, found)
    return drafter


def make_drafter(
    kind: str,
    config: Mapping[str, Any],
    names: Collection[str] = (),
    *,
    name: str = "",
    path: Path | None = None,
) -> Drafter:
    """A drafter of a kind without its weights; `names` are the tensors there are.

    Raises:
        CheckpointError: The config is not complete.
    """
    where = path / "config.json" if path else "The config"
    try:
        refuse_layers(config, len(names))
        refuse_keys(kind, config, str(where))
        drafter = KINDS[kind](config, {}, name=name or kind, path=path, names=names)
        drafter.shapes()
        if drafter.length < 1:
            raise ValueError(f"a round has {drafter.length} drafts")
    except TtspecError as error:
        message = str(error)
        if not message.startswith(str(where)):
            message = f"{where}: {message}"
        raise CheckpointError(message) from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,  # torch, of a size below 0
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else reason
        raise CheckpointError(
            f"{where} is not a complete {kind} config: {reason}.\nCompare it with a published one."
        ) from error
    return drafter


def save_drafter(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], shard: str = "5GB"
) -> None:
    """Write config.json and safetensors as published; `shard` is the largest file.

    Raises:
        CheckpointError: The folder holds a checkpoint already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = sorted(p.name for p in folder.glob("*.safetensors"))
    if taken:
        raise CheckpointError(
            f"{folder} holds {taken[0]} already; nothing was overwritten.\nGive an empty folder."
        )
    tensors = {k: w.detach().to("cpu", copy=True).contiguous() for k, w in weights.items()}
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    with writing(folder):
        save_torch_state_dict(tensors, folder, max_shard_size=shard, metadata={"format": "pt"})
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # findings/safetensors_0_8_replaces_files.sh


def kind_of(config: Mapping[str, Any], names: Collection[str] = ()) -> str | None:
    """Which kind of drafter a config.json and the tensors beside it are; None for none we know.

    Raises:
        CheckpointError: It is a relative of a known kind that would load in part only.
    """
    if relative := _relative(config, {canonical("eagle3", n) for n in names}):
        raise CheckpointError(
            f"{config.get('architectures')} is {relative}, which ttspec does not read.\n"
            f"Known kinds: {', '.join(KINDS)}."
        )
    if config.get("speculators_model_type") is not None:
        return config["speculators_model_type"]
    for kind, family in KINDS.items():
        if family.recognises(config, {canonical(kind, n) for n in names}):
            return kind
    return None


def _relative(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """What it is, if it is of the family of a known kind, but not it; names are EAGLE-3's."""
    asked = config.get("speculators_model_type")
    named = f"{config.get('architectures')} {asked}".lower()
    found = next((what for p, what in UNREADABLE.items() if re.search(p, named)), None)
    if found is None and "fc.weight" in names and SINCE_EAGLE3.isdisjoint(names):
        return EAGLE
    if found is None and asked is not None and asked not in KINDS:
        return f"of speculators_model_type {asked!r}"
    return found


def canonical(kind: str, name: str) -> str:
    """A tensor's one name, whatever the file calls it."""
    for pattern, plain in KINDS[kind].aliases:
        name = re.sub(pattern, plain, name)
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: There is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json.\nGive a drafter's folder or hub id.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.\nFetch it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object.\nFetch it again.")
    return config


def missing_and_left_over(
    drafter: Drafter, found: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Tensors that a drafter lacks, that it has no use for, and whose shape is wrong.

    `found` are shapes by canonical name.
    """
    needed = drafter.shapes()
    known = needed | drafter.optional()
    both = sorted(found.keys() & known.keys())
    same = {n: _without_ones if n in drafter.vectors else tuple for n in both}
    wrong = [n for n in both if same[n](found[n]) != same[n](known[n])]
    return sorted(needed.keys() - found.keys()), sorted(found.keys() - known.keys()), wrong


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without leading dimensions of size 1."""
    return _without_ones(shape[1:]) if shape[:1] == (1,) else tuple(shape)


def _read_headers(folder: Path) -> dict[str, Stored]:
    """What the folder's safetensors hold, by published name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors{_conversion(folder)}")
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    shape = tuple(opened.get_slice(key).get_shape())
                    stored[key] = Stored(file, key, shape)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated: {error}.\nFetch or write it again."
            ) from error
    return stored


def _require_tensors(folder: Path, drafter: Drafter, found: Mapping[str, Stored]) -> None:
    """Refuse files that hold other tensors than the drafter's, or of other shapes."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    missing, extra, wrong = missing_and_left_over(drafter, shapes)
    together = "config.json and weights must belong together."
    if missing:
        hint = _conversion(folder) if _pickles(folder) else f".\n{together}"
        raise CheckpointError(
            f"{folder} lacks {missing[0]} ({len(missing)} tensors missing, {len(extra)} left over)"
            f"{hint}"
        )
    if extra:
        raise CheckpointError(
            f"{found[extra[0]]} has no place in a {drafter.kind} drafter of this config.json "
            f"({len(extra)} tensors left over).\n{together}"
        )
    if wrong:
        first, known = found[wrong[0]], (drafter.shapes() | drafter.optional())[wrong[0]]
        raise CheckpointError(
            f"{first} is {list(first.shape)}; config.json says {list(known)}.\n{together}"
        )


def _read_weights(drafter: Drafter, found: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors by canonical name, as they are stored.

    Raises:
        CheckpointError: One is of a dtype that is of no use there, or not finite.
    """
    weights, shapes = dict[str, Tensor](), drafter.shapes() | drafter.optional()
    for name, tensor in found.items():
        with safe_open(tensor.file, framework="pt") as opened:
            read = opened.get_tensor(tensor.key).view(shapes[name])
        integer = name in ("d2t", "t2d")
        if read.is_floating_point() == integer or read.element_size() < (1 if integer else 2):
            raise CheckpointError(
                f"{tensor} holds {str(read.dtype).removeprefix('torch.')}, which a drafter cannot "
                "use there.\nGive weights in float32, bfloat16 or float16."
            )
        if not integer:
            read = read.clone()  # products of a file's mapped memory round otherwise
            if not torch.isfinite(read).all():
                raise CheckpointError(
                    f"{tensor} holds values that are not finite.\nFetch or train it again."
                )
        weights[name] = read
    return weights


def _check_map(drafter: Drafter, found: Mapping[str, Stored]) -> None:
    """Refuse a vocabulary map that leads outside the target's vocabulary, or twice to one token."""
    d2t, vocabulary = drafter.weights["d2t"], drafter.vocabulary  # type: ignore[attr-defined]
    ids = ids_of(d2t, vocabulary)
    if ids is None:
        return
    t2d = drafter.weights.get("t2d")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) < len(ids):
        raise CheckpointError(
            f"{found['d2t']} leads outside the target's {vocabulary} tokens, or twice to one token."
            "\nIt holds offsets: target token = draft token + d2t."
        )
    if not bool((ids[1:] > ids[:-1]).all()):
        raise CheckpointError(
            f"{found['d2t']} is not in the order of the target's tokens.\n"
            "Sort the draft vocabulary, and the rows of lm_head.weight with it."
        )
    if t2d is not None and not (t2d[ids].bool().all() and int(t2d.sum()) == len(ids)):
        raise CheckpointError(
            f"{found['t2d']} and d2t speak of different tokens.\nFetch or write them again."
        )


def _pickles(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)


def _conversion(folder: Path) -> str:
    """How to get rid of a pickle."""
    pickles = _pickles(folder)
    if not pickles:
        return ".\nGive a folder with config.json and *.safetensors."
    name = pickles[0]
    return (
        f"; {name} is a pickle, which can run code and is not read.\nIf you trust it: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{name}', "
        f"weights_only=True), '{Path(name).with_suffix('.safetensors')}')\""
    )
