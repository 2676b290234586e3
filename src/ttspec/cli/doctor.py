"""`ttspec doctor`: what a target and a drafter are, what they cost and what may go wrong."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ttspec.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    Flag,
    JsonFlag,
    ModelFlags,
    Positive,
    PositiveOrNone,
)
from ttspec.cli.terminal import say, to_json
from ttspec.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.diagnosis.probe import Measured
    from ttspec.drafters.base import Drafter
    from ttspec.models.target import Target

WIDTH = 100


def doctor(
    target: str = "smollm2-135m",
    drafter: str = "auto",
    *,
    probe: Flag = False,
    targets: Flag = False,
    rows: Positive = 1,
    context: PositiveOrNone = None,
    device: Device = "auto",
    device_map: DeviceMap | None = None,
    dtype: Dtype = "auto",
    as_json: JsonFlag = False,
) -> int:
    """Say what is loaded, from where, what it needs, and what would silently cost acceptance.

    Parameters
    ----------
    target
        Built-in name, local folder, .gguf file or hub id.
    drafter
        The same; auto is the target's own, none leaves it out.
    probe
        Also measure: is the drafter accepted more often with other taps or another rotary base?
    targets
        Instead of a pair, check the architectures that targets may have: each is built small and
        compared with transformers (two to three minutes).
    rows
        Rows that the memory of a whole run is told for.
    context
        Tokens of each of them; left out, what a session makes room for.
    device
        Where to load them.
    device_map
        auto spreads a target that fits no single GPU over all of them.
    dtype
        Number format of the weights in memory.
    as_json
        Print one JSON object; its path is the folder with the target's weights. With --targets, a
        list of rows.
    """
    if targets:
        _only_targets(target=target, drafter=drafter, probe=probe, context=context, dtype=dtype)
        return _targets(device, as_json=as_json)
    models = ModelFlags(
        target=target, drafter=drafter, device=device, device_map=device_map, dtype=dtype
    )
    reason = None
    try:
        engine = models.load(notify=say)
    except CheckpointError as error:
        reason = str(error)
        engine = replace(models, drafter="none").load(notify=say)
    report = examine(engine, rows, context) | {"fits": None, "reason": reason}
    if reason is not None or engine.drafter is not None:
        report["fits"] = reason is None
    if reason is not None:
        text = " ".join(reason.splitlines())
        report["findings"].insert(0, {"name": "fit", "level": "problem", "text": text})
    elif probe:
        report |= _probe(engine, report["findings"])
    if as_json:
        print(to_json(report))
    else:
        print("\n".join(lines(report)))
    return int(any(f["level"] == "problem" for f in report["findings"]))


def examine(engine: Engine, rows: int = 1, context: int | None = None) -> dict[str, Any]:
    """Everything there is to tell, as JSON values; memory is in bytes."""
    from ttspec.decoding.engine import SESSION_CONTEXT
    from ttspec.diagnosis import findings
    from ttspec.diagnosis.memory import memory, memory_finding

    target, drafter = engine.target, engine.drafter
    parts = memory(engine, rows, min(context or SESSION_CONTEXT, target.context))
    found = [*findings.examine(engine), memory_finding(parts, target.device)]
    return {
        "path": str(target.path) if target.path else None,
        "target": _target(target),
        "drafter": _drafter(drafter) if drafter is not None else None,
        "memory": parts,
        "findings": [asdict(finding) for finding in found],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The same for people."""
    from ttspec.free_memory import mib

    target, drafter, memory = report["target"], report["drafter"], report["memory"]
    ends = ", ".join(f"{i} {text!r}" for i, text in target["end_tokens"].items())
    out = [
        f"target       {target['name']} ({target['origin']}): {target['architecture']}",
        f"  path       {report['path']}",
        f"  size       {target['parameters'] / 1e6:,.1f} M parameters, {target['layers']} layers, "
        f"{target['vocabulary']:,} tokens in the vocabulary",
        f"  runs       {target['dtype']} on {target['device']}, "
        f"context {target['context']:,} tokens",
        f"  ends       {ends or 'no end token'}",
        f"  memory     {mib(memory['target_weights'])} weights, "
        f"{mib(memory['target_cache_per_1000_tokens'])} cache per 1,000 tokens and row",
    ]
    if memory["target_state_per_row"]:
        out.append(f"  state      {mib(memory['target_state_per_row'])} for each row")
    if drafter is not None:
        out += [
            f"drafter      {drafter['name']} ({drafter['kind']}): fits",
            f"  path       {drafter['path']}",
            f"  size       {drafter['parameters'] / 1e6:,.1f} M parameters, drafts "
            f"{drafter['length']} tokens a round, reads "
            + (f"hidden states {drafter['taps']}" if drafter["taps"] else "the text"),
            f"  memory     {mib(memory['drafter_weights'])} weights, "
            f"{mib(memory['drafter_cache_per_1000_tokens'])} cache per 1,000 tokens and row",
            f"  learning   {mib(memory['learning_per_row'])} for each row whose weights learn, "
            f"{mib(memory['learning_per_row_lora'])} for low-rank changes",
        ]
    elif report["reason"] is not None:
        first, *rest = report["reason"].splitlines()
        out += [f"drafter      does not fit: {first}", *(f"             {line}" for line in rest)]
    else:
        out.append("drafter      none: plain decoding")
    out.append("findings")
    for finding in report["findings"]:
        out += _finding_lines(finding)
    if rows := report.get("probe"):
        head = "probe                         accepted   95 % interval   positions    nats   "
        out += [f"{head}change of nats", *map(_probe_line, rows)]
    return out


