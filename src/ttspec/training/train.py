"""Train a DFlash drafter for a target: anchors, blocks and weights as published (drafters.md 2d).

Everything is resumable: the answers line by line, the weights by a saved state. This file knows
tensors and files; the command draws the progress.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ttspec.decoding.engine import Engine
from ttspec.drafters.checkpoint import save_drafter
from ttspec.drafters.dflash import DFlash, default_taps
from ttspec.errors import OptionError, TrainingError
from ttspec.losses import cross_entropy, forward_kl, position_weights
from ttspec.models.target import Target
from ttspec.training.answers import read_dialogues, write_answers
from ttspec.training.batches import Batch, make_batch, read_examples

SAVE_EVERY = 60.0
"""Seconds between saved states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a drafter is trained."""

    prompts: Path
    """JSON lines: {"prompt"}, {"turns"} or {"messages"}."""
    out: Path
    """Folder for the answers, the state and the drafter."""
    kind: Literal["dflash"] = "dflash"
    """Drafter to train."""
    max_length: int = 768
    """Tokens of a training dialogue at most."""
    max_answer: int = 512
    """Tokens of an answer at most."""
    minutes: float | None = None
    """Stop training after this long; None trains all epochs."""
    epochs: int = 6
    """Passes over the answers at most."""
    layers: int = 3
    """Draft layers."""
    block: int = 8
    """Tokens in a block, the known one included."""
    taps: int | None = None
    """How many hidden states of the target are read; None is one per layer."""
    batch: int = 32
    """Dialogues a step."""
    anchors: int = 64
    """Blocks a dialogue and step."""
    rows: int = 32
    """Dialogues answered side by side."""
    lr: float = 6e-4
    """Peak learning rate of AdamW, after a warm-up of 4 %, on a cosine to 0."""
    clip: float = 1.0
    """Largest gradient norm."""
    decay: float = 4.0
    """Row j weighs exp(-(j - 1) / decay)."""
    loss: Literal["ce", "kl"] = "kl"
    """Cross entropy to the tokens, as published, or KL to the target's distribution."""
    temperature: float = 0.8
    """Of the answers."""
    seed: int = 0
    """Of answers, initial weights, order and anchors."""
    resume: bool = False
    """Go on where a run with this folder stopped."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    stage: Literal["answers", "training"]
    done: float
    """Share of the stage, 0 to 1."""
    seconds_left: float
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
    _claim(config)
    answers = config.out / "answers.jsonl"
    begun = time.monotonic()

    def answered(done: int, tokens: int) -> None:
        share = done / len(dialogues)
        left = (time.monotonic() - begun) * (1 - share) / max(share, 1e-9)
        report(Progress("answers", share, left, tokens=tokens))

    write_answers(
        engine,
        dialogues,
        answers,
        rows=config.rows,
        max_answer=config.max_answer,
        max_length=config.max_length,
        temperature=config.temperature,
        seed=config.seed,
        progress=answered,
    )
    return fit(engine.target, config, [answers], report)


def fit(target: Target, config: TrainConfig, answers: list[Path], report: Report) -> Path:
    """Train on answers that exist; see `train`."""
    examples = read_examples(answers, config.max_length)
    drafter = new_drafter(target, config)
    target.taps = drafter.taps
    drafter.bind(target.embedding, target.head, len(drafter.taps) * drafter.hidden)
    masters = {n: w.float().requires_grad_() for n, w in drafter.weights.items()}
    optimiser = torch.optim.AdamW(masters.values(), config.lr, (0.9, 0.95), weight_decay=0.0)
    step, spent = _load_state(config, masters, optimiser)
    total = math.ceil(len(examples) / config.batch) * config.epochs
    limit = config.minutes * 60 if config.minutes else math.inf
    began = saved = time.monotonic() - spent
    loss, accuracy = math.nan, ()
    while (done := max(step / total, (time.monotonic() - began) / limit)) < 1:
        for group in optimiser.param_groups:
            warm_up = done / 0.04 + 1e-3
            group["lr"] = config.lr * min(1.0, warm_up, 0.5 * (1 + math.cos(math.pi * done)))
        batch = make_batch(
            examples,
            step,
            size=config.batch,
            blocks=config.anchors,
            block=config.block,
            seed=config.seed,
            device=target.device,
        )
        # Gradients reach the float32 masters through the cast.
        drafter.weights = {n: w.to(target.dtype) for n, w in masters.items()}
        value, right = _loss(target, drafter, batch, config)
        optimiser.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), config.clip)
        optimiser.step()
        step += 1
        now = time.monotonic()
        if step % 10 == 0 or step == total:
            if not math.isfinite(float(norm)):
                raise TrainingError(
                    f"The gradient is not finite at step {step}; lr is {config.lr}.\n"
                    "Lower it and start in a new folder."
                )
            loss, accuracy = float(value.detach()), tuple(round(a, 4) for a in right.tolist())
            left = min(limit - (now - began), (now - began) * (total - step) / step)
            report(Progress("training", done, left, loss, accuracy, step))
        if now - saved > SAVE_EVERY:
            _save_state(config, masters, optimiser, step, now - began)
            saved = now
    seconds = time.monotonic() - began
    _save_state(config, masters, optimiser, step, seconds)
    facts = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "target": target.name,
        "dialogues": len(examples),
        "tokens": sum(len(ids) for ids, _ in examples),
        "seconds": seconds,
        "steps": step,
        "loss": loss,
        "accuracy": accuracy,
    }
    folder = config.out / "drafter"
    shutil.rmtree(folder, ignore_errors=True)  # a resumed run replaces its own
    save_drafter(folder, drafter.config, {n: w.to(torch.bfloat16) for n, w in masters.items()})
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folder


def new_drafter(target: Target, config: TrainConfig) -> DFlash:
    """A DFlash drafter of the target's width, with random weights."""
    c = target.config
    layers = int(c.num_hidden_layers)
    if config.layers < 1 or config.block < 2 or layers < 5:
        raise OptionError(
            "A drafter needs 1 layer, a block of 2, and a target of 5 layers or more."
        )
    heads = int(c.num_attention_heads)
    settings = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": int(c.hidden_size),
        "intermediate_size": int(c.intermediate_size),
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(c.num_key_value_heads),
        "head_dim": int(getattr(c, "head_dim", None) or c.hidden_size // heads),
        "rms_norm_eps": float(c.rms_norm_eps),
        "rope_theta": float((c.rope_parameters or {}).get("rope_theta", 10000.0)),
        "max_position_embeddings": int(c.max_position_embeddings),
        "vocab_size": int(c.vocab_size),
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "block_size": config.block,
        "num_target_layers": layers,
        "layer_types": ["full_attention"] * config.layers,
        "torch_dtype": "bfloat16",
        "dflash_config": {
            "mask_token_id": _mask_token(target),
            "target_layer_ids": default_taps(config.taps or config.layers, layers),
        },
    }
    drafter = DFlash(settings, {})
    generator = torch.Generator().manual_seed(config.seed)
    drafter.weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in drafter.shapes().items()
    }
    return drafter


