"""What an EAGLE-3 config.json leaves open: taps (drafters.md 0.1), and the number of layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

TAP_KEY = "eagle_aux_hidden_state_layer_ids"


def default_eagle3_taps(layers: int) -> tuple[int, int, int]:
    """Hidden states that a head without layer ids reads."""
    return 2, layers // 2, layers - 3


def taps_of(config: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Hidden states to read, and how the config's ids were understood."""
    if left := config.get("target_layer_ids"):  # DeepSpec's
        return tuple(int(k) + 1 for k in left), f"target_layer_ids {left} leave a layer: + 1"
    key, table = TAP_KEY, config.get("eagle_config") or {}
    top, nested = config.get(key), table.get(key)
    ids = [int(k) for k in top or nested or ()]
    if not ids:
        return (), f"no {key}: 2, L / 2 and L - 3 of a target of L layers"
    if ids[0] == 2 or (top and ids[0] != 1):
        return tuple(ids), f"{key} {ids} enter a layer: as they are"
    return tuple(k + 1 for k in ids), f"{key} {ids} leave a layer: + 1"


def layers_of(body: Mapping[str, Any], names: Collection[str]) -> int:
    """How many layers the files hold; without files, what the config says.

    Code that trains a head of one layer copies the number of the target's.
    """
    layers = int(body["num_hidden_layers"])
    if layers < 1:
        raise ValueError(f"num_hidden_layers is {layers}")
    more = re.compile(r"layers\.([1-9]\d*)\.self_attn\.")
    held = [int(found[1]) for name in names if (found := more.match(name))]
    return 1 + max(held, default=0) if names else layers
