"""Train a drafter for a target on what the target itself says.

Everything is resumable: the answers line by line, the weights by a saved state. This file knows
tensors and files; the command draws the progress.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import drafter_folder
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter, save_drafter
from ttspec.drafters.dflash import DFlash
from ttspec.errors import DataError, OptionError, TrainingError, writing
from ttspec.models.target import Target
from ttspec.training.answers import read_dialogues, write_answers
from ttspec.training.batches import Batch, Batches, Example, read_examples
from ttspec.training.config import TrainConfig
from ttspec.training.recipes import RECIPES
from ttspec.training.states import TargetStates

SAVE_EVERY = 60.0
"""Seconds between saved states."""
LARGEST_NORM = 1.0
"""Of all gradients together: larger ones are scaled down to it."""
CHECK_EVERY = 10
"""Steps between looks at loss and gradient, for which the device must be waited for."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    stage: Literal["answers", "training"]
    done: float
    """Share of the stage, 0 to 1."""
    seconds_left: float
    """NaN while it is not known."""
    loss: float = math.nan
    accuracy: tuple[float, ...] = ()
    """Per drafted position, over the last step: share of most likely tokens that were right."""
    tokens: int = 0


Report = Callable[[Progress], None]


def train(engine: Engine, config: TrainConfig, report: Report = lambda _: None) -> Path:
    """Answer the prompts, train a drafter on the answers, write it to `out`/drafter.

    Returns:
        The drafter's folder.

    Raises:
        OptionError: `out` is in use and `resume` is off, or the options differ from its own.
        DataError: The prompts are unusable.
        TrainingError: No answer can be learned from, or the loss is not finite.
    """
    dialogues = read_dialogues(config.prompts)
    recipe = RECIPES[config.kind](engine.target, config)  # refuses what it cannot train
    if config.init is not None:
        _init_drafter(config)  # and so does this
    _open_folder(config, engine.target)
    if engine.notify and (notice := recipe.notice()):
        engine.notify(notice)
    answers = config.out / "answers.jsonl"
    begun = time.monotonic()

    def answered(done: int, tokens: int) -> None:
        share = done / len(dialogues)
        left = (time.monotonic() - begun) * (1 - share) / share if share else math.nan
        report(Progress("answers", share, left, tokens=tokens))

    write_answers(engine, dialogues, answers, config, answered)
    if engine.notify and (notice := _left_out(answers, len(dialogues), config.max_length)):
        engine.notify(notice)
    return fit(engine.target, config, [answers], report)


def _left_out(answers: Path, prompts: int, max_length: int) -> str | None:
    """How many prompts have no answer to learn from, and why; None if all have one."""
    lines = answers.read_text(encoding="utf-8").splitlines()
    taught = {row["n"] for row in map(json.loads, lines) if row["spans"]}
    missing = len(set(range(prompts)) - taught)
    if not missing:
        return None
    return (
        f"{missing} of {prompts} prompts teach nothing: they leave no room for an answer in "
        f"{max_length} tokens (--max-length), or their answers are empty or repeat themselves."
    )


def fit(target: Target, config: TrainConfig, answers: list[Path], report: Report) -> Path:
    """Train on answers that exist; see `train`."""
    trainer = Trainer(target, config, read_examples(answers, config.max_length))
    spent = trainer.load_state()
    total = trainer.batches.per_epoch * config.epochs
    limit = config.minutes * 60 if config.minutes else math.inf
    began = saved = time.monotonic() - spent
    while (done := max(trainer.steps / total, (time.monotonic() - began) / limit)) < 1:
        trainer.step(trainer.batches.at(trainer.steps), done)
        step, now = trainer.steps, time.monotonic()
        if step % CHECK_EVERY == 0 or step == total:
            trainer.check()
            left = min(limit - (now - began), (now - began) * (total - step) / step)
            report(Progress("training", done, left, trainer.loss, trainer.accuracy, step))
        if now - saved > SAVE_EVERY:
            trainer.save_state(now - began)
            saved = now
    trainer.check()
    report(Progress("training", 1.0, 0.0, trainer.loss, trainer.accuracy, trainer.steps))
    seconds = time.monotonic() - began
    trainer.save_state(seconds)
    return trainer.save_drafter(seconds)


