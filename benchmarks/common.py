"""What the benchmarks share: where results go, `ttspec bench run` as a process, clocks, tables."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import IO, Any

import torch
from cyclopts import App

from ttspec.drafters.checkpoint import BUNDLED, read_config
from ttspec.errors import TtspecError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
INTERRUPTED = 130


def main(app: App) -> None:
    """Run one command line and exit; what a user can mend is said in two lines."""
    try:
        sys.exit(app() or 0)
    except TtspecError as error:
        sys.exit(f"error: {error}")


def bench_run(
    out: Path, options: Mapping[str, Any], *, gpu: str = "", log: IO[str] | None = None
) -> int:
    """Start one `ttspec bench run` and wait; its exit status. True is a flag, False is left out."""
    command = [sys.executable, "-m", "ttspec.cli", "bench", "run", "--out", str(out)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] * value if isinstance(value, bool) else [flag, str(value)]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    try:
        return subprocess.run(command, stdout=log, stderr=log, env=env, check=False).returncode
    except KeyboardInterrupt:
        return INTERRUPTED


def portable(text: str, name: str, folder: str) -> str:
    """A text whose `--out` names runs/NAME/FOLDER, wherever the run folders were."""
    return re.sub(rf"--out \S*?({folder})", rf"--out runs/{name}/\1", text)


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds until the device has nothing left to do."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def plain_draft_model(folder: Path) -> str:
    """The bundled PARD drafter as a plain draft model, which drafts one token after the other."""
    source = BUNDLED / "smollm2-135m-pard"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = read_config(source)
    kept = {name: v for name, v in config.items() if name not in ("pard_token", "spd_type")}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return str(folder)


def middle_95(ratio: Callable[[list[Any]], float], units: Sequence[Any], draws: int) -> str:
    """The middle 95 of 100 resamplings of what a function makes of some units: "[LOW, HIGH]"."""
    rng = Random(0)
    drawn = sorted(ratio(rng.choices(units, k=len(units))) for _ in range(draws))
    return f"[{drawn[draws // 40]:.3f}, {drawn[-draws // 40]:.3f}]"
