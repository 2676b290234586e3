"""One self-contained HTML page, and a table for the terminal, from a run folder.

Reads stored rounds and texts only; never runs a model. The page loads nothing from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ttspec.bench.figures import COLOURS, acceptance_figure, colours, label, to_svg, write_png
from ttspec.bench.runs import Arm, read_run

EARLY, LATE = 512, 1024
"""Positions before which learning has had little time, and after which it should show."""


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
    lead = "".join(f"<p>{escape(sentence)}</p>" for sentence in findings(arms))
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
<div class="lead">{lead}</div>
<h2>Acceptance length while the text grows</h2>
<figure>{svg}
<figcaption>Acceptance length is the mean number of tokens that one forward of the target adds to
the text, its own token included: 1.0 means that drafting gained nothing. One session and one seed:
read trends, not wiggles.</figcaption></figure>
<h2>Figures</h2>
{_html_table(arms)}
<h2>The session</h2>
{_session(arms)}
<h2>How it was made</h2>
{_provenance(manifest)}
</main>
</body>
</html>
"""


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
    items = []
    for name, value in manifest.items():
        if name == "title" or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        items.append(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _css(arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    palette = colours(names)
    dots = "".join(
        f".arm-{i}{{background:{f'var(--{name})' if name in COLOURS else palette[name]}}}"
        for i, name in enumerate(names)
    )
    light = "".join(f"--{name}:{colour};" for name, colour in COLOURS.items())
    return f":root{{{light}}}{_CSS}{dots}"


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
th[scope=row]{text-align:left;font-weight:400;color:var(--soft)}
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
