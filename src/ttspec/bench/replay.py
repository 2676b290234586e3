"""Arms over the text of an earlier run.

Either the target has read it once: what is accepted is exact, and times are nobody's. Or each round
reads its part as it would live, and is timed: then times of arms are of one text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.bench.arms import ArmSpec
from ttspec.bench.known_text import KnownAnswer, KnownTextDecoder, Recording, use_recording
from ttspec.bench.manifest import describe, describe_drafter, run_label
from ttspec.bench.preparation import Job, PreparedRun, engines_for, plan
from ttspec.bench.results import Turn, Unit
from ttspec.bench.run_set import checksum_of
from ttspec.bench.store import Store, begun_run, read_run, require_same_run
from ttspec.config import GenerateConfig, SamplingConfig
from ttspec.decoding.captured_prompts import PROMPT_ATTENTION
from ttspec.decoding.conversation import noise_key, shared_prefix
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.template import ChatTemplate
from ttspec.drafters.base import Drafter
from ttspec.errors import DataError, OptionError, ResourceError
from ttspec.free_memory import free_memory, mib
from ttspec.models.target import Target
from ttspec.penalties import Rules, penalise
from ttspec.sampling import pick, position_noise

CHUNK = 256
"""Tokens that are drawn again at once."""
LEAST_AGREEMENT = 0.9
"""Least share of them that comes out as recorded: rounding flips a few in a hundred."""


@dataclass(frozen=True, slots=True)
class RecordedArm:
    """One arm's finished units of a run: the text that is replayed."""

    folder: Path
    manifest: dict[str, Any]
    arm: str
    units: dict[Unit, list[Turn]]


def open_source(folder: Path, arm: str | None = None) -> RecordedArm:
    """A run's text: that of `arm`, or of plain, or of its first arm.

    Raises:
        DataError: The folder is no sound run, or its text is not its target's.
        OptionError: The run has no answers of such an arm.
    """
    manifest, arms = read_run(folder)
    if "sampling" not in manifest:
        raise DataError(
            f"{folder} has no text that its target alone decides.\n"
            "Give a folder that `ttspec bench run` wrote."
        )
    answered = {a.name: a for a in arms if a.turns}
    name = arm or ("plain" if "plain" in answered else next(iter(answered), ""))
    if name not in answered:
        names = ", ".join(answered) or "none"
        raise OptionError(f"{folder} has no answers of an arm {name}; with answers: {names}.")
    return RecordedArm(folder, manifest, name, answered[name].units)


@dataclass(frozen=True, slots=True)
class RecordedText:
    """A text that some turns of a conversation share."""

    ids: list[int] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    """Where each turn's answer begins in it, by the turn's number."""


TextsByUnit = dict[Unit, list[RecordedText]]


@torch.no_grad()
def record(
    target: Target,
    taps: Sequence[int],
    source: RecordedArm,
    texts_of: TextsByUnit,
    sampling: SamplingConfig,
) -> tuple[Recording, str]:
    """Read a run's texts, of `conversations`, one at a time.

    Returns:
        The recording, and what must be said about it.

    Raises:
        DataError: The target would have written another text.
    """
    reader = replace(target, taps=tuple(taps))
    size = sum(len(text.ids) for texts in texts_of.values() for text in texts)
    shape, dtype = (size, int(target.head.shape[1])), target.dtype
    _require_host(shape[0] * shape[1] * dtype.itemsize * (1 + len(taps)), size)
    # On the host: of many conversations it is more than a GPU has.
    hidden = torch.empty(shape, dtype=dtype)
    states = {tap: torch.empty_like(hidden) for tap in taps}
    places: dict[int, tuple[int, int]] = {}
    first = drawn = count = 0
    for (request, seed), texts in texts_of.items():
        turns = {turn.turn: turn for turn in source.units[request, seed]}
        keys = noise_keys(seed, texts)
        for text in texts:
            ids, last = text.ids, first + len(text.ids) - 1
            fed = torch.tensor([ids], device=target.device)
            with sdpa_kernel(PROMPT_ATTENTION):
                features, read = reader.read(fed)
            here = slice(first, last + 1)
            hidden[here] = read[0].cpu()
            parts = features[0].chunk(len(taps) or 1, 1)
            for table, part in zip(states.values(), parts, strict=False):
                table[here] = part.cpu()
            for number, begin in text.begins.items():
                key, length = keys[number], len(turns[number].result.token_ids)
                places[key], end = (first, last), begin + length
                drawn += _count_reproduced(target, read[0], fed[0], key, begin, end, sampling)
                count += length
            first = last + 1
    if drawn < LEAST_AGREEMENT * count:
        raise DataError(
            f"Of {count} recorded tokens of {source.folder} the target would write {drawn}.\n"
            "Name the --target that wrote them; one whose logits are not its head's is not read."
        )
    note = f"{drawn:,} of {count:,} recorded tokens are what the target draws on this reading."
    return Recording(hidden, states, places), note


def _require_host(need: int, tokens: int) -> None:
    free = free_memory(torch.device("cpu"))
    if free is not None and need > free:
        raise ResourceError(
            f"What the target says of {tokens:,} tokens takes {mib(need)} of the machine's memory; "
            f"{mib(free)} are free.\nReplay a run of fewer requests."
        )


