"""Train drafters for the built-in target on several GPUs: what `ttspec train` does, in pieces.

`answers` writes a part of the training answers, one process a part; `fit` trains one drafter on all
of them; `compare` trains several kinds on the same batches, for a fair table of them. Prompts come
from `scripts/make_prompts.py`. The bundled drafters' cards give the options.

    python scripts/train_drafters.py answers RUN/answers.0.jsonl --part 0 --parts 4
    python scripts/train_drafters.py fit RUN/eagle3 --answers RUN --kind eagle3 --minutes 5
    python scripts/train_drafters.py compare RUN --answers RUN --kinds eagle3,dspark --minutes 5
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import cyclopts
import torch

from ttspec.errors import OptionError, TrainingError
from ttspec.training.config import TrainConfig

FIRST_STEPS = 10
"""Steps of `compare` before its clock starts: much is compiled in them."""

app = cyclopts.App(help=__doc__)


@app.command
def answers(
    out: Path,
    *,
    part: int,
    parts: int,
    prompts: Path = Path(".data/train.jsonl"),
    target: str = "smollm2-135m",
    rows: int = 1024,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Answer every `parts`-th dialogue, from `part` on; noise is of `seed` + `part`."""
    import ttspec
    from ttspec.training.answers import read_dialogues, write_answers
    from ttspec.training.config import TrainConfig

    out.parent.mkdir(parents=True, exist_ok=True)
    engine = ttspec.load(target, None, device=device)
    options = TrainConfig(prompts=prompts, out=out.parent, rows=rows, seed=seed + part)
    write_answers(engine, read_dialogues(prompts)[part::parts], out, options)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Those fields of a `TrainConfig` that may be given."""

    minutes: float | None = None
    epochs: int = 1000
    init: str | None = None
    layers: int | None = None
    block: int = 8
    taps: int | None = None
    draft_vocabulary: int = 32000
    batch: int = 64
    anchors: int = 64
    lr: float | None = None
    """None is 1e-3, and for an MTP head the kind's own."""
    loss: str = "kl"
    seed: int = 0
    prompts: Path = Path(".data/train.jsonl")

    def config(self, out: Path, kind: str) -> TrainConfig:
        """All options of a run."""
        lr = self.lr or (None if kind == "mtp" else 1e-3)
        return TrainConfig(out=out, **{**asdict(self), "kind": kind, "lr": lr})


Options = Annotated[Fit, cyclopts.Parameter(name="*")]


@app.command
def fit(
    out: Path,
    *,
    answers: Path,
    kind: str,
    options: Options = Fit(),
    target: str = "smollm2-135m",
    device: str = "auto",
) -> None:
    """Train on `answers`/answers.*.jsonl; a line of figures now and then."""
    import ttspec
    from ttspec.training.train import Progress
    from ttspec.training.train import fit as run

    config = options.config(out, kind)

    def report(where: Progress) -> None:
        if where.tokens % 100 == 0:
            right = " ".join(f"{a:.3f}" for a in where.accuracy)
            step = f"{kind} step {where.tokens} {where.done:.0%}"
            print(f"{step}: {where.loss:.3f} | {right}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    engine = ttspec.load(target, None, device=device)
    print(run(engine.target, config, sorted(answers.glob("answers.*.jsonl")), report))


@app.command
def compare(
    out: Path,
    *,
    answers: Path,
    kinds: str,
    options: Options = Fit(),
    target: str = "smollm2-135m",
    device: str = "auto",
) -> None:
    """Train each of `kinds` (with commas between them) for equally many steps on equal batches.

    They take turns, so that the seconds of each are those it takes alone. The target reads each
    dialogue once for all, if its states fit into memory. The clock, which ends it, starts when all
    is compiled. Every drafter is in `out`/KIND/drafter.
    """
    import ttspec
    from ttspec.training.batches import read_examples
    from ttspec.training.states import TargetStates
    from ttspec.training.train import CHECK_EVERY, Trainer

    if not options.minutes:
        raise OptionError("minutes is not given.\nSay with --minutes how long all train together.")
    model = ttspec.load(target, None, device=device).target
    configs = [options.config(out / kind, kind) for kind in kinds.split(",")]
    examples = read_examples(sorted(answers.glob("answers.*.jsonl")), configs[0].max_length)
    trainers = [Trainer(model, config, examples) for config in configs]
    batches = trainers[0].batches
    taps = [tap for each in trainers for tap in each.drafter.taps]
    reserved = sum(each.recipe.states.reserved for each in trainers)
    states = TargetStates(model, batches, taps, reserved)
    for each in trainers:
        each.recipe.states = states
    seconds = dict.fromkeys(["target", *kinds.split(",")], 0.0)

    def clock(of: str, began: float) -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[of] += (now := time.monotonic()) - began
        return now

    began = time.monotonic()
    step = 0
    while (done := (time.monotonic() - began) / 60 / options.minutes) < 1:
        at = time.monotonic()
        batch = batches.at(step)
        states.of(batch, ())
        at = clock("target", at)
        drawn = batch.generator.get_state()
        for each in trainers:
            batch.generator.set_state(drawn)
            each.step(batch, done)
            at = clock(each.config.kind, at)
        step += 1
        if step <= FIRST_STEPS:
            seconds, began = dict.fromkeys(seconds, 0.0), time.monotonic()
        if step % CHECK_EVERY == 0:
            for each in list(trainers):
                try:
                    each.check()
                except TrainingError as error:  # the others go on
                    print(f"{each.config.kind} is left out: {error}")
                    trainers.remove(each)
                    continue
                right = " ".join(f"{a:.3f}" for a in each.accuracy)
                print(f"{each.config.kind} step {step} {done:.0%}: {each.loss:.3f} | {right}")
            print(flush=True)
    counted = max(step - FIRST_STEPS, 1)
    for each in trainers:
        alone = (seconds["target"] + seconds[each.config.kind]) / counted
        folder = each.save_drafter(step * alone)
        print(f"{folder}: {step} steps of {options.batch} dialogues, {1000 * alone:.0f} ms a step")
    print(f"of which the target reads for {1000 * seconds['target'] / counted:.0f} ms")


if __name__ == "__main__":
    app()
