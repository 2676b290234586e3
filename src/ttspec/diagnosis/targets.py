"""Which architectures are verified rightly: each is built small and compared with transformers.

A wrong cache, mask or position still gives fluent text, so nobody would notice. Three checks:
logits after rows were rolled back again and again, greedy text, and features. What cannot be right
is refused by name; nothing may be accepted and wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ttspec.decoding.engine import Engine
from ttspec.diagnosis.families import BRIEFLY, BUILT_IN, FAMILIES, build
from ttspec.drafters.ngram import Ngram
from ttspec.errors import ResourceError, TargetError
from ttspec.models.fixed_rotary import fix_rotary
from ttspec.models.source import resolve
from ttspec.models.target import Target, load_target

Status = Literal["pass", "fail", "refused"]
ROWS = 4
WIDEST = 8
"""Tokens of the largest block."""
TAILS = 5
"""Rounds whose rejected tokens are compared too, each with a forward of its own."""
SPARE = 20
"""Ids without a token: some tokenizer classes add special tokens of their own."""
PROMPTS = 3
PROMPT_TOKENS = 12
TOLERANCE = 1e-4
"""Of an error, where the right numbers have a standard deviation of 1."""
NEAR_TIE = 1e-3
"""A gap between the best two logits that rounding may turn round (exactness.md 3)."""
RARE = 10_000
"""One near-tie that parts the texts is allowed in so many tokens, and one in fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is compared."""

    rounds: int = 200
    tokens: int = 512
    """Of each greedy text."""


FULL, BRIEF = Effort(), Effort(rounds=60, tokens=96)
REAL_WEIGHTS = Effort(rounds=6, tokens=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRow:
    """What was found out about one architecture."""

    name: str
    status: Status
    max_error: float | None = None
    """Largest error of a logit after rollback, in standard deviations of the right logits."""
    feature_error: float | None = None
    """The same of the features at all taps."""
    compared_tokens: int = 0
    """Greedy tokens compared with transformers' own."""
    near_ties: int = 0
    """Texts that part where the best two tokens are as good as tied."""
    reason: str | None = None
    """Why it was refused or fails."""
    seconds: float = field(default=0.0, compare=False)


def check_targets(
    device: torch.device,
    names: Sequence[str] = (*FAMILIES, *BUILT_IN),
    notify: Callable[[str], None] | None = None,
) -> Iterator[TargetRow]:
    """Compare architectures with transformers, one row each.

    Args:
        device: Where the models run.
        names: Keys of `FAMILIES`, or built-in targets, whose real weights are read for a short
            while only; one that cannot be fetched has no row.
        notify: Told what has no row, and why.
    """
    for name in names:
        began = time.perf_counter()
        try:
            if name in BUILT_IN:
                row = check_real(name, device)
            else:
                row = check_family(name, device, BRIEF if name in BRIEFLY else FULL)
        except ResourceError as error:
            if notify:
                notify(f"{name} is left out: {str(error).splitlines()[0]}")
            continue
        yield replace(row, seconds=time.perf_counter() - began)


def check_family(name: str, device: torch.device, effort: Effort = FULL) -> TargetRow:
    """Build an architecture small, with random weights, and compare it."""
    with TemporaryDirectory() as folder:  # read back as users' targets are
        reference = build(name)
        torch.nn.Module.to(reference, device)
        try:
            reference.save_pretrained(folder)
            number_tokenizer(reference.config.get_text_config().vocab_size - SPARE).save_pretrained(
                folder
            )
            return _check(name, Path(folder), reference, device, effort)
        except TargetError as error:
            return TargetRow(name=name, status="refused", reason=str(error))


def check_real(name: str, device: torch.device) -> TargetRow:
    """Compare a built-in target, for a short while.

    Raises:
        ResourceError: It had to be fetched and could not be.
    """
    path = resolve(name).path
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    torch.nn.Module.to(reference, device).eval()
    return _check(name, path, reference, device, REAL_WEIGHTS)


