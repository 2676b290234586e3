"""Tables, plots and one self-contained HTML page from run folders.

Reads stored rounds and texts only; never runs a model. The page loads nothing from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttspec.bench import figures, measures
from ttspec.bench.figures import COLOURS, acceptance_figure, colours, label, to_svg, write_png
from ttspec.bench.measures import different_texts, matched
from ttspec.bench.runs import Arm
from ttspec.bench.store import model_mark, read_run
from ttspec.bench.tables import Table, all_tables, kind, pairs_of
from ttspec.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY, LATE = 512, 1024
"""Positions before which learning has had little time, and after which it should show."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder, or several, ready to be compared: arms on the units all have finished."""

    manifest: dict[str, Any]
    arms: list[Arm]
    left_out: list[str]
    """What is not in the figures, in sentences."""


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
        for part in ("target", "suite"):
            a, b = ((x.get(part) or {}).get("sha256") for x in (first, manifest))
            if a != b:
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
    return Run(first, pairs, _left_out(arms, pairs, [m for _, m, _ in runs]))


def check_texts(manifest: dict[str, Any], arms: Sequence[Arm]) -> None:
    """Greedy arms in float32 emit the same tokens, or one of them is wrong.

    Raises:
        DataError: They do not.
    """
    if manifest.get("temperature") != 0 or manifest.get("dtype") != "float32":
        return  # elsewhere rounding decides close calls; the tables count the differences
    for arm in arms[1:]:
        for (request, seed), position in different_texts(arm, arms[0]):
            raise DataError(
                f"{arm.name} emitted other greedy tokens than {arms[0].name}: request {request}, "
                f"seed {seed}, from token {position} on.\n`ttspec check` finds out whether it is a "
                "close call; --different-texts reports all the same."
            )


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
    for name, figure in plots.items():
        write_png(figure, out / f"{name}.png")
        figures.write_svg(figure, out / f"{name}.svg")
    tables = all_tables(run.arms)
    text = "\n".join(table.markdown() for table in tables)
    (out / "tables.md").write_text(text, encoding="utf-8")
    summary = json.dumps(summarise_run(run), indent=1, ensure_ascii=False)
    (out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    page = out / "index.html"
    page.write_text(render_bench(run, tables, plots), encoding="utf-8")
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
            "by_position": [_plain(b) for b in bins[arm.name]],
        }
        for arm in run.arms
    }
    pairs = []
    for a, b in pairs_of(run.arms):
        tau = measures.pair(a, b, measures.emitted, measures.rounds)
        rate = measures.pair(a, b, measures.tokens, measures.seconds)
        found = {"acceptance_length": _plain(tau), "tokens_per_second": _plain(rate)}
        pairs.append({"arm": a.name, "against": b.name, **found})
    models = model_mark(run.manifest)
    return {"models": models, "manifest": run.manifest, "arms": arms, "pairs": pairs}


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
    notes = [f"{arm.name} has no finished request." for arm in arms if arm.name not in names]
    full = {arm.name: len(arm.units) for arm in arms}
    notes += [
        f"{arm.name} has {full[arm.name] - len(arm.units)} units more than other arms."
        for arm in kept
        if full[arm.name] > len(arm.units)
    ]
    for manifest in manifests:
        for arm, errors in (manifest.get("failed") or {}).items():
            notes.append(f"{arm}: {len(errors)} units failed; the first: {errors[0]}")
    return notes


