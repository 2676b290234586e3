"""`ttspec train`: build a drafter for a target; only the progress is drawn here."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def train(
    *,
    prompts: Path,
    out: Path,
    target: str = "smollm2-135m",
    kind: Literal[
        "dflash", "dflash2", "domino", "dspark", "jetspec", "eagle3", "mtp", "pard", "causal"
    ] = "dflash",
    init: str | None = None,
    max_length: int = 768,
    max_answer: int = 512,
    minutes: float | None = None,
    epochs: int = 6,
    layers: int | None = None,
    block: int = 8,
    taps: int | None = None,
    draft_vocabulary: int = 32000,
    head: Literal["frozen", "trained"] = "frozen",
    keep: float = 0.7,
    keep_least: float = 0.2,
    batch: int = 32,
    anchors: int = 64,
    rows: int | None = None,
    lr: float | None = None,
    loss: Literal["ce", "kl"] = "kl",
    temperature: float = 0.8,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    resume: Annotated[bool, Parameter(negative=())] = False,
    threads: int | None = None,
) -> int:
    """Train a drafter for a target on answers that the target writes itself.

    Parameters
    ----------
    prompts
        JSON lines: {"prompt"}, {"turns"} (null: the target writes the turn), {"messages"} or
        {"conversations"}.
    out
        Folder for answers, state and drafter; new, or an interrupted run's with --resume.
    target
        Built-in name, local folder or hub id.
    kind
        Drafter to train; causal is a plain draft model, the target with fewer layers.
    init
        Go on training this drafter of the kind: a built-in name or a folder.
    max_length
        Tokens of a training dialogue at most.
    max_answer
        Tokens of an answer at most.
    minutes
        Stop training after this long.
    epochs
        Passes over the answers at most.
    layers
        Draft layers; default is 3 for dflash and its kin, 6 of the target's for pard and causal,
        else 1.
    block
        Tokens drafted in training, and the known one.
    taps
        dflash and its kin: hidden states of the target that are read; default is one per layer.
    draft_vocabulary
        eagle3: how many tokens it can draft, the most frequent of the answers.
    head
        eagle3: its output head stays rows of the target's, or is trained from them.
    keep
        pard: share of the masks of one depth that are kept at the next.
    keep_least
        pard: the smallest share.
    batch
        Dialogues a step.
    anchors
        All but pard and causal: blocks a dialogue and step.
    rows
        Dialogues answered side by side. [default: 32, or as many of them as fit into memory]
    lr
        Peak learning rate. [default: 6e-4; mtp 3e-4]
    loss
        Cross entropy to the tokens, as published, or KL to the target's distribution.
    temperature
        Of the answers.
    seed
        Of answers, weights, order and anchors.
    device
        auto, cpu or cuda.
    dtype
        auto, float32, bfloat16 or float16.
    resume
        Go on where a run with this folder stopped.
    threads
        CPU threads for torch.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ttspec.decoding.loading import load
    from ttspec.training.train import Progress as Where
    from ttspec.training.train import TrainConfig
    from ttspec.training.train import train as run

    config = TrainConfig(
        prompts=prompts,
        out=out,
        kind=kind,
        init=init,
        max_length=max_length,
        max_answer=max_answer,
        minutes=minutes,
        epochs=epochs,
        layers=layers,
        block=block,
        taps=taps,
        draft_vocabulary=draft_vocabulary,
        head=head,
        keep=keep,
        keep_least=keep_least,
        batch=batch,
        anchors=anchors,
        rows=rows,
        lr=lr,
        loss=loss,
        temperature=temperature,
        seed=seed,
        resume=resume,
    )
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    engine = load(target, None, device=device, dtype=dtype, notify=console.print)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        tasks = {
            stage: bar.add_task(stage, total=1.0, facts="", visible=False)
            for stage in ("answers", "training")
        }

        def report(where: Where) -> None:
            left = f"{int(where.seconds_left) // 60}:{int(where.seconds_left) % 60:02d} left"
            facts = f"{where.tokens} tokens, {left}"
            if where.stage == "training":
                right = " ".join(f"{a:.2f}" for a in where.accuracy)
                facts = f"step {where.tokens}, loss {where.loss:.3f}, right {right}, {left}"
            bar.update(tasks[where.stage], completed=where.done, facts=facts, visible=True)

        folder = run(engine, config, report)
    console.print(f"{folder} holds the drafter. Use it with --drafter {folder}")
    return 0
