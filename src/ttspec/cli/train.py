"""`ttspec train`: build a drafter for a target; only the progress is drawn here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ttspec.cli.options import Device, Dtype, ModelFlags, PositiveOrNone
from ttspec.cli.terminal import say
from ttspec.training.config import TrainConfig

if TYPE_CHECKING:
    from ttspec.training.train import Progress as Where

FEW_STEPS = 200
"""So many taught no kind enough to rank it (docs/experiments.md)."""


def train(
    *,
    config: Annotated[TrainConfig, Parameter(name="*")],
    target: str = "smollm2-135m",
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: PositiveOrNone = None,
) -> int:
    """Train a drafter for a target on answers that the target writes itself.

    Parameters
    ----------
    target
        Built-in name, local folder or hub id.
    device
        Where it trains.
    dtype
        Number format of the target.
    threads
        CPU threads for torch.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ttspec.training.answers import read_dialogues
    from ttspec.training.train import Progress as Where
    from ttspec.training.train import train as run

    read_dialogues(config.prompts)  # complains before anything is loaded
    models = ModelFlags(target=target, drafter="none", device=device, dtype=dtype, threads=threads)
    engine = models.load(notify=say)
    # Not wider than 80 columns: rich would cut what is said.
    columns = TextColumn("{task.description}"), BarColumn(10), TextColumn("{task.fields[facts]}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        tasks = {
            stage: bar.add_task(stage, total=1.0, facts="", visible=False)
            for stage in ("answers", "training")
        }

        last = Where("answers", 0.0, 0.0)

        def report(where: Where) -> None:
            nonlocal last
            last = where
            facts = _facts(where)
            bar.update(tasks[where.stage], completed=where.done, facts=facts, visible=True)

        try:
            folder = run(engine, config, report)
        except KeyboardInterrupt:
            bar.stop()
            say(
                f"\n{config.out} has the answers so far, and the training as it was at most a "
                "minute ago. The same command with --resume goes on from there."
            )
            return 130
    say(f"{folder} holds the drafter. Use it with --drafter {folder}")
    if last.tokens < FEW_STEPS:
        ways = " or ".join(_ways_to_more_steps(config))
        say(f"It learned in {last.tokens} steps, which are few; {ways} gives more.")
    return 0


def _facts(where: Where) -> str:
    """What stands beside the bar."""
    left = ""
    if math.isfinite(where.seconds_left):
        minutes, seconds = divmod(int(where.seconds_left), 60)
        left = f", {minutes}:{seconds:02d} left"
    if where.stage == "answers":
        return f"{where.tokens} tokens{left}"
    first_and_last = where.accuracy[:1] + where.accuracy[1:][-1:]
    right = " … ".join(f"{share:.0%}" for share in first_and_last)
    return f"step {where.tokens}, loss {where.loss:.2f}, right {right}{left}"


def _ways_to_more_steps(config: TrainConfig) -> list[str]:
    """Options that give more of them: what ended the training decides."""
    ways = ["a larger --minutes"] if config.minutes else ["a larger --epochs", "a longer --prompts"]
    if config.batch > 1:
        ways.append("a smaller --batch")
    if config.minutes and config.kind not in ("pard", "causal"):  # a step takes less time
        ways.append("a smaller --anchors")
    return ways
