"""Tables, plots and a page from run folders. Reads stored records only; never runs a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ttspec.bench import figures, measures
from ttspec.bench.arms import PEERS
from ttspec.bench.figures import acceptance_figure, to_svg, write_png
from ttspec.bench.manifest import forced, forced_sentence, mark, mark_sentence
from ttspec.bench.measures import different_texts, matched
from ttspec.bench.page import PLOTS, render_bench, render_page
from ttspec.bench.runs import Arm
from ttspec.bench.store import read_run
from ttspec.bench.tables import all_tables, kind, pairs_of, run_of
from ttspec.errors import DataError


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder, or several, ready to be compared: arms on the units all have finished."""

    manifests: dict[str, dict[str, Any]]
    """By the folder's label."""
    arms: list[Arm]
    left_out: list[str]
    """What is not in the figures, in sentences."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The first folder's, which speaks for all where they must agree; a replay marks all."""
        first, *others = self.manifests.values()
        replay = next((m["replay"] for m in (first, *others) if m.get("replay")), None)
        return {**first, "replay": replay} if replay else first


def open_runs(folders: Sequence[Path], *, different_texts: bool = False) -> Run:
    """Read one run folder, or several of one target and suite, as one run.

    Args:
        folders: With several, an arm's name begins with its folder's.
        different_texts: Go on where arms that must say the same do not.

    Raises:
        DataError: A folder is damaged, holds nothing, or does not fit the others.
    """
    labels = [folder.name for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise DataError("The same run folder was named twice.\nName each once.")
    runs = [(folder, *read_run(folder)) for folder in folders]
    first_folder, first, _ = runs[0]
    for folder, manifest, _ in runs[1:]:
        check_alike(first, manifest, str(first_folder), str(folder))
        for part in ("target", "suite"):
            if mark_of(first, part) != mark_of(manifest, part):
                raise DataError(
                    f"{folder} and {first_folder} have different {part}s, so no pairs.\n"
                    f"Report on runs of one {part} together, the others apart."
                )
    arms = [
        replace(arm, name=f"{label}: {arm.name}") if len(runs) > 1 else arm
        for label, (_, _, found) in zip(labels, runs, strict=True)
        for arm in found
    ]
    pairs = matched(arms)
    if not pairs or not pairs[0].turns:
        names = ", ".join(map(str, folders))
        raise DataError(
            f"{names} has no request that every arm has finished.\n"
            "Go on with `ttspec bench run`; the same command takes it up where it ended."
        )
    if not different_texts:
        check_texts(first, pairs)
    manifests = {label: m for label, (_, m, _) in zip(labels, runs, strict=True)}
    notes = [*_left_out(arms, pairs, list(manifests.values())), *_peers_differ(first, pairs)]
    return Run(manifests, pairs, notes)


def check_alike(a: dict[str, Any], b: dict[str, Any], one: str, other: str) -> None:
    """Forced acceptance is not compared with real acceptance, nor with another schedule.

    Raises:
        DataError: Two manifests differ in it; `one` and `other` are what to call them.
    """
    if a.get("random_weights") != b.get("random_weights"):
        said = [forced_sentence(m) or "It ran on real weights." for m in (a, b)]
        raise DataError(
            f"{one}: {said[0]} {other}: {said[1]}\n"
            "Compare runs of the same shapes and the same --accept, or runs on real weights."
        )


def mark_of(manifest: dict[str, Any], part: str) -> str | None:
    """What tells a target or suite from others: its checksum, or its name where that is all."""
    said = manifest.get(part) or {}
    return said.get("sha256") or said.get("name")


def check_texts(manifest: dict[str, Any], arms: Sequence[Arm]) -> None:
    """Greedy arms of ours in float32 emit the same tokens, or one of them is wrong.

    Raises:
        DataError: They do not.
    """
    if not _same_expected(manifest):
        return  # elsewhere rounding decides close calls; the tables count the differences
    first, *others = [arm for arm in arms if kind(arm) not in PEERS] or arms[:1]
    for arm in others:
        for (request, seed), position in different_texts(arm, first):
            raise DataError(
                f"{arm.name} emitted other greedy tokens than {first.name}: request {request}, "
                f"seed {seed}, from token {position} on.\n`ttspec check` finds out whether it is a "
                "close call; --different-texts reports all the same."
            )


def _same_expected(manifest: dict[str, Any]) -> bool:
    greedy = manifest.get("temperature") == 0 and manifest.get("dtype") == "float32"
    return greedy and not forced(manifest)  # where drafts are kept unseen, texts differ


def _peers_differ(manifest: dict[str, Any], arms: Sequence[Arm]) -> list[str]:
    """Where other implementations emitted other greedy float32 tokens: a finding, no error."""
    first = next((arm for arm in arms if kind(arm) not in PEERS), arms[0])
    notes = []
    for arm in arms if _same_expected(manifest) else ():
        if kind(arm) in PEERS and (found := different_texts(arm, first)):
            (request, seed), position = found[0]
            notes.append(
                f"{arm.name} emitted other greedy tokens than {first.name} in {len(found)} of "
                f"{len(arm.units)} units; the first: request {request}, seed {seed}, from token "
                f"{position} on."
            )
    return notes


def write_report(folder: Path) -> Path:
    """Draw `folder/report/` anew from the rounds stored in `folder`; returns the page's path.

    Raises:
        DataError: The folder is not a run folder.
    """
    manifest, arms = read_run(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    figure = acceptance_figure(arms)
    write_png(figure, out / "acceptance.png")
    page = out / "index.html"
    page.write_text(render_page(manifest, arms, to_svg(figure)), encoding="utf-8")
    return page


def write_bench_report(run: Run, out: Path) -> Path:
    """Draw plots, tables and page of a benchmark into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    plots = {name: draw(run.arms) for name, (draw, _, _) in PLOTS.items()}
    if not any(a.updates and a.seconds for a in run.arms):
        del plots["cost"]
    if not any(any(r.seconds) for a in run.arms for r in a.rounds):  # imported, replayed
        del plots["stages"]
    if not any(a.seconds for a in run.arms):
        del plots["speed"]
    wide = {}
    if any(run_of(arm) for arm in run.arms):  # a panel a folder, for a README
        wide["across"] = figures.position_figure(run.arms, across=True)
    if said := mark(run.manifest):
        for figure in (plots | wide).values():
            figures.stamp(figure, said)
    for name, figure in (plots | wide).items():
        write_png(figure, out / f"{name}.png")
        figures.write_svg(figure, out / f"{name}.svg")
    tables = all_tables(run.arms, run.manifest)
    text = "\n".join(table.markdown() for table in tables)
    (out / "tables.md").write_text(text, encoding="utf-8")
    summary = json.dumps(summarise_run(run), indent=1, ensure_ascii=False)
    (out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    page = out / "index.html"
    text = render_bench(run.manifests, run.arms, run.left_out, tables, plots)
    page.write_text(text, encoding="utf-8")
    return page


def summarise_run(run: Run) -> dict[str, Any]:
    """The figures as plain values, small enough to commit."""
    bins = measures.by_position(run.arms)
    arms = {
        arm.name: {
            "units": len(arm.units),
            "tokens": arm.tokens,
            "acceptance_length": _plain(measures.acceptance(arm)),
            "acceptance_length_over_requests": _plain(measures.acceptance_over_requests(arm)),
            "accepted_share": measures.drafted_share(arm),
            "accepted_at": measures.draft_positions(arm),
            "repeated_8grams": arm.repeated_8grams,
            "tokens_per_second": _plain(measures.speed(arm)),
            "first_token_seconds": measures.first_token(arm),
            "inter_token_seconds": measures.inter_token(arm),
            "seconds_a_token": measures.stage_seconds(arm),
            "learning_share": arm.learning_share,
            "updates": arm.updates,
            "stretches": {s.name: _plain(s.acceptance(arm)) for s in measures.STRETCHES},
            "by_position": [_plain(b) for b in bins[arm.name]],
        }
        for arm in run.arms
    }
    pairs = []
    for a, b in pairs_of(run.arms):
        tau = measures.pair(a, b, measures.emitted, measures.rounds)
        rate = measures.pair(a, b, measures.tokens, measures.seconds)
        found = {"acceptance_length": _plain(tau), "tokens_per_second": _plain(rate)}
        found["stretches"] = {s.name: _plain(s.pair(a, b)) for s in measures.STRETCHES}
        pairs.append({"arm": a.name, "against": b.name, **found})
    return {"runs": run.manifests, "arms": arms, "pairs": pairs}


def _plain(record: Any) -> Any:
    """A record as JSON values; nan is null."""
    return None if record is None else _finite(asdict(record))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if value != value else value


def _left_out(
    arms: Sequence[Arm], kept: Sequence[Arm], manifests: Sequence[dict[str, Any]]
) -> list[str]:
    names = {arm.name for arm in kept}
    notes = [said for m in manifests if (said := mark_sentence(m))]
    notes += [f"{arm.name} has no finished request." for arm in arms if arm.name not in names]
    full = {arm.name: len(arm.units) for arm in arms}
    notes += [
        f"{arm.name} has {full[arm.name] - len(arm.units)} units more than other arms."
        for arm in kept
        if full[arm.name] > len(arm.units)
    ]
    for manifest in manifests:
        for arm, reason in (manifest.get("skipped") or {}).items():
            notes.append(f"{arm} was skipped: {reason}.")
        for arm, errors in (manifest.get("failed") or {}).items():
            notes.append(f"{arm}: {len(errors)} units failed; the first: {errors[0]}")
        notes += manifest.get("notes") or []
    return list(dict.fromkeys(notes))