def _check(
    name: str, folder: Path, reference: PreTrainedModel, device: torch.device, effort: Effort
) -> TargetRow:
    """The three checks.

    Raises:
        TargetError: The target is refused.
    """
    target = load_target(str(folder), device=device, dtype=torch.float32)
    fix_rotary(reference)
    try:
        logits, features = rollback(target, reference, effort.rounds)
        features = max(features, reading(target, reference))
        ties, wrong = texts(target, reference, effort.tokens)
    except TargetError:
        raise
    except Exception as error:  # whatever a model raises, the other rows are to be seen
        first = (str(error).strip() or repr(error)).splitlines()[0]
        return TargetRow(name=name, status="fail", reason=f"{type(error).__name__}: {first}")
    count = 2 * PROMPTS * effort.tokens
    found = [
        f"logits differ by {logits:.1e}" if not logits <= TOLERANCE else None,
        f"features differ by {features:.1e}" if not features <= TOLERANCE else None,
        *wrong,
        f"{ties} texts part at near-ties" if ties > max(1, count // RARE) else None,
    ]
    reason = "; ".join(text for text in found if text) or None
    return TargetRow(
        name=name,
        status="fail" if reason else "pass",
        max_error=logits,
        feature_error=features,
        compared_tokens=count,
        near_ties=ties,
        reason=reason,
    )


def rollback(target: Target, reference: PreTrainedModel, rounds: int) -> tuple[float, float]:
    """Errors of logits and features over rounds that keep part of a block, another in each row.

    Every kept token is compared with one forward over all that was kept. The rejected ones of
    some rounds are compared with a forward over what was kept before and the block.

    Args:
        target: Its rows are rolled back.
        reference: The same weights under transformers' own attention, without a cache.
        rounds: Blocks of 1 to `WIDEST` tokens, each at its row's own length.
    """
    device, size = target.device, int(target.config.vocab_size)
    target.taps = tuple(range(int(target.config.num_hidden_layers) + 1))
    draw = torch.Generator().manual_seed(0)
    rows = torch.arange(ROWS)[:, None]
    text = torch.randint(size, (ROWS, rounds * WIDEST), generator=draw)
    cache = target.cache(ROWS, text.shape[1], WIDEST)
    lengths = torch.zeros(ROWS, dtype=torch.long)
    kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    logit_errors, feature_errors = LargestError(), LargestError()
    for number in range(rounds):
        width = int(torch.randint(1, WIDEST + 1, (), generator=draw))
        keep = 1 + torch.randint(1 << 30, (ROWS,), generator=draw) % width
        column = torch.arange(width)
        place = lengths[:, None] + column
        rejected = column >= keep[:, None]
        other = torch.randint(size, (ROWS, width), generator=draw)
        block = torch.where(rejected, other, text[rows, place])
        found, features = target.forward(
            cache, block.to(device), lengths.to(device), int(lengths.max())
        )
        assert found is not None
        kept.append((place, ~rejected, found, features))
        if number % max(1, rounds // TAILS) == 0:
            whole = text[:, : int(place.max()) + 1].clone()
            whole[rows, place] = block
            expected, states = _read(reference, whole.to(device))
            at = rejected.nonzero(as_tuple=True)
            there = at[0], place[at]
            logit_errors.add(found[at], expected[there])
            feature_errors.add(features[at], states[there])
        lengths += keep
    expected, states = _read(reference, text[:, : int(lengths.max())].to(device))
    for place, committed, found, features in kept:
        at = committed.nonzero(as_tuple=True)
        there = at[0], place[at]
        logit_errors.add(found[at], expected[there])
        feature_errors.add(features[at], states[there])
    return logit_errors.largest, feature_errors.largest


def reading(target: Target, reference: PreTrainedModel) -> float:
    """Error of what training reads: features of whole sequences, and logits made of them."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(int(target.config.vocab_size), (2, 48), generator=draw)
    tokens = tokens.to(target.device)
    expected, states = _read(reference, tokens)
    features, hidden = target.read(tokens)
    errors = LargestError()
    errors.add(features, states)
    errors.add(target.compute_logits(hidden), expected)
    return errors.largest


def texts(target: Target, reference: PreTrainedModel, tokens: int) -> tuple[int, list[str]]:
    """Greedy texts beside transformers' own: those that part at a near-tie, and what is wrong."""
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(int(target.config.vocab_size), (PROMPTS, PROMPT_TOKENS), generator=draw)
    reference.generation_config.eos_token_id = None
    whole = reference.generate(  # type: ignore[operator]
        prompts.to(target.device),
        attention_mask=torch.ones_like(prompts).to(target.device),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    ties, wrong = 0, []
    for drafter in (None, Ngram()):
        target.taps = ()
        results = Engine(target, drafter).generate(
            prompts.tolist(), max_new_tokens=tokens, temperature=0.0, ignore_eos=True, learn=None
        )
        for row, result in zip(whole, results, strict=True):
            found = row.new_tensor(result.token_ids)
            differ = (found != row[PROMPT_TOKENS:]).nonzero()
            if not len(differ):
                continue
            at = int(differ[0])
            logits, _ = _read(reference, row[None, : PROMPT_TOKENS + at])
            best = logits[0, -1].topk(2).values
            gap = float(best[0] - best[1])
            if gap < NEAR_TIE:
                ties += 1
            else:
                how = "drafted" if drafter else "plain"
                wrong.append(
                    f"{how} text parts at token {at}, where the best two are {gap:.2g} apart"
                )
    return ties, wrong[:1]


class LargestError:
    """The largest difference from what is right, in its standard deviations."""

    def __init__(self) -> None:
        self.largest = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Compare two tensors of one shape; a NaN counts as infinite."""
        if expected.numel() > 1:
            error = (found - expected).abs().max() / expected.std()
            self.largest = max(self.largest, float(error.nan_to_num(torch.inf)))


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are numbers; no text is read in these checks."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@torch.no_grad()
def _read(reference: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and all hidden states [B, T, (layers + 1) H], by transformers alone."""
    out = reference(input_ids=tokens, use_cache=False, output_hidden_states=True)
    return out.logits, torch.cat(out.hidden_states, dim=-1)
