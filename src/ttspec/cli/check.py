"""`ttspec check`: does a pair of models write what the target writes alone, learning on and off?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ttspec.cli.options import LEARNING, ExactModelFlags, JsonFlag, LearnFlags, options_of
from ttspec.cli.terminal import say, to_json
from ttspec.config import DraftConfig, GenerateConfig
from ttspec.errors import OptionError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.records import Result

PROMPTS = (
    "Explain in a few sentences why the sea is salty.",
    "Write a Python function that counts the vowels in a string.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show each step.",
    "Write a four-line poem about an old bicycle.",
    "List ten animals that live in a forest, one on each line.",
)
NEAR_TIE = 1e-3
COARSE_TIE = 0.5
"""Below float32 the target itself flips between two row counts at gaps up to about this."""
RARE = 10_000
"""In float32, more than one near-tie in so many tokens is a failure too."""


@Parameter(name="--learn", group=LEARNING)
@dataclass(frozen=True, kw_only=True)
class EagerLearnFlags(LearnFlags):
    """Learning options for the hardest case."""

    stride: int = 1
    """Rounds between updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedAnswer:
    """How one arm's answer to one prompt compares with plain decoding."""

    prompt: str
    arm: str
    tokens: int
    verdict: Literal["identical", "near-tie", "different"]
    position: int | None = None
    """The first token that differs."""
    margin: float | None = None
    """How far the target itself preferred its token there."""


def check(
    *prompts: str,
    models: ExactModelFlags = ExactModelFlags(),
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    deterministic: Annotated[bool, Parameter(negative=())] = False,
    learning: EagerLearnFlags = EagerLearnFlags(),
    as_json: JsonFlag = False,
) -> int:
    """Check that a drafter, learning or not, changes no token of the target's own text.

    A difference where the target's best two tokens are as good as tied is rounding; it is listed.

    Parameters
    ----------
    prompts
        Texts to answer; left out, five of different kinds.
    max_new_tokens
        Tokens of each answer.
    temperature
        0 is greedy.
    seed
        Seed of all arms.
    deterministic
        Let no clock decide anything, and every round read 16 tokens: then nothing may differ in
        bfloat16 either, and the check repeats bit for bit.
    as_json
        Print one JSON object.
    """
    learn = learning.config()
    shared = GenerateConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        learn=None,
        deterministic=deterministic,
    )
    engine = models.load(notify=say)
    if engine.drafter is None:
        raise OptionError("check compares a drafter with plain decoding; --drafter is none.")
    arms = {"static": shared, "learning": replace(shared, learn=learn)}
    findings = list(compare(engine, prompts or PROMPTS, shared, arms, quiet=as_json))
    dtype = str(engine.target.dtype).removeprefix("torch.")
    # A recurrence is rounded alike wherever rounds begin by the kernel for GPUs only; float32 reads
    # by masks of growing size, and is near enough.
    strict = deterministic and dtype != "float32"
    strict = strict and not (engine.target.recurrent and engine.target.device.type == "cpu")
    code = verdict(findings, dtype, strict=strict)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        print(to_json({"ok": code == 0, "dtype": dtype, "findings": rows}))
    else:
        print(conclusion(findings, dtype, ok=code == 0, strict=strict))
    return code


def compare(
    engine: Engine,
    prompts: Iterable[str],
    plain: GenerateConfig,
    arms: dict[str, GenerateConfig],
    *,
    quiet: bool,
) -> Iterable[ComparedAnswer]:
    """Answer every prompt plainly and in every arm; say at once how each compares."""
    plain = replace(plain, draft=DraftConfig(length=0))
    for prompt in prompts:
        expected = engine.generate(prompt, **options_of(plain))[0]
        for name, config in arms.items():
            result = engine.generate(prompt, **options_of(config))[0]
            finding = compare_answers(engine, prompt, name, expected, result, plain)
            if not quiet:
                print(line(finding), flush=True)
            yield finding


def compare_answers(
    engine: Engine, prompt: str, arm: str, expected: Result, found: Result, plain: GenerateConfig
) -> ComparedAnswer:
    """Compare two answers, and where they part ask the target how sure it was."""
    from ttspec.bench.results import first_difference
    from ttspec.diagnosis.ties import token_margin

    base = ComparedAnswer(
        prompt=prompt, arm=arm, tokens=len(expected.token_ids), verdict="identical"
    )
    position = first_difference(expected.token_ids, found.token_ids)
    if position is None:
        return base
    margin = token_margin(engine, expected, position, plain)
    tied = margin < tie_margin(str(engine.target.dtype).removeprefix("torch."))
    kind = "near-tie" if tied else "different"
    return replace(base, verdict=kind, position=position, margin=margin)


def tie_margin(dtype: str) -> float:
    """The gap under which the target's best two tokens count as tied."""
    return NEAR_TIE if dtype == "float32" else COARSE_TIE


def verdict(findings: list[ComparedAnswer], dtype: str, *, strict: bool = False) -> int:
    """0 if all is well, 1 if not; `strict` allows no near-tie."""
    if strict:
        return int(any(f.verdict != "identical" for f in findings))
    ties = sum(f.verdict == "near-tie" for f in findings)
    allowed = max(1, sum(f.tokens for f in findings) // RARE)
    too_many = dtype == "float32" and ties > allowed
    return int(too_many or any(f.verdict == "different" for f in findings))


def line(finding: ComparedAnswer) -> str:
    """One finding for people."""
    prompt = " ".join(finding.prompt.split())
    prompt = prompt if len(prompt) <= 48 else prompt[:47] + "…"
    text = f"{finding.verdict:<10} {finding.arm:<9} {finding.tokens:4d} tokens  {prompt}"
    if finding.position is not None:
        text += f"  (token {finding.position}, margin {finding.margin:.2g})"
    return text


def conclusion(
    findings: list[ComparedAnswer], dtype: str, *, ok: bool, strict: bool = False
) -> str:
    """What it all means."""
    counts = {v: sum(f.verdict == v for f in findings) for v in ("identical", "near-tie")}
    different = len(findings) - sum(counts.values())
    text = (
        f"{'ok' if ok else 'FAILED'}: {len(findings)} answers, {counts['identical']} identical, "
        f"{counts['near-tie']} identical up to a near-tie (margin under {tie_margin(dtype):g}), "
        f"{different} different, in {dtype}"
    )
    if strict:
        text += "\nRounds were all of one width: nothing may differ."
    elif dtype != "float32":
        text += (
            f"\n{dtype} promises no identity: plain decoding itself differs between two row counts "
            "at such margins. Use --deterministic or --dtype float32 for a strict answer."
        )
    return text
