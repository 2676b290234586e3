"""What learning costs a round, by the wall clock: `run` measures, `show` prints tables.

Published shapes, random weights, forced acceptance. Each setting has a decoder of its own on the
same target; all are warmed up, graphs captured, and then take turns: so many rounds of each in
random order, again and again. A turn ends when the device has nothing left to do, so an update
beside the rounds is counted whole. What a setting costs is its time against that of `static` in
the same turn; the interval is a bootstrap over turns.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import common
import numpy as np
import torch
from cyclopts import App, Parameter
from forced import load_random
from roofline_timing import fill

from ttspec.bench.arms import parse_arms
from ttspec.bench.estimates import share
from ttspec.bench.jsonl import write_json
from ttspec.bench.manifest import device_name
from ttspec.bench.table import EMPTY, Table
from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine

WARM_UPDATES = 3
"""Updates of each graph before anything is counted."""
NEVER = 1_000_000
"""A stride at which low-rank changes are applied and never learn."""
app = App(help=__doc__)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Published shapes with random weights, and where they run."""

    random_weights: str = "qwen3-8b+dflash"
    """As of `roofline.py`."""
    accept: str = "3,2,4"
    """Drafts kept a round, in turn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """Number format; auto is bfloat16 where the hardware has it."""
    compile: bool = True
    """Compile the models' layers, on a GPU."""

    def load(self) -> Engine:
        """Make the pair."""
        where = {"device": self.device, "dtype": self.dtype, "compile": self.compile}
        return load_random(self.random_weights, self.accept, **where)


def arms_of(strides: str) -> str:
    """static, low-rank changes that never learn, and those that learn at every stride."""
    learning = (f"learn[weights=lora,rank=8,stride={n}]" for n in (NEVER, *strides.split(",")))
    return ";".join(("static", *learning))


def allocated(device: torch.device) -> int:
    """Bytes on a GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Setting:
    """A decoder that learns in its own way, warmed up."""

    def __init__(self, engine: Engine, arm: str, rows: int, context: int, rounds: int) -> None:
        assert engine.drafter is not None
        (spec,) = parse_arms(arm)
        most = rounds * (engine.drafter.length + 1)
        self.arm, self.context, self.rounds = arm, context, rounds
        self.device = engine.target.device
        before = allocated(self.device)
        options = {"max_new_tokens": most, "ignore_eos": True}
        config = GenerateConfig(**options, draft=spec.draft, learn=spec.learn)
        self.decoder = engine.decoder(config, rows, context, sessions=False)
        fill(self.decoder, context, most)
        stride = (spec.learn.stride if spec.learn else 1) or 1
        for _ in range(1 if stride > rounds else -(-WARM_UPDATES * stride // rounds) + 1):
            self.turn()
        self.bytes_added = allocated(self.device) - before
        self.turns: list[float] = []
        print(f"{arm}: {self.bytes_added / 2**20:,.0f} MiB", file=sys.stderr, flush=True)

    def turn(self) -> float:
        """Milliseconds a round, over the same stretch of context in every turn."""
        for row in range(self.decoder.rows.count):  # as if nothing came after the context
            self.decoder.rows.lengths[row], self.decoder.rows.budget[row] = self.context, 1 << 30
            if self.decoder.learner:
                self.decoder.learner.forget(row, self.context)
        rounds = range(self.rounds)
        seconds = common.timed(self.device, lambda: [self.decoder.round() for _ in rounds])
        return 1000 * seconds / self.rounds

    def found(self) -> dict[str, Any]:
        """What was measured."""
        learner = self.decoder.learner
        return {
            "arm": self.arm,
            "rows": self.decoder.rows.count,
            "turns": self.turns,
            "bytes_added": self.bytes_added,
            # What the formula says; the committed results have the name.
            "bytes_told": learner.weights.nbytes if learner else 0,
        }


@app.command
def run(
    out: Path = Path("runs/exposed"),
    *,
    shapes: Shapes = Shapes(),
    rows: int = 1,
    context: int = 512,
    arms: str = "",
    strides: str = "1,2,4,8,16,32",
    turns: int = 8,
    rounds: int = 128,
) -> None:
    """Measure; the figures go to `out`.

    Parameters
    ----------
    out
        Where a file for each pair and number of rows goes.
    rows
        Requests side by side, each learning for itself.
    context
        Tokens before the first round.
    arms
        Instead of those made of `strides`: of `ttspec bench run`, with semicolons between them.
    strides
        Rounds between updates.
    turns
        Of every setting.
    rounds
        Of a turn.
    """
    engine = shapes.load()
    chosen = (arms or arms_of(strides)).split(";")
    settings = [Setting(engine, arm.strip(), rows, context, rounds) for arm in chosen]
    order = Random(0)
    for _ in range(turns):
        for setting in order.sample(settings, len(settings)):
            setting.turns.append(setting.turn())
    found = {
        "pair": shapes.random_weights,
        "device": device_name(engine.target.device),
        "torch": torch.__version__,
        "dtype": str(engine.target.dtype).removeprefix("torch."),
        "compile": shapes.compile,
        "accept": shapes.accept,
        "context": context,
        "rounds": rounds,
        "settings": [setting.found() for setting in settings],
    }
    write_json(out / f"{shapes.random_weights.rpartition('/')[2]}-rows-{rows}.json", found)
    print(table(found).markdown())


@app.command
def show(folder: Path = common.RESULTS / "exposed") -> None:
    """Print the tables of what was measured."""
    for path in sorted(folder.glob("*.json")):
        print(table(json.loads(path.read_text(encoding="utf-8"))).markdown())


def table(found: dict[str, Any]) -> Table:
    """Milliseconds a round, and what learning adds."""
    static, *_ = settings = found["settings"]
    rows = []
    for own in settings:
        cost = EMPTY
        if own is not static:
            ratios = np.array(own["turns"]) / np.array(static["turns"])
            ratio = share(ratios, np.ones_like(ratios))
            assert ratio is not None
            cost = f"{ratio.value - 1:+.1%} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"
        sizes = (f"{own[name] / 2**20:,.0f}" for name in ("bytes_added", "bytes_told"))
        rows.append((own["arm"], f"{median(own['turns']):.2f}", cost, *sizes))
    return Table(
        title=f"{found['pair']}, {static['rows']} rows, context {found['context']}, "
        f"{found['dtype']}, {found['device']}, torch {found['torch']}",
        head=("setting", "ms a round", "exposed cost", "MiB added", "of them as the formula says"),
        rows=rows,
    )


if __name__ == "__main__":
    common.main(app)