def conversations(
    source: RecordedArm, tokenizer: PreTrainedTokenizerBase
) -> tuple[TextsByUnit, list[str]]:
    """The texts of each unit; what is left out, in sentences.

    Raises:
        DataError: Nothing is left.
    """
    found: TextsByUnit = {}
    starts: set[tuple[int, ...]] = set()
    notes = []
    template = ChatTemplate(tokenizer)
    for (request, seed), turns in sorted(source.units.items()):
        history, texts = ChatHistory(template), []
        for turn in turns:
            ids, answer = history.ask(turn.user), turn.result
            known = texts[-1].ids if texts else []
            kept = min(shared_prefix(known, ids), max(len(known) - 1, 0), len(ids) - 1)
            if len(ids) - kept != answer.stats.prompt_tokens:
                notes.append(f"Request {request} is left out: its prompt was more than its text.")
                break
            if not answer.token_ids:
                continue
            if not texts or kept < len(known) - 1:  # the template writes it otherwise now
                texts.append(RecordedText())
            text = texts[-1]
            text.ids[:] = ids
            text.begins[turn.turn] = len(ids)
            text.ids.extend(answer.token_ids)
            history.answer(answer.text, answer.token_ids)
        else:
            begins = texts[0].begins if texts else {}
            start = seed, *(texts[0].ids[: min(begins.values())] if begins else [])
            if start in starts:  # side by side they had other noise
                notes.append(f"Request {request} is left out: an earlier one begins like it.")
            elif texts:
                starts.add(start)
                found[request, seed] = texts
    notes = list(dict.fromkeys(notes))
    if not found:
        raise DataError(f"{source.folder} has nothing to replay. {' '.join(notes)}")
    return found, notes


def _count_reproduced(
    target: Target, hidden: Tensor, ids: Tensor, key: int, begin: int, end: int, s: SamplingConfig
) -> int:
    """How many tokens ids[begin:end] are what the target draws after hidden [L, H] before them."""
    same = 0
    rules = Rules.of(s, target.ends, int(target.config.vocab_size), ids.device)
    for at in range(begin, end, CHUNK):
        upto = min(at + CHUNK, end)
        logits = target.compute_logits(hidden[None, at - 1 : upto - 1])
        if rules:
            places = ids.new_tensor([[at], [begin]])
            logits = penalise(logits, ids[None, :upto], places[0], places[1], rules)
        noise = None
        if s.temperature > 0:
            keys, start = ids.new_tensor([key]), ids.new_tensor([at])
            noise = position_noise(keys, start, upto - at, logits.shape[-1])
        same += int((pick(logits, noise, s)[0] == ids[at:upto]).sum())
    return same


def noise_keys(seed: int, texts: Sequence[RecordedText]) -> dict[int, int]:
    """The noise key of each turn's answer, by the turn's number."""
    start = texts[0].ids[: min(texts[0].begins.values())]
    numbers = (number for text in texts for number in text.begins)
    return {number: noise_key(seed, start, turn=number) for number in numbers}


def known_answers(source: RecordedArm, texts_of: TextsByUnit) -> dict[int, KnownAnswer]:
    """A run's answers by their noise keys."""
    answers = {}
    for (request, seed), texts in texts_of.items():
        keys = noise_keys(seed, texts)
        for turn in source.units[request, seed]:
            if key := keys.get(turn.turn):
                cut = turn.result.finish_reason in ("length", "context")
                answers[key] = KnownAnswer(turn.result.token_ids, cut)
    return answers


def replayable(arms: Sequence[ArmSpec], *, timed: bool = False) -> list[ArmSpec]:
    """Arms as they are replayed.

    Untimed, no clock decides, and what is published when ready is so now.

    Raises:
        OptionError: An arm needs more than the text that was written.
    """
    for arm in arms:
        if not timed and arm.learn and arm.learn.supervision == "block":
            raise OptionError(
                f"{arm.name} cannot be replayed: it learns from what the target says behind a "
                "rejected draft, which a text does not hold.\nRun it live, with `ttspec bench run`."
            )
    if timed:
        return list(arms)
    replayed = []
    for arm in arms:
        learn = arm.learn
        if learn and learn.publish == "ready":
            learn = replace(learn, publish="now")
        replayed.append(replace(arm, learn=learn, draft=replace(arm.draft, adaptive=False)))
    return replayed