class Trainer:
    """A drafter in training: its float32 masters and their optimiser."""

    def __init__(self, target: Target, config: TrainConfig, examples: list[Example]) -> None:
        """A new drafter for `target`, or the one that training goes on with.

        Raises:
            OptionError: There is no such drafter for this target.
            ResourceError: It does not fit into memory.
        """
        self.target, self.config = target, config
        self.batches = Batches(examples, config.batch, config.seed, target.device)
        self.recipe = RECIPES[config.kind](target, config)
        self.drafter = self.recipe.new(examples) if config.init is None else _init_drafter(config)
        layers = int(target.config.num_hidden_layers)
        self.drafter.bind(target.embedding, target.head, layers, target.tokenizer)
        self._initial = dict(self.drafter.weights)
        names = self.recipe.trained(self.drafter)
        longest = max(len(example.ids) for example in examples)
        trained = [self._initial[n] for n in names]
        reserved = self.recipe.require_room(trained, longest)
        self.recipe.states = TargetStates(target, self.batches, self.drafter.taps, reserved)
        self.masters = {n: self._initial[n].float().clone().requires_grad_() for n in names}
        self.lr = self.recipe.lr if config.lr is None else config.lr
        self.optimiser = torch.optim.AdamW(
            self.masters.values(), self.lr, (0.9, 0.95), weight_decay=0.0
        )
        self.steps = 0
        self.loss, self.accuracy = math.nan, ()
        self._last: tuple[Tensor, Tensor] | None = None
        self._bad_steps = torch.zeros((), dtype=torch.long, device=target.device)

    def step(self, batch: Batch, done: float) -> None:
        """Learn from a batch; `done` is the share of the training that is behind, 0 to 1.

        Nothing is learned from a batch whose gradient is not finite.
        """
        for group in self.optimiser.param_groups:
            warm_up = done / 0.04 + 1e-3
            cosine = 0.5 * (1 + math.cos(math.pi * done))
            group["lr"] = self.lr * min(1.0, warm_up, cosine)
        # Gradients reach the float32 masters through the cast.
        dtype = self.target.dtype
        self.drafter.weights = self._initial | {n: w.to(dtype) for n, w in self.masters.items()}
        value, right = self.recipe.loss(self.drafter, batch)
        self.optimiser.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), LARGEST_NORM)
        finite = norm.isfinite()  # on the device, which is not waited for
        for weight in self.masters.values():
            if weight.grad is not None:
                weight.grad = torch.where(finite, weight.grad, 0.0)
        self.optimiser.step()
        self.steps += 1
        self._bad_steps = torch.where(finite, 0, self._bad_steps + 1)
        self._last = value.detach(), right

    def check(self) -> None:
        """Read what the last step found: its loss and accuracy.

        Raises:
            TrainingError: No gradient was finite for `CHECK_EVERY` steps.
        """
        if self._last is None:
            return
        value, right = self._last
        if int(self._bad_steps) >= CHECK_EVERY:
            raise TrainingError(
                f"No gradient was finite in the last {int(self._bad_steps)} of {self.steps} steps; "
                f"lr is {self.lr:g}.\nLower it and start in a new folder."
            )
        self.loss = float(value)
        self.accuracy = tuple(round(a, 4) for a in right.tolist())

    def save_drafter(self, seconds: float) -> Path:
        """Write the drafter to `out`/drafter, and beside it a card of its training."""
        config, examples = self.config, self.batches.examples
        given = asdict(config) | {"lr": self.lr}
        card = {
            "config": {k: str(v) if isinstance(v, Path) else v for k, v in given.items()},
            "target": self.target.name,
            "dialogues": len(examples),
            "tokens": sum(len(example.ids) for example in examples),
            "seconds": seconds,
            "steps": self.steps,
            "loss": self.loss,
            "accuracy": self.accuracy,
        }
        folder = config.out / "drafter"
        shutil.rmtree(folder, ignore_errors=True)  # a resumed run replaces its own
        rebuilt = (self.drafter.config.get("ttspec") or {}).get("rebuilt") or []
        left = {*self.masters, *rebuilt}
        made = {n: w for n, w in self._initial.items() if n not in left}
        made |= {n: w.to(torch.bfloat16) for n, w in self.masters.items()}
        save_drafter(folder, self.drafter.config, made)
        (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        return folder

    def save_state(self, seconds: float) -> None:
        """Write what `load_state` reads."""
        tensors = {f"weight.{n}": w.detach() for n, w in self.masters.items()}
        for name, weight in self.masters.items():
            for key, value in self.optimiser.state[weight].items():
                tensors[f"{key}.{name}"] = value
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        part = out / "state.part"
        with writing(part):
            last = {"loss": self.loss, "accuracy": self.accuracy}
            metadata = {"step": self.steps, "seconds": seconds, "last": json.dumps(last)}
            save_file(tensors, part, metadata={k: str(v) for k, v in metadata.items()})
        part.replace(out / "state.safetensors")

    def load_state(self) -> float:
        """Go on where `out` left off, if it did; returns the seconds that were spent."""
        path = self.config.out / "state.safetensors"
        if not path.exists():
            return 0.0
        advice = "Delete it; --resume then trains anew on the answers that are there."
        with _reading(path, advice), torch.no_grad():
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, weight in self.masters.items():
                weight.copy_(tensors[f"weight.{name}"])
                self.optimiser.state[weight] = {
                    key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else weight.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
            self.steps = int(metadata["step"])
            if last := json.loads(metadata.get("last", "null")):  # states of before have none
                self.loss, self.accuracy = last["loss"], tuple(last["accuracy"])
            return float(metadata["seconds"])


def _init_drafter(config: TrainConfig) -> Drafter:
    name = str(config.init)
    drafter = load_drafter(name, drafter_folder(name))
    if drafter.kind != RECIPES[config.kind].kind:
        raise OptionError(
            f"init is {name}, which is of kind {drafter.kind}; kind is {config.kind}.\n"
            "Give both the same kind."
        )
    if isinstance(drafter, DFlash) and drafter.length + 1 != config.block:
        block = drafter.length + 1
        raise OptionError(
            f"block is {config.block}; {name} has blocks of {block}.\nGive that block."
        )
    return drafter


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[None]:
    """Within, a file of a run that is not as it was written is a `DataError`."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} is damaged: {error!r:.200}.\n{advice}") from error


def _open_folder(config: TrainConfig, target: Target) -> None:
    """Take a folder for a run, or check that it is this run's."""
    loose = {"out", "resume", "minutes", "epochs", "rows", "prompts"}
    ours = {k: v for k, v in asdict(config).items() if k not in loose}
    sizes = target.config  # the answers are its tokens, which mean nothing to another
    ours["target"] = (
        f"{target.name}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, "
        f"{sizes.vocab_size} tokens"
    )
    path, part = config.out / "run.json", config.out / "run.part"
    if path.exists():
        with _reading(path, "Give a new folder."):
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        theirs.setdefault("target", ours["target"])  # older runs do not say
        if not config.resume:
            raise OptionError(
                f"{config.out} holds a run already.\nAdd --resume, or give a new folder."
            )
        changed = sorted(k for k in ours if ours[k] != theirs.get(k))
        if changed:
            raise OptionError(
                f"{config.out} was begun with {changed[0]} = {theirs.get(changed[0])!r}, not "
                f"{ours[changed[0]]!r}.\nGive the same options, or a new folder."
            )
        return
    if config.out.exists() and any(each != part for each in config.out.iterdir()):
        raise OptionError(f"{config.out} is not empty.\nGive a new folder.")
    config.out.mkdir(parents=True, exist_ok=True)
    with writing(path):
        part.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