def _mask_token(target: Target) -> int:
    """A token that never occurs in text: padding rows first, then unused special tokens."""
    size = int(target.config.vocab_size)
    if len(target.tokenizer) < size:
        return size - 1
    special = set(target.tokenizer.all_special_ids) | set(target.ends)
    added = sorted(target.tokenizer.added_tokens_decoder)
    free = [token for token in added if token not in special]
    return free[-1] if free else max(special)


def _loss(
    target: Target, drafter: DFlash, batch: Batch, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Loss of one batch, and the accuracy per drafted position."""
    length = config.block - 1
    features, states = target.read(batch.ids)
    logits = drafter.teach(features, batch.tokens, batch.start, length)
    if config.loss == "kl":
        row = torch.arange(len(states), device=states.device)[:, None, None]
        at = batch.start[..., None] + torch.arange(length, device=states.device)
        at = at.clamp(max=states.shape[1] - 1)  # past the end nothing is taught
        values = forward_kl(F.linear(states[row, at], target.head), logits)
    else:
        values = cross_entropy(batch.labels, logits)
    weight = position_weights(length, config.decay, logits.device) * batch.mask
    right = (logits.argmax(-1) == batch.labels) & batch.mask
    accuracy = right.sum((0, 1)) / batch.mask.sum((0, 1)).clamp(min=1)
    return (values * weight).sum() / weight.sum().clamp(min=1e-6), accuracy


def _claim(config: TrainConfig) -> None:
    """Take a folder for a run, or check that it is this run's."""
    for name in ("max_length", "max_answer", "epochs", "batch", "anchors", "rows", "lr", "clip"):
        if getattr(config, name) <= 0:
            raise OptionError(f"{name} is {getattr(config, name)}; allowed is above 0.")
    loose = {"out", "resume", "minutes", "epochs", "rows", "prompts"}
    ours = {k: v for k, v in asdict(config).items() if k not in loose}
    path = config.out / "run.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
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
    if config.out.exists() and any(config.out.iterdir()):
        raise OptionError(f"{config.out} is not empty.\nGive a new folder.")
    config.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")


def _save_state(
    config: TrainConfig,
    masters: dict[str, Tensor],
    optimiser: torch.optim.AdamW,
    step: int,
    seconds: float,
) -> None:
    tensors = {f"weight.{n}": w.detach() for n, w in masters.items()}
    for name, weight in masters.items():
        for key, value in optimiser.state[weight].items():
            tensors[f"{key}.{name}"] = value
    config.out.mkdir(parents=True, exist_ok=True)
    part = config.out / "state.part"
    save_file(tensors, part, metadata={"step": str(step), "seconds": str(seconds)})
    part.replace(config.out / "state.safetensors")


def _load_state(
    config: TrainConfig, masters: dict[str, Tensor], optimiser: torch.optim.AdamW
) -> tuple[int, float]:
    path = config.out / "state.safetensors"
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, weight in masters.items():
            weight.copy_(tensors[f"weight.{name}"])
            optimiser.state[weight] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else weight.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }
    return int(facts["step"]), float(facts["seconds"])
