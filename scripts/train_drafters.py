"""Train drafters for the built-in target on several GPUs: what `ttspec train` does, in pieces.

`answers` writes a part of the training answers, one process a part; `fit` trains one drafter on all
of them. Prompts come from `scripts/make_prompts.py`. The bundled drafters' cards give the options.

    python scripts/train_drafters.py answers RUN/answers.0.jsonl --part 0 --parts 4
    python scripts/train_drafters.py fit RUN/eagle3 --answers RUN --kind eagle3 --minutes 5
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import cyclopts

from ttspec.training.config import TrainConfig

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


if __name__ == "__main__":
    app()
