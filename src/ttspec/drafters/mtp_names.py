"""What the tensors of an MTP head are called: in its target's files, by speculators, and here.

Here they are called as Qwen's files have them, without `mtp.`, and experts as transformers has
them: one tensor for the matrices of all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ttspec.errors import CheckpointError

OF_LAYER = {
    "pre_fc_norm_embedding.": "enorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "fc.": "eh_proj.",
    "norm.": "shared_head.norm.",
    "layers.0.": "",
}
"""How names begin here, and in files of GLM-4 MoE and DeepSeek-V3, where the head is called as the
layer after the target's last one: behind `model.layers.N.`"""
OF_SPECULATORS = {
    "pre_fc_norm_embedding.": "token_layernorm.",
    "pre_fc_norm_hidden.": "hidden_layernorm.",
    "fc.": "input_proj.",
    "norm.": "final_layernorm.",
    "layers.0.": "",
}
"""The same of speculators, behind `mtp_layers.0.`"""
ALIASES = (
    (r"^(model\.)?mtp\.", ""),  # Qwen3-Next, Qwen3.5 and kin
    *((rf"^model\.layers\.\d+\.{re.escape(own)}", ours) for ours, own in OF_LAYER.items()),
    *((rf"^mtp_layers\.0\.{re.escape(own)}", ours) for ours, own in OF_SPECULATORS.items()),
)
"""Patterns of other names, and what replaces them."""
EXPERT = re.compile(r"(.*mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
"""An expert's own matrix, as most files have it; transformers keeps those of all experts in one."""
NATIVE = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "glm4_moe", "deepseek_v3")
"""Families of targets whose own heads were compared with another implementation."""
NUMBERED = ("glm4_moe", "deepseek_v3")
"""Of these, those whose head is called as the layer after the last one."""
STACKED = ("qwen3_5_moe_text",)
"""Those whose files may hold the matrices of all experts in one."""


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which the matrices of all experts are one, as transformers keeps them."""
    whole = {n: w for n, w in weights.items() if not EXPERT.match(n)}
    parts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, weight in weights.items():
        if found := EXPERT.match(name):
            at, index, part = found.groups()
            parts.setdefault(at, {}).setdefault(part, {})[int(index)] = weight
    for at, by_part in parts.items():
        stack = {p: torch.stack([by[i] for i in sorted(by)]) for p, by in by_part.items()}
        whole[f"{at}.gate_up_proj"] = torch.cat([stack["gate_proj"], stack["up_proj"]], dim=1)
        whole[f"{at}.down_proj"] = stack["down_proj"]
    return whole


def unstacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `stacked`."""
    apart: dict[str, Tensor] = {}
    for name, weight in weights.items():
        at, _, part = name.rpartition(".")
        if not at.endswith("mlp.experts"):
            apart[name] = weight
            continue
        parts = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {"down_proj": 0}
        for i, expert in enumerate(weight):
            halves = expert.chunk(len(parts))
            apart |= {f"{at}.{i}.{p}.weight": halves[half] for p, half in parts.items()}
    return apart


def native_names(config: Any, names: Collection[str]) -> list[str]:
    """Which of a target's tensors are its own MTP head; none if it has none.

    Raises:
        CheckpointError: There is one that ttspec does not read.
    """
    layers, found = int(config.num_hidden_layers), []
    for name in names:
        number = re.match(r"model\.layers\.(\d+)\.", name)
        if re.match(r"(model\.)?mtp\.", name) or (number and int(number[1]) >= layers):
            found.append(name)
    kind = config.model_type
    if found and kind not in NATIVE:
        raise CheckpointError(
            f"The target ({kind}) has an MTP head of a family that was not tried; tried are "
            f"{', '.join(NATIVE)}.\nTrain one with `ttspec train --kind mtp`, or give another "
            "drafter."
        )
    numbers = {m[1] for n in found if (m := re.search(r"layers\.(\d+)\.", n))}
    if len(numbers) > 1:
        raise CheckpointError(
            f"The target's MTP head has {len(numbers)} layers; heads of one layer can be read.\n"
            "Train one with `ttspec train --kind mtp`, or give another drafter."
        )
    shared = (".embed_tokens.weight", ".shared_head.head.weight")  # copies of the target's
    return [n for n in found if not n.endswith(shared)]


def published_names(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's weights under the names that they have in its target's files."""
    if config["model_type"] not in NUMBERED:
        return {f"mtp.{name}": weight for name, weight in weights.items()}
    at = f"model.layers.{config['num_hidden_layers']}."
    return {at + _replaced(name, OF_LAYER): weight for name, weight in weights.items()}


def speculators_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's weights under the names of speculators."""
    return {f"mtp_layers.0.{_replaced(n, OF_SPECULATORS)}": w for n, w in weights.items()}


def _replaced(name: str, places: Mapping[str, str]) -> str:
    """A name with its beginning replaced."""
    old = next(start for start in places if name.startswith(start))
    return places[old] + name.removeprefix(old)
