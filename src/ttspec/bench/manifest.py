"""How a run was made: versions, machine, models and their checksums, command line."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ttspec.decoding.template import thinking_of

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.drafters.base import Drafter

PACKAGES = ("ttspec", "torch", "transformers")


def describe(engine: Engine, *, title: str) -> dict[str, Any]:
    """What somebody needs to run it again, as JSON values; what is not known is None."""
    target, drafter = engine.target, engine.drafter
    program, *rest = sys.argv
    program = Path(program).name.replace("__main__.py", "ttspec")
    return {
        "title": title,
        "command": shlex.join([program, *rest]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {
            "name": target.name,
            "origin": target.origin,
            "parameters": sum(p.numel() for p in target.model.parameters()),
            "sha256": weights_checksum(target.path),
        },
        "drafter": drafter and describe_drafter(drafter),
        "thinking": thinking_of(target.tokenizer),
        **describe_device(engine),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
    }


def describe_device(engine: Engine) -> dict[str, Any]:
    """Where an engine runs, and how."""
    target = engine.target
    return {
        "dtype": str(target.dtype).removeprefix("torch."),
        "compiled": engine.compile,
        "device": device_name(target.device),
        "clocks": gpu_clocks(target.device),
        "threads": torch.get_num_threads(),
        "git": git_revision(),
    }


def run_label(manifest: Mapping[str, Any]) -> str:
    """What every output of a replay says; nothing of a run that was live."""
    found = manifest.get("replay")
    return f"replay of {found['run']}: {found['arm']}" if found else ""


def run_notice(manifest: Mapping[str, Any]) -> str:
    """The same for people who do not know what that means."""
    if not (found := manifest.get("replay")):
        return ""
    text = f"The text is that of the arm {found['arm']} in {found['run']} ({found['dtype']})"
    if found["dtype"] != manifest["dtype"]:
        text += f", read in {manifest['dtype']}"
    if found.get("timed"):
        return f"{text}, in all arms: where an arm would have chosen another token, it was given."
    return (
        f"{text}, which the target has read once: acceptance means something here; there are no "
        "times."
    )


def describe_drafter(drafter: Drafter) -> dict[str, Any]:
    """What tells a drafter from any other."""
    return {
        "name": drafter.name,
        "kind": drafter.kind,
        "length": drafter.length,
        "parameters": drafter.parameters,
        "sha256": weights_checksum(drafter.path),
    }


def weights_checksum(folder: Path | None) -> str | None:
    """sha256 over a folder's safetensors files in the order of their names, or of a GGUF file."""
    if folder is None:
        return None
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest() if files else None


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or "CPU"


def gpu_clocks(device: torch.device) -> dict[str, str] | None:
    """What the driver says of a GPU's clocks (MHz) and power limit (W) now; None on a CPU."""
    if device.type != "cuda":
        return None
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = [f"--query-gpu={','.join(names)}", f"--id={uuid}", "--format=csv,noheader"]
    values = [v.strip() for v in (_output(["nvidia-smi", *query]) or "").split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def git_revision() -> str | None:
    """The revision of the checkout this package runs from, if it runs from one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    # Not `describe --dirty`, which locks the index: cut short, by a full disk say, it stays locked.
    git = ["git", "--no-optional-locks", "-C", str(root)]
    revision = _output([*git, "describe", "--always", "--abbrev=12"])
    if not revision:
        return None
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{revision}-dirty" if changed else revision


def _output(command: list[str]) -> str | None:
    """What a program prints, if it is there and all is well."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (found.stdout.strip() or None) if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
