"""One self-contained HTML page as text (templates/page.html.jinja)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from ttspec.bench.figures import PLOTS
from ttspec.bench.findings import bench_findings, findings, label, table
from ttspec.bench.runs import Arm
from ttspec.bench.style import COLOURS, colours, to_svg
from ttspec.bench.table import Table

DEMO_CAPTION = (
    "Acceptance length is the mean number of tokens that one forward of the target adds to the "
    "text, its own token included: 1.0 means that drafting gained nothing. One session and one "
    "seed: read trends, not wiggles."
)


def render_page(manifest: Mapping[str, Any], arms: Sequence[Arm], svg: str) -> str:
    """The page of a session that some arms answered, as `ttspec demo` shows it."""
    head = ("", *(label(arm.name) for arm in arms))
    numbers = Table(
        title="Figures", head=head, rows=[(name, *cells) for name, cells in table(arms)]
    )
    plot = {"title": PLOTS["acceptance"].title, "caption": DEMO_CAPTION, "svg": svg, "class": ""}
    shown = arms[-1] if arms else Arm(name="")
    same = all(arm.first_difference(shown) is None for arm in arms)
    return _render(
        {"": manifest},
        arms,
        title=manifest.get("title", "ttspec run"),
        lead=findings(arms),
        plots=[plot],
        tables=[numbers],
        session=_session(arms),
        author="All arms wrote this text." if same else f"What the {label(shown.name)} wrote.",
    )


def render_bench(
    manifests: Mapping[str, Mapping[str, Any]],
    arms: Sequence[Arm],
    left_out: Sequence[str],
    tables: Sequence[Table],
    plots: Mapping[str, Figure],
) -> str:
    """The page of a benchmark, of one run folder or several."""
    shown = [
        PLOTS[name]._asdict() | {"svg": to_svg(figure, f"{name}-"), "class": "wide plot"}
        for name, figure in plots.items()
    ]
    return _render(
        manifests,
        arms,
        title=next(iter(manifests.values())).get("title", "ttspec bench"),
        lead=bench_findings(arms, left_out),
        plots=shown,
        tables=tables,
        session=None,
    )


def _render(manifests: Mapping[str, Any], arms: Sequence[Arm], **values: Any) -> str:
    environment = Environment(loader=PackageLoader("ttspec.bench"), autoescape=True)
    environment.filters["flat"] = _flat
    palette = colours([arm.name for arm in arms])
    # The usual arms have a lighter colour in dark mode, through the page's variables.
    dots = [f"var(--{name})" if name in COLOURS else colour for name, colour in palette.items()]
    page = environment.get_template("page.html.jinja")
    return page.render(manifests=manifests, variables=COLOURS, dots=dots, **values) + "\n"


def _session(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Each turn with its answer, and what other arms wrote where it is something else."""
    *others, shown = arms or [Arm(name="")]
    return [
        {
            "user": turn.user,
            "text": turn.result.text,
            "others": [
                (label(arm.name), arm.turns[index].result.text)
                for arm in others
                if index < len(arm.turns)
                and arm.turns[index].result.token_ids != turn.result.token_ids
            ],
        }
        for index, turn in enumerate(shown.turns)
    ]


def _flat(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, list):
        separator = "; " if any(isinstance(entry, dict) for entry in value) else ", "
        return separator.join(map(_flat, value))
    return str(value)
