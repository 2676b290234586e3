"""What of an installed vLLM, a target and a drafter fits together, before anything is served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ttspec.drafters.base import Drafter
from ttspec.errors import TtspecError
from ttspec.learning.live_weights import bytes_of_copy, bytes_of_memory, resolve_learn_config
from ttspec.vllm import hooks
from ttspec.vllm.module import learned_names
from ttspec.vllm.settings import Settings
from ttspec.vllm.verified import room_for

METHOD_OF = {
    "eagle3": "eagle3",
    "dflash": "dflash",
    "pard": 'draft_model, with "parallel_drafting": true (else it drafts token by token)',
    "causal": "draft_model",
}
"""vLLM's name of the method of a kind of drafter."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at."""

    name: str
    fits: bool
    text: str


def examine_engine(folder: Path | None) -> list[Line]:
    """The installed vLLM, in `folder`; None where there is none."""
    if folder is None:
        return [Line("vllm", False, "not installed here; run this where vLLM is")]
    version = hooks.version_of(folder)
    unknown = hooks.unknown_version(version)
    lines = [Line("vllm", not unknown, unknown or f"{version}, whose hooks are known")]
    for runner, table in hooks.HOOKS.items():
        missing = hooks.missing_hooks(folder, runner)
        told = f"no {missing[0]}" if missing else f"all {len(table)} hooks are there"
        lines.append(Line(f"{runner} runner", not missing, told))
    return lines


def examine_pair(target: Path, drafter: Drafter, settings: Settings) -> list[Line]:
    """A drafter and the folder of a target, whose weights are not read."""
    config = json.loads((target / "config.json").read_text("utf-8"))
    text = config.get("text_config") or config
    if drafter.kind not in METHOD_OF:
        return [
            Line("drafter", False, f"the plugin learns {', '.join(METHOD_OF)}; no {drafter.kind}")
        ]
    lines = [Line("drafter", True, f"{drafter.kind}: vLLM's method {METHOD_OF[drafter.kind]}")]
    if drafter.config.get("quantization_config"):
        lines.append(Line("weights", False, "quantised: they cannot be written in place"))
    try:
        # Sizes only: a table of one zero.
        table = torch.zeros(1).expand(int(text["vocab_size"]), int(text["hidden_size"]))
        drafter.bind(table, table, int(text["num_hidden_layers"]))
    except TtspecError as error:
        return [*lines, Line("target", False, " ".join(str(error).splitlines()))]
    except KeyError as error:
        return [*lines, Line("target", False, f"its config.json does not say {error}")]
    taps = f", taps {', '.join(map(str, drafter.taps))}" if drafter.taps else ""
    lines.append(Line("target", True, f"the drafter is bound to {target.name}{taps}"))
    return [*lines, _memory(drafter, settings, config)]


def _memory(drafter: Drafter, settings: Settings, config: Mapping[str, Any]) -> Line:
    """What learning takes, in the dtype of the target."""
    element = 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2
    _, rounds = room_for(drafter, settings.rows, drafter.length + 1, element)
    learn = resolve_learn_config(settings.learn, drafter, 1)
    weights = bytes_of_copy(learn, drafter) + bytes_of_memory(learn, drafter)
    count = len(learned_names(drafter, learn))
    return Line(
        "memory",
        True,
        f"{weights / 1e6:.0f} MB for {count} weights that learn ({learn.weights}); "
        f"{rounds / 1e6:.0f} MB for rounds of {settings.rows} requests",
    )
