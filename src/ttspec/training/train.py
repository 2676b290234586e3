"""Train a DFlash drafter for a target: anchors, blocks and weights as published (drafters.md 2d).

Everything is resumable: the answers line by line, the weights by a saved state. This file knows
tensors and files; the command draws the progress.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ttspec.decoding.engine import Engine
from ttspec.drafters.checkpoint import save_drafter
from ttspec.drafters.dflash import DFlash, default_taps
from ttspec.errors import OptionError, TrainingError
from ttspec.losses import cross_entropy, forward_kl, position_weights
from ttspec.models.target import Target
from ttspec.training.answers import read_dialogues, write_answers

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
    loss: Literal["ce", "kl"] = "ce"
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
    _claim(config)
    dialogues = read_dialogues(config.prompts)
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
    examples = _examples(answers, config.max_length)
    drafter = new_drafter(target, config)
    target.taps = drafter.taps
    drafter.bind(target.embedding, target.head, len(drafter.taps) * drafter.hidden)
    masters = {n: w.float().requires_grad_() for n, w in drafter.weights.items()}
    optimiser = torch.optim.AdamW(masters.values(), config.lr, (0.9, 0.95), weight_decay=0.0)
    step, spent = _load_state(config, masters, optimiser)
    per_epoch = math.ceil(len(examples) / config.batch)
    total = per_epoch * config.epochs
    began = saved = time.monotonic()
    history: list[dict[str, Any]] = []
    last = (math.nan, ())
    while step < total:
        elapsed = spent + time.monotonic() - began
        limit = config.minutes * 60 if config.minutes else math.inf
        done = max(step / total, elapsed / limit)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = config.lr * min(1.0, done / 0.04 + 1e-3, _cosine(done))
        batch = _batch(examples, config, step, per_epoch, target.device)
        drafter.weights = {n: w.to(target.dtype) for n, w in masters.items()}
        loss, accuracy = _loss(target, drafter, batch, config)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), config.clip)
        optimiser.step()
        step += 1
        if step % 10 == 0 or step == total:
            if not math.isfinite(float(norm)):
                raise TrainingError(
                    f"The gradient is not finite at step {step}; lr is {config.lr}.\n"
                    "Lower it and start in a new folder."
                )
            last = float(loss.detach()), tuple(round(a, 4) for a in accuracy.tolist())
            elapsed = spent + time.monotonic() - began
            left = min(limit - elapsed, elapsed * (total - step) / step)
            report(Progress("training", done, left, last[0], last[1], tokens=step))
        if time.monotonic() - saved > SAVE_EVERY:
            _save_state(config, masters, optimiser, step, spent + time.monotonic() - began)
            saved = time.monotonic()
    _save_state(config, masters, optimiser, step, spent + time.monotonic() - began)
    history.append({"steps": step, "loss": last[0], "accuracy": last[1]})
    folder = config.out / "drafter"
    weights = {n: w.detach().to(torch.bfloat16) for n, w in masters.items()}
    save_drafter(folder, drafter.config, weights)
    facts = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "target": target.name,
        "dialogues": len(examples),
        "tokens": sum(len(ids) for ids, _ in examples),
        "seconds": spent + time.monotonic() - began,
        **history[-1],
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folder


def new_drafter(target: Target, config: TrainConfig) -> DFlash:
    """A DFlash drafter of the target's width, with random weights."""
    c = target.config
    layers = int(c.num_hidden_layers)
    if config.layers < 1 or config.block < 2 or layers < 5:
        raise OptionError("A drafter needs 1 layer, a block of 2, and a target of 5 layers or more.")
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
        name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
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
    target: Target, drafter: DFlash, batch: dict[str, Tensor], config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Loss of one batch, and the accuracy per drafted position."""
    features, states = target.read(batch["ids"])
    logits = drafter.teach(features, batch["tokens"], batch["start"], config.block - 1)
    weights = position_weights(config.block - 1, config.decay, logits.device)
    mask, labels = batch["mask"], batch["labels"]
    if config.loss == "kl":
        row = torch.arange(len(states), device=states.device)[:, None, None]
        offset = torch.arange(config.block - 1, device=states.device)
        at = (batch["start"][..., None] + offset).clamp(max=states.shape[1] - 1)
        values = forward_kl(F.linear(states[row, at], target.head), logits)
    else:
        values = cross_entropy(labels, logits)
    weight = weights * mask
    right = ((logits.argmax(-1) == labels) & mask).sum((0, 1)) / mask.sum((0, 1)).clamp(min=1)
    return (values * weight).sum() / weight.sum().clamp(min=1e-6), right


def _batch(
    examples: list[tuple[list[int], list[tuple[int, int]]]],
    config: TrainConfig,
    step: int,
    per_epoch: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Step `step`'s dialogues and anchors, a function of the seed alone."""
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(examples), generator=_generator(config.seed, epoch)).tolist()
    # Dialogues of like length together, in groups, so that little is padding.
    group = config.batch * 16
    at = place * config.batch
    near = sorted(order[at - at % group :][:group], key=lambda i: len(examples[i][0]))
    chosen = near[at % group :][: config.batch] or near[-config.batch :]
    generator = _generator(config.seed, epoch, place)
    length = -(-max(len(examples[i][0]) for i in chosen) // 64) * 64
    ids = torch.zeros(len(chosen), length + config.block, dtype=torch.long)
    taught = torch.zeros_like(ids, dtype=torch.bool)
    for row, i in enumerate(chosen):
        tokens, spans = examples[i]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for begin, end in spans:
            taught[row, begin:end] = True
    possible = (taught[:, :-1] & taught[:, 1:]).float()
    start = torch.multinomial(possible, config.anchors, replacement=True, generator=generator)
    offset = torch.arange(1, config.block)
    at_label = start[..., None] + offset
    row = torch.arange(len(chosen))[:, None, None]
    made = {
        "ids": ids[:, :length],
        "start": start,
        "tokens": ids.gather(1, start),
        "labels": ids[row, at_label],
        "mask": taught[row, at_label].long().cumprod(-1).bool(),
    }
    if device.type == "cuda":  # from pinned memory the copy does not hold up the host
        made = {name: tensor.pin_memory() for name, tensor in made.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in made.items()}


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seeds) & 0x7FFFFFFF)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _examples(answers: list[Path], max_length: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    def lines() -> Iterator[str]:
        for path in answers:
            yield from path.read_text(encoding="utf-8").splitlines()

    records = (json.loads(line) for line in lines())
    examples = [
        (r["ids"][:max_length], [(b, min(e, max_length)) for b, e in r["spans"] if b < max_length - 1])
        for r in sorted(records, key=lambda r: r["n"])
    ]
    examples = [(ids, spans) for ids, spans in examples if any(e - b > 1 for b, e in spans)]
    if not examples:
        raise TrainingError("No answer has two tokens or more.\nGive other prompts.")
    return examples


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
            raise OptionError(f"{config.out} holds a run already.\nAdd --resume, or give a new folder.")
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
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    with torch.no_grad():
        for name, weight in masters.items():
            weight.copy_(tensors[f"weight.{name}"])
            optimiser.state[weight] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else weight.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }
    return int(facts["step"]), float(facts["seconds"])
