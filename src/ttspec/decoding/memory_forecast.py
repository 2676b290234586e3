"""What target, drafter, caches and learning take in memory, estimated before any of it is taken.

Weights come from the files' headers, caches from shapes; `working_memory.py` has what comes and
goes. The loader, the engine, `bench`, `train` and the server ask it how much fits. What cannot be
estimated is None, and nothing is refused for it.
"""

from __future__ import annotations

import copy
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.stages import round_widths
from ttspec.decoding.working_memory import peak_bytes, replay_buffer_bytes
from ttspec.drafters.base import Drafter
from ttspec.errors import ResourceError
from ttspec.learning.live_weights import (
    bytes_of_copy,
    bytes_of_memory,
    learned_numbers,
    resolve_learn_config,
)
from ttspec.models.target import Target
from ttspec.models.unsupported import ORDINARY, RECURRENT

ODD_CACHES = ("num_kv_shared_layers", "global_head_dim", "num_global_key_value_heads")
"""Config entries with which layers' keys differ in ways that are not counted here."""
USABLE_SHARE = 0.9
"""Share of what is free that rows may be chosen for: not all that is taken is estimated."""
FEWER_ROWS = "Use a smaller --context, fewer rows, --no-learn or --learn.weights lora."
SMALLER_WEIGHTS = (
    "Use another --dtype, a quantised or smaller target, --device-map auto or more memory."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes, at full length; None is not known."""

    target: int | None = None
    drafter: int | None = None
    target_cache: int | None = None
    drafter_cache: int | None = None
    learning: int | None = None
    replay_buffer: int | None = None
    working: int | None = None

    @property
    def total(self) -> int:
        """Of all that is known."""
        return sum(size for _, size in self._parts())

    @property
    def at_once(self) -> int:
        """Of what is taken before a cache is full."""
        return (self.learning or 0) + (self.replay_buffer or 0) + (self.working or 0)

    def __str__(self) -> str:
        """The parts that take anything, and their sum."""
        parts = [f"{name} {mib(size)}" for name, size in self._parts() if size]
        return f"{mib(self.total)} ({', '.join(parts)})" if len(parts) > 1 else " ".join(parts)

    def _parts(self) -> list[tuple[str, int]]:
        named = {
            "target": self.target,
            "drafter": self.drafter,
            "target's cache": self.target_cache,
            "drafter's cache": self.drafter_cache,
            "learning": self.learning,
            "lessons": self.replay_buffer,
            "work": self.working,
        }
        return [(name, size) for name, size in named.items() if size is not None]


def forecast_run(
    target: Target,
    drafter: Drafter | None,
    config: GenerateConfig,
    rows: int,
    slots: int,
    prompt: int | None = None,
) -> Forecast:
    """What a decoder will take besides the weights, every cache full, every row learning.

    `prompt` are the tokens of the longest one; None is as many as a row has slots.
    """
    learn = config.learn
    drafts, _, width = round_widths(drafter, config.draft, batch_invariant=config.deterministic)
    if not drafts:
        drafter = None
    if drafter is None or not drafter.weights:
        learn = None
    if drafter and learn:
        learn = resolve_learn_config(learn, drafter, rows)
    shape = {"rows": rows, "prompt": prompt or slots, "drafts": drafts, "width": width}
    cache = target_cache_bytes(target.config, rows, slots, target.dtype, width=width)
    if own := getattr(target, "cache_bytes", None):  # it keeps something else
        cache = own(rows, slots)
    return Forecast(
        target_cache=cache,
        drafter_cache=drafter_cache_bytes(drafter, rows, slots, config.draft) if drafter else 0,
        learning=learning_bytes(drafter, learn, rows) if drafter and learn else 0,
        replay_buffer=replay_buffer_bytes(target, learn, rows, drafts),
        working=peak_bytes(target, drafter, config, learn, **shape),
    )


def fitting_rows(need: Callable[[int], Forecast], target: Target, most: int) -> int:
    """How many rows fit, caches full: 1 to `most`; `most` where nothing is known.

    `need` says what so many rows take.
    """
    free = free_memory(target.device)
    if free is None or target.is_split:
        return most
    rows = range(1, most + 1)
    return max(1, bisect_left(rows, True, key=lambda n: need(n).total > USABLE_SHARE * free))


def target_cache_bytes(
    config: Any, rows: int, slots: int, dtype: torch.dtype, *, width: int = 1
) -> int | None:
    """Bytes of a `RowCache` for a target, every layer allocated; None if they are not known.

    Args:
        config: The target's transformers config.
        rows: Conversations side by side.
        slots: Tokens of each; a cache has one more for what falls outside.
        dtype: Of keys and values.
        width: Tokens of a verification, which recurrent layers keep beside their states.
    """
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ODD_CACHES):
        return None
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key, value = getattr(text, "qk_head_dim", size), getattr(text, "v_head_dim", size)
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(kind in ORDINARY for kind in types)
    states = sum(kind == RECURRENT for kind in types) * rows
    if states:
        states *= state_bytes(text, width, dtype)
    return layers * rows * heads * (slots + 1) * (key + value) * dtype.itemsize + states


def state_bytes(text: Any, width: int, dtype: torch.dtype) -> int:
    """Bytes of one row's state in one gated delta net, with what a verification leaves to it."""
    key_heads, heads = text.linear_num_key_heads, text.linear_num_value_heads
    size, wide = text.linear_key_head_dim, text.linear_value_head_dim
    channels = 2 * key_heads * size + heads * wide
    inputs = channels * (text.linear_conv_kernel_dim - 1 + width) * dtype.itemsize
    kept = width * (key_heads * size + heads * wide + heads)
    return 8 + inputs + 4 * (heads * size * wide + kept)


def drafter_cache_bytes(drafter: Drafter, rows: int, slots: int, options: DraftConfig) -> int:
    """Bytes of what a bound drafter keeps of the text: its state is made without memory."""
    ghost = copy.copy(drafter)
    if drafter.weights:  # n-grams have none, keep ids only, and know no embedding
        ghost.embedding = drafter.embedding.to("meta")
    return ghost.start(rows, slots, options).nbytes


def drafter_weight_bytes(drafter: Drafter | None, dtype: torch.dtype) -> int:
    """Bytes of a drafter's weights once they are in the target's dtype."""
    weights = drafter.weights.values() if drafter else ()
    return sum(w.numel() * (dtype.itemsize if w.is_floating_point() else 8) for w in weights)


def learning_bytes(drafter: Drafter, config: LearnConfig, rows: int) -> int:
    """Bytes of all copies of what learns: `learning_row_bytes` for each row, or once for all."""
    if not drafter.weights:
        return 0
    config = resolve_learn_config(config, drafter, rows)
    copies = 1 if config.scope == "shared" else rows
    beside = bytes_of_memory(config, drafter, config.weights)
    return copies * learning_row_bytes(drafter, config) + beside


def learning_row_bytes(drafter: Drafter, config: LearnConfig) -> int:
    """Bytes a copy: float32 master, gradient and two moments, the live copy and its gradient."""
    if not drafter.weights:
        return 0
    gradient = learned_numbers(config, drafter, config.weights) * drafter.embedding.element_size()
    return bytes_of_copy(config, drafter, config.weights) + gradient


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None if that is not known."""
    if device.type == "cuda":
        # Torch keeps what was freed for what is like it; other streams and graphs get none of it.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    meminfo = _fields(Path("/proc/meminfo"))
    if "MemAvailable" not in meminfo:
        return None
    room = [meminfo["MemAvailable"] * 1024, *_rooms(Path("/sys/fs/cgroup"))]
    # Swap is slow, but what fits into it is no reason to refuse.
    return min(room) + meminfo.get("SwapFree", 0) * 1024


def require_weights(
    target: int, drafter: int, devices: list[torch.device], *, name: str, split: bool = False
) -> str | None:
    """Refuse weights that do not fit, before they are read.

    Args:
        target: Bytes of the target's weights.
        drafter: Bytes of the drafter's.
        devices: Where they go.
        name: The target's.
        split: The target is spread over the devices, and who gets what is not known: nothing is
            refused then.

    Returns:
        A notice, if one is due all the same.

    Raises:
        ResourceError: There is less memory than they take.
    """
    free = [free_memory(device) for device in devices]
    need = Forecast(target=target, drafter=drafter)
    if None in free or need.total <= sum(filter(None, free)):
        return None
    there = mib(sum(filter(None, free)))
    text = f"The weights of {name} take {need}; {_named(devices)}: {there} free."
    if split:
        return text
    raise ResourceError(f"{text}\n{SMALLER_WEIGHTS}")


def require_room(
    need: Forecast, device: torch.device, *, rows: int, slots: int, split: bool = False
) -> str | None:
    """Refuse caches and learning that do not fit, before they are made.

    On a CPU a cache takes memory only as it is filled, and most are never full: there only what
    learning and a round take at once is refused. Returns and raises as `require_weights`.
    """
    free = free_memory(device)
    if free is None or need.total <= free:
        return None
    lines = f"{rows} row{'s' if rows > 1 else ''} of {slots:,} tokens take {need}"
    text = f"{lines}; {device.type}: {mib(free)} free."
    if split or (device.type == "cpu" and need.at_once <= free):
        return f"{text} It will do unless they are filled. {FEWER_ROWS}"
    raise ResourceError(f"{text}\n{FEWER_ROWS}")


def mib(size: int) -> str:
    """For people."""
    return f"{size / 2**20:,.1f} MiB"


def _named(devices: list[torch.device]) -> str:
    return devices[0].type if len(devices) == 1 else f"{len(devices)} {devices[0].type} devices"


def _fields(path: Path) -> dict[str, int]:
    """Numbers by name of a file such as /proc/meminfo; none if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    parts = [line.replace(":", " ").split() for line in lines]
    return {part[0]: int(part[1]) for part in parts if len(part) > 1 and part[1].isdigit()}


def _rooms(root: Path) -> list[int]:
    """Bytes left below the limits of this process's control groups, versions 2 and 1."""
    found = []
    for folder, most, used in (
        *((own, "memory.max", "memory.current") for own in _groups(root, "")),
        *(
            (own, "memory.limit_in_bytes", "memory.usage_in_bytes")
            for own in _groups(root / "memory", "memory")
        ),
    ):
        try:
            limit = int((folder / most).read_text(encoding="utf-8"))  # "max" where there is none
            taken = int((folder / used).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        # Files that were read count as taken, and make room when it is needed.
        stat = _fields(folder / "memory.stat")
        files = sum(stat.get(f"{kind}_file", 0) for kind in ("inactive", "active"))
        found.append(max(0, limit - max(0, taken - files)))
    return found


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it."""
    own = Path("/proc/self/cgroup")
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return [root]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and root.is_dir():
            inner = Path(os.path.normpath(f"{root}/{path}"))
            return [p for p in (inner, *inner.parents) if p == root or root in p.parents]
    return [root]