def prepare(
    engine: Engine,
    source: RecordedArm,
    arms: Sequence[ArmSpec],
    drafters: Mapping[str, Drafter],
    rows: int | None = None,
    *,
    out: Path | None = None,
    timed: bool = False,
) -> PreparedRun:
    """Let an engine replay a run.

    Untimed, its target becomes its recorded reading of the run's text.

    Args:
        engine: Of the run's target.
        source: The run.
        arms: What is to be measured.
        drafters: Those that arms name, by name.
        rows: Side by side, in the run's own batches; None is conversations of all seeds, and timed
            as many as the run had.
        out: Where this replay may have been begun: then it goes on, and in the rows that it had.
        timed: Each round is as live, but writes the run's text.

    Raises:
        DataError: It is not the run's target, or `out` holds another run.
        OptionError: An arm's drafter is missing or cannot learn.
    """
    old, seeds = source.manifest, source.manifest["seeds"]
    manifest = _manifest(engine, source, arms, drafters, timed=timed)
    begun = begun_run(out) if out else {}
    if out and begun:
        require_same_run(out, begun, manifest | {"rows": begun.get("rows")})
    options = {name: old[name] for name in ("max_new_tokens", "ignore_eos")}
    recorded = asdict(SamplingConfig()) | old["sampling"]  # older runs had fewer options
    options |= {name: recorded[name] for name in engine.target.defaults}
    texts_of, notes = conversations(source, engine.target.tokenizer)
    answers = known_answers(source, texts_of)
    if timed:
        rows = rows or old["rows"]
        engine.make_decoder = partial(KnownTextDecoder, answers=answers)
    else:
        sampling = sampling_of(GenerateConfig(**options, seed=0), engine.target)
        taps = {t for e in engines_for(engine, arms, drafters).values() for t in e.target.taps}
        recording, note = record(engine.target, sorted(taps), source, texts_of, sampling)
        use_recording(engine, recording, answers)
        notes.append(note)

    count, units = old["suite"]["requests"], sorted(texts_of)
    if rows is None:  # what fits may be another number today
        fit = begun.get("rows") or _fitting_rows(engine, source, arms, drafters, units, options)
        groups = [units[i : i + fit] for i in range(0, len(units), fit)]
        batches = [[Job(arm, *unit) for unit in group] for group in groups for arm in arms]
    else:
        batches = plan(arms, count, seeds, order=seeds[0], rows=min(rows, count))
        batches = [[u for u in batch if (u.request, u.seed) in texts_of] for batch in batches]
    requests: list[list[str]] = [[""] for _ in range(count)]
    for request, seed in units:
        users = [turn.user for turn in source.units[request, seed]]
        requests[request] = max(users, requests[request], key=len)
    manifest |= {"rows": max(map(len, batches), default=1), "notes": notes}
    return PreparedRun(
        manifest=manifest,
        requests=requests,
        batches=[batch for batch in batches if batch],
        options=options,
        session_tokens=old["session_tokens"],
        drafters=drafters,
    )


def _manifest(
    engine: Engine,
    source: RecordedArm,
    arms: Sequence[ArmSpec],
    drafters: Mapping[str, Drafter],
    *,
    timed: bool,
) -> dict[str, Any]:
    """How the replay is described; what it has of the run is the run's.

    Raises:
        DataError: The engine's target is not the run's.
    """
    old = source.manifest
    replay = {"run": source.folder.name, "arm": source.arm, "dtype": old["dtype"]}
    if timed:
        replay["timed"] = True
    title = f"ttspec bench: {old['suite']['name']} ({run_label({'replay': replay})})"
    manifest = describe(engine, title=title) | {"replay": replay}
    if checksum_of(manifest, "target") != checksum_of(old, "target"):
        raise DataError(
            f"{source.folder} was written by {old['target']['name']}, not by "
            f"{engine.target.name}.\nName its --target."
        )
    same = ("suite", "max_new_tokens", "session_tokens", "ignore_eos", "sampling", "temperature")
    return manifest | {
        **{name: old[name] for name in (*same, "seeds")},
        "drafters": {name: describe_drafter(d) for name, d in drafters.items()},
        "arms": [arm.name for arm in arms],
        "arm_options": {arm.name: arm.options() for arm in arms},
    }


def _fitting_rows(
    engine: Engine,
    source: RecordedArm,
    arms: Sequence[ArmSpec],
    drafters: Mapping[str, Drafter],
    units: Sequence[Unit],
    options: Mapping[str, Any],
) -> int:
    """Conversations that every arm may have side by side."""
    turns = [source.units[unit] for unit in units]
    longest = max(first.result.stats.prompt_tokens for first, *_ in turns)
    sessions = max(map(len, turns)) > 1
    rows = len(units)
    for arm, own in zip(arms, engines_for(engine, arms, drafters).values(), strict=True):
        config = GenerateConfig(**options, seed=0, draft=arm.draft, learn=arm.learn)
        rows = own.rows_for(config, rows, longest, sessions=sessions)
    return rows


class UntimedStore(Store):
    """A run folder without times: those of a replay are nobody's."""

    def add(self, arm: str, turns: Sequence[Turn]) -> None:
        """Write a finished unit."""
        super().add(arm, [_without_times(turn) for turn in turns])


def _without_times(turn: Turn) -> Turn:
    result, nothing = turn.result, (0.0, 0.0, 0.0)
    rounds = [r._replace(seconds=nothing) for r in result.rounds]
    spent = dict.fromkeys(result.stats.seconds_in, 0.0)
    stats = replace(result.stats, seconds=0.0, tokens_per_second=0.0, seconds_in=spent)
    known = {name: getattr(turn, name) for name in ("request", "user", "turn")}
    return Turn(**known, result=replace(result, rounds=rounds, stats=stats), seconds=0.0)
