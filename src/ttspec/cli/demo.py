"""`ttspec demo`: one session, decoded plainly, with a drafter, with copies, and by default."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttspec.cli.demo_turns import TURNS
from ttspec.cli.options import ModelFlags, Positive, SessionLearnFlags
from ttspec.cli.terminal import say
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.errors import OptionError

if TYPE_CHECKING:
    from ttspec.bench.results import Arm
    from ttspec.decoding.engine import Engine
    from ttspec.records import Chunk

TURN_TOKENS = 256
SESSION_TOKENS = 1250
"""A session ends with the first turn that reaches this, at up to 255 tokens more."""


def demo(
    *,
    models: ModelFlags = ModelFlags(),
    tokens: Positive = SESSION_TOKENS,
    temperature: float = 0.7,
    seed: int = 0,
    learning: SessionLearnFlags = SessionLearnFlags(),
    out: Path | None = None,
) -> int:
    """Show what drafting, copying and learning do: the same session in four ways.

    Plain; with a static drafter; with copies beside it; and by default, where it also learns.

    The arms take turns, so that a busy machine slows all of them alike. At the end come a table
    and an HTML page with the plot and the text, which all arms write alike: in float32, or in
    bfloat16 with rounds of one width, plain decoding's too, which may slow that.

    Parameters
    ----------
    tokens
        Generated tokens of each arm, at most 256 in each of ten turns.
    temperature
        0 is greedy.
    seed
        One seed gives one text (float32).
    out
        Folder for the page, the plot and the rounds as JSON. [default: runs/demo-DATE-TIME]
    """
    learn = learning.config()
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)  # complains before anything is loaded
    shared: dict[str, Any] = {"temperature": temperature, "seed": seed}
    GenerateConfig(**shared)
    engine = models.load(notify=say)
    if engine.drafter is None:
        raise OptionError(
            f"demo compares drafters, and there is none (--drafter {models.drafter}).\n"
            "Name one with --drafter, or use the built-in target."
        )

    from ttspec.bench.manifest import describe
    from ttspec.bench.report import write_report
    from ttspec.bench.sentences import demo_sentences, demo_table
    from ttspec.bench.store import write_run
    from ttspec.bench.table import table_console

    shared["deterministic"] = str(engine.target.dtype) != "torch.float32"
    console = table_console()
    print_setting(console, engine, tokens, temperature, seed)
    arms, interrupted = run_session(engine, tokens, shared, learn, console)
    if not all(arm.turns for arm in arms):
        return 130
    manifest = describe(engine, title="ttspec demo: drafted, copied, learned")
    manifest |= shared | {"learning": str(learn), "interrupted": interrupted or None}
    write_run(folder, manifest, arms)
    page = write_report(folder)
    console.print()
    demo_table(arms).print(console)
    for sentence in demo_sentences(arms):
        console.print(sentence)
    console.print(f"\npage  {page}\nplot  {page.parent / 'acceptance.png'}", soft_wrap=True)
    return 130 if interrupted else 0


def run_session(
    engine: Engine, goal: int, shared: dict[str, Any], learn: LearnConfig, console: Any
) -> tuple[list[Arm], bool]:
    """Answer turn after turn in every arm; returns the arms and whether Ctrl-C ended it."""
    from ttspec.bench.results import Arm
    from ttspec.bench.sentences import label
    from ttspec.bench.table import number

    kinds: dict[str, dict[str, Any]] = {
        "plain": {"draft": DraftConfig(length=0), "learn": None},
        "static": {"draft": DraftConfig(copy=False, context="whole"), "learn": None},
        "static-copy": {"learn": None},
        "default": {"learn": learn},
    }
    arms = [Arm(name=name) for name in kinds]
    for kind in kinds.values():  # first calls are slow and belong to no arm
        asked = kind | shared | {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True}
        engine.generate("Hello", **asked)
    sessions = {
        name: engine.session(**kind, **shared, max_new_tokens=min(TURN_TOKENS, goal))
        for name, kind in kinds.items()
    }
    done = 0
    try:
        for index, user in enumerate(TURNS):
            if min(arm.tokens for arm in arms) >= goal:
                break
            first = index % len(arms)
            for arm in arms[first:] + arms[:first]:
                answer(arm, sessions[arm.name].stream(user), user)
                console.print(
                    f"turn {index + 1:2d}  {label(arm.name):<16}  {arm.tokens:5d} tokens  "
                    f"{arm.tokens_per_second:.1f} tokens/s  "
                    f"{number(arm.acceptance())} tokens a forward"
                )
            done += 1
            if any(arm.turns[-1].result.finish_reason == "context" for arm in arms):
                break
    except KeyboardInterrupt:
        for arm in arms:  # only turns that every arm has finished can be compared
            del arm.turns[done:]
        return arms, True
    return arms, False


def answer(arm: Arm, stream: Iterator[Chunk], user: str) -> None:
    """One arm's answer to one turn, timed."""
    times, result = [time.perf_counter()], None
    for chunk in stream:
        times.append(time.perf_counter())
        result = chunk.result
    assert result is not None
    if result.finish_reason == "cancelled":
        raise KeyboardInterrupt
    arm.finish(user, result, [after - before for before, after in pairwise(times)])


def print_setting(console: Any, engine: Engine, goal: int, temperature: float, seed: int) -> None:
    """Say what runs, before it does."""
    target, drafter = engine.target, engine.drafter
    assert drafter is not None
    console.print(
        f"target {target.name}, drafter {drafter.name} (drafts {drafter.length} tokens), "
        f"{str(target.dtype).removeprefix('torch.')} on {target.device}\n"
        f"{goal:,} tokens in each of four arms, temperature {temperature:g}, seed {seed}"
    )
    if str(target.dtype) != "torch.float32":
        console.print(
            "Every forward pass reads 16 tokens or more, plain decoding's too: so rounding is the "
            "same in all arms, and so is the text. Elsewhere plain decoding reads one, and may be "
            "faster than here."
        )
