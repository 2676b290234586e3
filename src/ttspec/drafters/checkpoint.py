"""Drafters on disk: which class a folder holds, reading it strictly, writing it as published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.drafters.dflash import DFlash
from ttspec.errors import CheckpointError

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT_DRAFTERS = {"smollm2-135m": "smollm2-135m-dflash"}
"""What `auto` means, by target name."""
ALIASES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
KINDS: dict[str, Callable[..., Drafter]] = {"dflash": DFlash}


def load_drafter(name: str, folder: Path) -> Drafter:
    """Read a drafter from a local folder.

    Args:
        name: What to call it.
        folder: Holds config.json and safetensors.

    Raises:
        CheckpointError: The files are missing, damaged, of no known kind, or do not fit.
    """
    config = _read_config(folder)
    kind = kind_of(config)
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {config.get('architectures')}, which is no drafter"
            f" that ttspec knows.\nKnown kinds: {', '.join(KINDS)}."
        )
    try:
        drafter = KINDS[kind](config, {}, name=name, path=folder)
        shapes = drafter.shapes()  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not a complete {kind} config: {error!r}.\n"
            "Compare it with a published one."
        ) from error
    drafter.weights = _read_weights(folder, shapes)
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
    tensors = {k: w.detach().to("cpu").contiguous() for k, w in weights.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=shard, metadata={"format": "pt"})
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Which kind of drafter a config.json describes; None for none that we know."""
    names = config.get("architectures") or []
    if "dflash_config" in config or "DFlash" in str(names):
        return "dflash"
    return None


def _read_config(folder: Path) -> dict[str, Any]:
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


def _read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        raise CheckpointError(
            f"{folder} has no safetensors"
            + (f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else "")
            + ".\nConvert it in a sandbox: safetensors.torch.save_file(torch.load(FILE), OUT)."
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    name: str = key.removeprefix("model.")
                    weights[ALIASES.get(name, name)] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated: {error}.\nFetch or write it again."
            ) from error
    missing, extra = sorted(shapes.keys() - weights), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which config.json rules out"
        raise CheckpointError(
            f"{folder} {what} ({len(missing)} tensors missing, {len(extra)} left over).\n"
            "config.json and weights must belong together."
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{folder}: {name} is {list(weights[name].shape)}, config.json says {list(shape)}."
                "\nconfig.json and weights must belong together."
            )
        if not torch.isfinite(weights[name]).all():
            raise CheckpointError(
                f"{folder}: {name} holds values that are not finite.\nFetch or train it again."
            )
    return weights