def _finding_lines(finding: dict[str, Any]) -> list[str]:
    head = f"  {finding['name']:<13} {finding['level']:<8} "
    return textwrap.wrap(
        finding["text"],
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _probe_line(row: dict[str, Any]) -> str:
    interval = f"{row['low']:.1%} – {row['high']:.1%}"
    change = "" if row["change"] is None else f"{row['change']:+.3f} ± {row['margin']:.3f}"
    return (
        f"  {row['name']:<27} {row['acceptance']:>8.1%}   {interval:<15} "
        f"{row['positions']:>9}   {row['nats']:>5.3f}   {change}"
    ).rstrip()


TARGETS_HEAD = "target             status    logits  features   tokens  near-ties   seconds"


def target_lines(row: dict[str, Any]) -> list[str]:
    """One architecture for people."""
    if row["status"] == "refused":
        head, text = f"{row['name']:<18} refused   ", " ".join(row["reason"].split())
        return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    errors = [row["max_error"], row["feature_error"]]
    shown = [f"{e:.1e}" if e is not None else "–" for e in errors]
    line = (
        f"{row['name']:<18} {row['status']:<7} {shown[0]:>8}  {shown[1]:>8}   "
        f"{row['compared_tokens']:>6}  {row['near_ties']:>9}   {row['seconds']:>7.1f}"
    )
    return [line] + ([f"  {row['reason']}"] if row["reason"] else [])


def _only_targets(**given: Any) -> None:
    """Refuse what says something about a pair."""
    plain = {"target": "smollm2-135m", "drafter": "auto", "probe": False, "context": None}
    for name, value in given.items():
        allowed = ("auto", "float32") if name == "dtype" else (plain[name],)
        if value not in allowed:
            raise OptionError(
                f"--targets was given together with {name} {value}; it checks architectures, in "
                "float32, and no pair.\nDrop one of the two."
            )


def _targets(device: Device, *, as_json: bool) -> int:
    """Check the architectures, one after the other; 1 if any is accepted and wrong."""
    ModelFlags().set_up()
    from ttspec.decoding.loading import device_of
    from ttspec.diagnosis.targets import check_targets

    rows = []
    if not as_json:
        print(TARGETS_HEAD, flush=True)
    for row in map(asdict, check_targets(device_of(device), notify=say)):
        rows.append(row)
        if not as_json:
            print("\n".join(target_lines(row)), flush=True)
    counts = Counter(row["status"] for row in rows)
    if as_json:
        print(to_json(rows))
    else:
        print(f"{counts['pass']} pass, {counts['fail']} fail, {counts['refused']} refused by name")
    return int(counts["fail"] > 0)


def _probe(engine: Engine, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure; append what was found."""
    from ttspec.diagnosis.probe import probe

    say("measuring on text that the target writes ...")
    measured, finding = probe(engine)
    findings.append(asdict(finding))
    return {"probe": [_row(m, measured[0]) for m in measured]}


def _row(measured: Measured, present: Measured) -> dict[str, Any]:
    low, high = measured.interval
    change, margin = measured.change(present)
    if measured is present or not math.isfinite(margin):
        change = margin = None
    return {
        "name": measured.reading.name,
        "taps": list(measured.reading.taps),
        "rope_base": measured.reading.rope_base,
        "setting": measured.reading.setting,
        "acceptance": measured.acceptance,
        "low": low,
        "high": high,
        "positions": len(measured.hits),
        "nats": measured.surprise,
        "change": change,
        "margin": margin,
    }


def _target(target: Target) -> dict[str, Any]:
    config = target.config
    return {
        "name": target.name,
        "origin": target.origin,
        "architecture": type(target.model).__name__,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "context": target.context,
        "end_tokens": {i: target.tokenizer.decode([i]) for i in target.ends},
        "sampling": target.defaults,
    }


def _drafter(drafter: Drafter) -> dict[str, Any]:
    return {
        "name": drafter.name,
        "path": str(drafter.path) if drafter.path else None,
        "kind": drafter.kind,
        "parameters": drafter.parameters,
        "length": drafter.length,
        "block": drafter.length + 1,
        "taps": list(drafter.taps),
    }
