"""What learning costs a round, by the wall clock: `run` measures, `show` prints tables.

Published shapes, random weights, forced acceptance. Each setting has a decoder of its own on the
same target; all are warmed up, graphs captured, and then take turns: so many rounds of each in
random order, again and again. A turn ends when the device has nothing left to do, so an update
beside the rounds is counted whole. What a setting costs is its time against that of `static` in
the same turn; the interval is a bootstrap over turns.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from cyclopts import App

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "exposed"
STRIDES = (1, 2, 4, 8, 16, 32)
RANKS = (4, 8, 16)
SETTLED = 3
"""Updates of each graph before anything is counted."""
app = App(help=__doc__)


@dataclass
class Setting:
    """A way of learning, and what was found."""

    arm: str
    rows: int
    turns: list[float]
    """Milliseconds a round, by turn."""
    bytes_added: int
    """Allocated while its decoder, its graphs and its learner were made."""
    bytes_told: int
    """What the formula says: `LiveWeights.nbytes` and the live copies."""


def arms_of(strides: str, ranks: str, full: bool) -> list[str]:
    """static, low-rank changes that never learn, and every rank at every stride."""
    found = ["static"]
    for rank in ranks.split(","):
        found.append(f"learn[weights=lora,rank={rank},stride=1000000]")
        found += [f"learn[weights=lora,rank={rank},stride={s}]" for s in strides.split(",")]
    return found + (["learn[stride=32]"] if full else [])


@app.command
def run(
    out: Path = Path("runs/exposed"),
    *,
    pair: str = "qwen3-8b+dflash",
    accept: str = "3,2,4",
    rows: int = 1,
    context: int = 512,
    arms: str = "",
    strides: str = ",".join(map(str, STRIDES)),
    ranks: str = "8",
    full: bool = False,
    turns: int = 8,
    rounds: int = 128,
    device: str = "auto",
    compile: bool = True,
) -> None:
    """Measure; the figures go to `out`.

    Parameters
    ----------
    out
        Where a file for each pair and number of rows goes.
    pair
        As in `--random-weights`.
    accept
        Drafts kept a round, in turn.
    rows
        Requests side by side, each learning for itself.
    context
        Tokens before the first round.
    arms
        Instead of those made of `strides` and `ranks`.
    strides
        Rounds between updates.
    ranks
        Of low-rank changes.
    full
        All of one row's weights at stride 32 besides.
    turns
        Of every setting.
    rounds
        Of a turn.
    device
        auto, cpu or cuda.
    compile
        Compile the models' layers, on a GPU.
    """
    import torch

    from ttspec.bench.arms import parse_arms
    from ttspec.bench.timing import fill
    from ttspec.config import GenerateConfig
    from ttspec.decoding.forced import load_random

    engine = load_random(pair, accept, device=device, compile=compile)
    place, cuda = engine.target.device, engine.target.device.type == "cuda"
    assert engine.drafter is not None
    most = engine.drafter.length + 1
    settings, decoders = [], []
    chosen = [a.strip() for a in arms.split(";")] if arms else arms_of(strides, ranks, full)

    def advance(decoder: Any, count: int) -> float:
        for row in range(rows):  # the same stretch of context in every turn
            decoder.lengths[row], decoder.budget[row] = context, 1 << 30
            if decoder.learner:
                decoder.learner.forget(row, context)
        if cuda:
            torch.cuda.synchronize(place)
        began = time.perf_counter()
        for _ in range(count):
            decoder.round()
        if cuda:
            torch.cuda.synchronize(place)
        return time.perf_counter() - began

    for arm in chosen:
        (spec,) = parse_arms(arm)
        before = torch.cuda.memory_allocated(place) if cuda else 0
        config = GenerateConfig(
            max_new_tokens=rounds * most, ignore_eos=True, draft=spec.draft, learn=spec.learn
        )
        decoder = engine.decoder(config, rows, context, sessions=False)
        fill(decoder, context, rounds * most)
        stride = (spec.learn.stride if spec.learn else 1) or 1
        for _ in range(1 if stride > rounds else -(-SETTLED * stride // rounds) + 1):
            advance(decoder, rounds)
        told = 0
        if decoder.learner:
            live_weights = decoder.learner.weights
            told = live_weights.nbytes
        after = torch.cuda.memory_allocated(place) if cuda else 0
        settings.append(Setting(arm, rows, [], after - before, told))
        decoders.append(decoder)
        print(f"{arm}: {(after - before) / 2**20:,.0f} MiB", file=sys.stderr, flush=True)

    order = Random(0)
    for _ in range(turns):
        for i in order.sample(range(len(settings)), len(settings)):
            settings[i].turns.append(1000 * advance(decoders[i], rounds) / rounds)
    name = torch.cuda.get_device_name(place) if cuda else "cpu"
    found = {
        "pair": pair,
        "device": name,
        "torch": torch.__version__,
        "dtype": str(engine.target.dtype).removeprefix("torch."),
        "compile": compile,
        "accept": accept,
        "context": context,
        "rounds": rounds,
        "settings": [asdict(s) for s in settings],
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{pair.rpartition('/')[2]}-rows-{rows}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


@app.command
def show(folder: Path = RESULTS) -> None:
    """Print the tables of what was measured."""
    for path in sorted(folder.glob("*.json")):
        print(table(json.loads(path.read_text(encoding="utf-8"))))


def table(found: dict[str, Any]) -> str:
    """Milliseconds a round, and what learning adds, as Markdown."""
    settings = found["settings"]
    static = settings[0]["turns"]
    lines = [
        f"{found['pair']}, {settings[0]['rows']} rows, context {found['context']}, "
        f"{found['dtype']}, {found['device']}, torch {found['torch']}",
        "",
        "| setting | ms a round | exposed cost | MiB added | of them as the formula says |",
        "|---|---|---|---|---|",
    ]
    for own in settings:
        cost = "–"
        if own is not settings[0]:
            ratios = [mine / base for mine, base in zip(own["turns"], static, strict=True)]
            low, high = interval(ratios)
            cost = f"{fmean(ratios) - 1:+.1%} [{low - 1:+.1%}, {high - 1:+.1%}]"
        sizes = [f"{own[n] / 2**20:,.0f}" for n in ("bytes_added", "bytes_told")]
        lines.append(
            f"| {own['arm']} | {median(own['turns']):.2f} | {cost} | {' | '.join(sizes)} |"
        )
    return "\n".join(lines) + "\n"


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    rng = Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


if __name__ == "__main__":
    app()
