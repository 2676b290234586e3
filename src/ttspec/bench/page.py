"""One self-contained HTML page as text. It loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ttspec.bench import figures
from ttspec.bench.figures import COLOURS, colours, label, to_svg
from ttspec.bench.findings import bench_findings, findings, table
from ttspec.bench.runs import Arm
from ttspec.bench.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def render_bench(
    manifests: dict[str, dict[str, Any]],
    arms: Sequence[Arm],
    left_out: Sequence[str],
    tables: Sequence[Table],
    plots: dict[str, Figure],
) -> str:
    """The page of a benchmark as text."""
    parts = []
    for name, figure in plots.items():
        _, title, caption = PLOTS[name]
        svg = to_svg(figure, f"{name}-")
        parts.append(
            f'<h2>{escape(title)}</h2><figure><div class="wide plot">{svg}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    for shown in tables:
        parts.append(f"<h2>{escape(shown.title)}</h2>{_grid(shown)}")
        parts.append(f'<p class="note">{escape(shown.note)}</p>')
    parts.append("<h2>How it was made</h2>")
    for name, manifest in manifests.items():
        parts.append(f"<h3>{escape(name)}</h3>" if len(manifests) > 1 else "")
        parts.append(_provenance(manifest))
    title = str(next(iter(manifests.values())).get("title", "ttspec bench"))
    return _page(title, bench_findings(arms, left_out), arms, "\n".join(parts))


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
    "cost": (
        figures.cost_figure,
        "What learning costs",
        "Learning against static, on the same requests: rounds saved, what that is worth, and what "
        "is left once the updates are paid for. Lines are 95 % intervals over requests.",
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
