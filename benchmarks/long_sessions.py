"""A drafter over long sessions: plain decoding writes the text once, then every arm replays it.

    python benchmarks/long_sessions.py OUT --target TARGET --drafter DRAFTER

What `ttspec bench run` and `ttspec bench replay` do, with the models loaded once. Arms come in the
order given, all sessions side by side; each is in OUT/replay when it is done, and is printed with
its ratios to the arms before it. The same command goes on after what is there.
`ttspec bench report OUT/replay` draws it.
"""

import time
from pathlib import Path

import common
from cyclopts import App

import ttspec
from ttspec.bench.arms import parse_arms
from ttspec.bench.metrics import STRETCHES, matched
from ttspec.bench.preparation import PreparedRun, find_drafters, prepare_run
from ttspec.bench.replay import TimelessStore, open_source, prepare, replayable
from ttspec.bench.runner import measure_all
from ttspec.bench.store import Store, read_run
from ttspec.bench.suites import load_suites
from ttspec.bench.table import interval
from ttspec.decoding.engine import Engine

ARMS = "static,static-copy,learn-session[stride=4],static-window,default,default[stride=4]"
app = App(help=__doc__)
BEGAN = time.monotonic()


def note(text: str) -> None:
    """Print with the seconds since the beginning."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


@app.default
def run(
    out: Path,
    *,
    target: str = "smollm2-135m",
    drafter: str = "auto",
    arms: str = ARMS,
    suite: str = "session,mixed",
    requests: int = 5,
    tokens: int = 4000,
    turn: int = 256,
    seed: int = 1,
    temperature: float = 0.7,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = True,
    limit: float = float("inf"),
) -> None:
    """Write the text, if OUT has none yet, and replay the arms.

    Parameters
    ----------
    requests
        Of each suite; all of them are rows of one batch.
    tokens
        Generated tokens of a session at most.
    turn
        Of an answer.
    limit
        Seconds after which no other arm is begun.
    """
    specs = replayable(parse_arms(arms))
    engine = ttspec.load(target, drafter, device=device, dtype=dtype, compile=compile, notify=note)
    note(f"loaded {engine.target.name} and {engine.drafter and engine.drafter.name}")
    asked = load_suites(suite, requests)
    prepared = prepare_run(
        engine,
        parse_arms("plain"),
        asked,
        [seed],
        rows=len(asked.requests),
        session_tokens=tokens,
        notify=note,
        max_new_tokens=turn,
        temperature=temperature,
        ignore_eos=False,
    )
    text = Store(out / "text", prepared.manifest)
    for _ in measure(engine, prepared, text, limit):
        note("the text")
    source = open_source(out / "text")
    prepared = prepare(engine, source, specs, find_drafters(specs, note))
    note(f"read the text of {len(source.units)} sessions; {' '.join(prepared.manifest['notes'])}")
    store = TimelessStore(out / "replay", prepared.manifest)
    for _ in measure(engine, prepared, store, limit, warm_up=0):
        show(out / "replay")
    note("done")


def measure(engine: Engine, prepared: PreparedRun, store: Store, limit: float, **options: int):
    """Yield after each batch that was measured; ends, with what is there, when time is over."""
    steps = measure_all(engine, prepared, store, notify=note, **options)
    try:
        next(steps)
        for progress in steps:
            yield progress
            if time.monotonic() - BEGAN > limit and progress.left:
                note(f"no time for {progress.units_left} units")
                break
    finally:
        store.close()


def show(folder: Path) -> None:
    """Print the newest arm, and its ratios to those before."""
    done = matched([arm for arm in read_run(folder)[1] if arm.turns])
    *before, new = done
    lengths = [interval(s.acceptance(new), 3) for s in STRETCHES]
    updates = sum(turn.result.stats.updates for turn in new.turns)
    note(f"{new.name}: {' | '.join(lengths)} | {updates:,} updates")
    for old in before:
        pairs = [s.pair(new, old) for s in STRETCHES]
        print(f"{'/ ' + old.name:>40}: {' | '.join(interval(p and p.ratio, 3) for p in pairs)}")


if __name__ == "__main__":
    print("first 512 | past 1,024 | past 1,024, little repetition")
    common.main(app)