def table(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """What was measured: a row is a quantity and its value in each arm."""
    plain = next((arm for arm in arms if arm.name == "plain"), None)

    def row(title: str, value: Any) -> tuple[str, list[str]]:
        return title, [value(arm) for arm in arms]

    rows = [
        row("tokens generated", lambda arm: f"{arm.tokens:,}"),
        row("tokens per second", lambda arm: f"{arm.tokens_per_second:.1f}"),
        row("acceptance length", lambda arm: _number(arm.acceptance())),
        row(f"  first {EARLY} tokens", lambda arm: _number(arm.acceptance(0, EARLY))),
        row(f"  after {LATE:,} tokens", lambda arm: _number(arm.acceptance(LATE))),
        row("updates", lambda arm: f"{arm.updates:,}"),
        row("share of time learning", _learning),
        row("repeated 8-grams", lambda arm: f"{arm.repeated_8grams:.1%}"),
    ]
    if plain is not None and plain.tokens_per_second > 0:
        base = plain.tokens_per_second
        speed = row("speed against plain", lambda arm: f"{arm.tokens_per_second / base:.2f}x")
        rows.insert(2, speed)
        rows.append(row("text", lambda arm: _sameness(arm, plain)))
    return rows


def findings(arms: Sequence[Arm]) -> list[str]:
    """The comparison between learning and static in sentences, whichever way it went."""
    by_name = {arm.name: arm for arm in arms}
    static, learning = by_name.get("static"), by_name.get("learn-session")
    if static is None or learning is None:
        return []
    sentences = []
    for low, high, where in ((LATE, 1 << 62, f"After token {LATE:,}"), (0, EARLY, None)):
        before, after = static.acceptance(low, high), learning.acceptance(low, high)
        if before and after:
            sentences.append(
                f"{where or f'In the first {EARLY} tokens'} a target forward yields {after:.2f} "
                f"tokens with the learning drafter and {before:.2f} with the static one: "
                f"{after / before:.2f} times as many."
            )
    if static.tokens_per_second > 0:
        ratio = learning.tokens_per_second / static.tokens_per_second
        sentences.append(
            f"Learning ran at {ratio:.2f} times the static drafter's speed, its updates included."
        )
    return sentences


def render_page(manifest: dict[str, Any], arms: Sequence[Arm], svg: str) -> str:
    """The whole page as text."""
    title = str(manifest.get("title", "ttspec run"))
    return _page(
        title,
        findings(arms),
        arms,
        f"""<h2>Acceptance length while the text grows</h2>
<figure>{svg}
<figcaption>Acceptance length is the mean number of tokens that one forward of the target adds to
the text, its own token included: 1.0 means that drafting gained nothing. One session and one seed:
read trends, not wiggles.</figcaption></figure>
<h2>Figures</h2>
{_html_table(arms)}
<h2>The session</h2>
{_session(arms)}
<h2>How it was made</h2>
{_provenance(manifest)}""",
    )


def render_bench(run: Run, tables: Sequence[Table], plots: dict[str, Figure]) -> str:
    """The page of a benchmark as text."""
    parts = []
    for name, (_, title, caption) in PLOTS.items():
        svg = to_svg(plots[name], f"{name}-")
        parts.append(
            f'<h2>{escape(title)}</h2><figure><div class="wide plot">{svg}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    for table in tables:
        parts.append(f"<h2>{escape(table.title)}</h2>{_grid(table)}")
        parts.append(f'<p class="note">{escape(table.note)}</p>')
    parts.append(f"<h2>How it was made</h2>{_provenance(run.manifest)}")
    title = str(run.manifest.get("title", "ttspec bench"))
    return _page(title, bench_findings(run), run.arms, "\n".join(parts))


def bench_findings(run: Run) -> list[str]:
    """What was compared and what came of it, in sentences, whichever way it went."""
    arms = run.arms
    sentences = [
        f"{len(arms)} arms on {len(arms[0].units)} units (request and seed), "
        f"{sum(arm.tokens for arm in arms):,} generated tokens.",
        *run.left_out,
    ]
    for a, b in pairs_of(arms):
        if not kind(a).startswith("learn") or kind(b) == "plain":
            continue
        tau = measures.pair(a, b, measures.emitted, measures.rounds)
        rate = measures.pair(a, b, measures.tokens, measures.seconds)
        if tau and rate:
            sentences.append(
                f"{a.name} against {b.name}: acceptance length {_times(tau.ratio)}, "
                f"speed {_times(rate.ratio)}."
            )
    return sentences


def _times(ratio: measures.Estimate) -> str:
    if ratio.low != ratio.low:  # nan: one request
        return f"{ratio.value:.3f} times"
    known = "" if not ratio.low <= 1 <= ratio.high else ", not told apart from 1"
    return f"{ratio.value:.3f} times [{ratio.low:.3f}, {ratio.high:.3f}]{known}"


def _page(title: str, lead: Sequence[str], arms: Sequence[Arm], body: str) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in lead)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_css(arms)}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<div class="lead">{sentences}</div>
{body}
</main>
</body>
</html>
"""


def _grid(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in table.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _learning(arm: Arm) -> str:
    return f"{arm.learning_share:.1%}" if arm.updates else "–"


def _sameness(arm: Arm, plain: Arm) -> str:
    if arm is plain:
        return "–"
    position = arm.first_difference(plain)
    return "as plain" if position is None else f"differs at {position:,}"


def _html_table(arms: Sequence[Arm]) -> str:
    heads = "".join(
        f'<th scope="col"><span class="dot arm-{i}"></span>{escape(label(arm.name))}</th>'
        for i, arm in enumerate(arms)
    )
    body = "".join(
        f'<tr><th scope="row"{" class=sub" if title.startswith(" ") else ""}>'
        f"{escape(title.strip())}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for title, cells in table(arms)
    )
    return (
        f'<div class="wide"><table><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _session(arms: Sequence[Arm]) -> str:
    """Each turn with its answer; arms that wrote something else follow, folded."""
    if not arms:
        return ""
    parts = []
    shown = arms[-1]
    for index, turn in enumerate(shown.turns):
        parts.append(f'<section><p class="user">{escape(turn.user)}</p>')
        parts.append(f'<div class="answer">{escape(turn.result.text)}</div>')
        for arm in arms[:-1]:
            other = arm.turns[index].result if index < len(arm.turns) else None
            if other is not None and other.token_ids != turn.result.token_ids:
                parts.append(
                    f"<details><summary>{escape(label(arm.name))} wrote another text</summary>"
                    f'<div class="answer">{escape(other.text)}</div></details>'
                )
        parts.append("</section>")
    same = all(arm.first_difference(shown) is None for arm in arms)
    author = "All arms wrote this text." if same else f"What the {label(shown.name)} wrote."
    return f"<p>{escape(author)}</p>" + "".join(parts)


def _provenance(manifest: dict[str, Any]) -> str:
    """The manifest as a list of names and values."""
    items = [
        f"<dt>{escape(name)}</dt><dd>{escape(_flat(value))}</dd>"
        for name, value in manifest.items()
        if name != "title" and value is not None
    ]
    return f"<dl>{''.join(items)}</dl>"


def _flat(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, list):
        separator = "; " if any(isinstance(entry, dict) for entry in value) else ", "
        return separator.join(map(_flat, value))
    return str(value)


def _css(arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    palette = colours(names)
    dots = "".join(
        f".arm-{i}{{background:{f'var(--{name})' if name in COLOURS else palette[name]}}}"
        for i, name in enumerate(names)
    )
    light = "".join(f"--{name}:{colour};" for name, colour in COLOURS.items())
    return f":root{{{light}}}{_CSS}{dots}"


PLOTS: dict[str, tuple[Any, str, str]] = {
    "acceptance": (
        figures.position_figure,
        "Acceptance length while the text grows",
        "Tokens that one forward of the target adds to the text, its own included: 1.0 means that "
        "drafting gained nothing. Bands are 95 % bootstrap intervals over requests. Only long "
        "answers reach the right end; the tables below say how many.",
    ),
    "drafts": (
        figures.draft_figure,
        "Acceptance by drafted token",
        "Of the rounds that drafted at least so many tokens, the share that accepted all up to it.",
    ),
    "speed": (
        figures.speed_figure,
        "Speed",
        "Wall clock, all of it. Bars are ratios of sums, whiskers 95 % intervals over requests.",
    ),
    "stages": (
        figures.stage_figure,
        "Where the time goes",
        "Wall clock a generated token; other is prefill, text and bookkeeping.",
    ),
}
"""Of a benchmark: how it is drawn, its heading, its caption."""

_CSS = """
:root{--ink:#24292f;--soft:#57606a;--line:#d9dde2;--page:#ffffff;--card:#f5f7f9}
@media (prefers-color-scheme: dark){:root{--ink:#e3e7eb;--soft:#9aa4ae;--line:#3a424b;
--page:#15191e;--card:#1e242b;--plain:#9aa0a6;--static:#f08a4b;--learn-session:#5cb3f0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:54rem;margin:0 auto;padding:2.5rem 1.25rem 5rem}
h1{font-size:1.8rem;line-height:1.25;margin:0 0 1rem}
h2{font-size:1.15rem;margin:2.75rem 0 .75rem}
.lead p{margin:.25rem 0}
figure{margin:0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:inherit}
figcaption{color:var(--soft);font-size:.875rem;margin-top:.5rem;max-width:44rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.4rem .9rem .4rem 0;border-bottom:1px solid var(--line);text-align:right;
white-space:nowrap}
th[scope=row]{text-align:left;font-weight:400;color:var(--soft);white-space:normal;
overflow-wrap:anywhere;min-width:6.5rem}
th[scope=col]{text-align:right;vertical-align:bottom;white-space:normal;font-weight:600}
th[scope=col]:first-child{text-align:left}
.plot svg{max-width:36rem}
.note{color:var(--soft);font-size:.875rem;margin:.5rem 0 0;max-width:44rem}
th.sub{padding-left:1.25rem}
.dot{display:inline-block;width:.65rem;height:.65rem;border-radius:50%;margin-right:.45rem}
section{margin:1.25rem 0}
.user{margin:0 0 .5rem;font-weight:600}
.answer{background:var(--card);border-radius:.5rem;padding:.8rem 1rem;white-space:pre-wrap;
overflow-wrap:anywhere}
details{margin-top:.5rem;color:var(--soft)}
summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.25rem;font-size:.9rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
"""
