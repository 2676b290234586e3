"""How much memory there is: what a device has free, and what the limits of this process leave.

What things take is in `decoding/memory_forecast.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch


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


def mib(size: int) -> str:
    """For people."""
    return f"{size / 2**20:,.1f} MiB"


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
