"""Reports from run folders: plots, tables, and one HTML page that loads nothing from anywhere.

Reads stored records only; never runs a model. The page is templates/page.html.jinja.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from ttspec.bench import metrics as m
from ttspec.bench.figures import PLOTS, position_figure
from ttspec.bench.manifest import run_label
from ttspec.bench.plot_style import COLOURS, colours, stamp, to_svg, write_figure
from ttspec.bench.report_tables import all_tables, pairs_of
from ttspec.bench.results import Arm
from ttspec.bench.run_set import RunSet
from ttspec.bench.sentences import bench_sentences, demo_sentences, demo_table, label
from ttspec.bench.store import read_run


def write_report(folder: Path) -> Path:
    """Draw `folder/report/` of a session that some arms answered, as `ttspec demo` shows it.

    Returns:
        The page's path.

    Raises:
        DataError: The folder is not a run folder.
    """
    manifest, arms = read_run(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    figure = position_figure(arms)
    write_figure(figure, out / "acceptance", "png")
    plots = _plots({"acceptance": figure})
    plots[0]["caption"] += " One session has no bands: read trends, not wiggles."
    shown = arms[-1] if arms else Arm(name="")
    same = all(arm.first_difference(shown) is None for arm in arms)
    return _write_page(
        out,
        {"": manifest},
        arms,
        title=manifest.get("title", "ttspec run"),
        lead=demo_sentences(arms),
        plots=plots,
        tables=[demo_table(arms)],
        session=_session(arms),
        author="All arms wrote this text." if same else f"What the {label(shown.name)} wrote.",
    )


def write_bench_report(run: RunSet, out: Path) -> Path:
    """Draw plots, tables and page of a benchmark into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    timed = any(arm.seconds for arm in run.arms)
    drawn = {name: plot for name, plot in PLOTS.items() if timed or name != "speed"}
    plots = {name: plot.draw(run.arms) for name, plot in drawn.items()}
    figures = dict(plots)
    if any(arm.folder for arm in run.arms):  # a panel a folder, for a README
        figures["across"] = position_figure(run.arms, across=True)
    for name, figure in figures.items():
        if marked := run_label(run.manifest):
            stamp(figure, marked)
        write_figure(figure, out / name)
    tables = all_tables(run.arms, run.manifest)
    summary = json.dumps(summarise_run(run), indent=1, ensure_ascii=False) + "\n"
    (out / "summary.json").write_text(summary, encoding="utf-8")
    markdown = "\n".join(each.markdown() for each in tables)
    (out / "tables.md").write_text(markdown, encoding="utf-8")
    return _write_page(
        out,
        run.manifests,
        run.arms,
        title=next(iter(run.manifests.values())).get("title", "ttspec bench"),
        lead=bench_sentences(run.arms, run.left_out),
        plots=_plots(plots),
        tables=tables,
        session=None,
    )


def summarise_run(run: RunSet) -> dict[str, Any]:
    """The figures as plain values, small enough to commit."""
    bins = m.position_bins(run.arms)
    arms = {
        arm.name: {
            "units": len(arm.units),
            "tokens": arm.tokens,
            "acceptance_length": json_values(m.acceptance(arm)),
            "acceptance_length_over_requests": json_values(m.acceptance_over_requests(arm)),
            "accepted_share": m.draft_acceptance_rate(arm),
            "accepted_at": m.draft_positions(arm),
            "repeated_8grams": arm.repeated_8grams,
            "tokens_per_second": json_values(m.speed(arm)),
            "first_token_seconds": m.time_to_first_token(arm),
            "inter_token_seconds": m.inter_token_latency(arm),
            "seconds_a_token": m.stage_seconds(arm),
            "learning_share": arm.learning_share,
            "updates": arm.updates,
            "stretches": {s.name: json_values(s.acceptance(arm)) for s in m.STRETCHES},
            "by_position": [json_values(b) for b in bins[arm.name]],
        }
        for arm in run.arms
    }
    pairs = [
        {
            "arm": a.name,
            "against": b.name,
            "acceptance_length": json_values(m.pair_acceptance(a, b)),
            "tokens_per_second": json_values(m.pair_speed(a, b)),
            "stretches": {s.name: json_values(s.pair(a, b)) for s in m.STRETCHES},
        }
        for a, b in pairs_of(run.arms)
    ]
    return {"runs": run.manifests, "arms": arms, "pairs": pairs}


def json_values(value: Any) -> Any:
    """Records of numbers as JSON values; nan is null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: json_values(entry) for key, entry in value.items()}
    return None if value != value else value


def _plots(figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """What the template needs of each plot."""
    return [
        PLOTS[name]._asdict() | {"svg": to_svg(figure, f"{name}-")}
        for name, figure in figures.items()
    ]


def _write_page(
    out: Path, manifests: Mapping[str, Any], arms: Sequence[Arm], **values: Any
) -> Path:
    environment = Environment(loader=PackageLoader("ttspec.bench"), autoescape=True)
    environment.filters["flat"] = _flat
    palette = colours([arm.name for arm in arms])
    # The usual arms have a lighter colour in dark mode, through the page's variables.
    dots = [f"var(--{name})" if name in COLOURS else colour for name, colour in palette.items()]
    template = environment.get_template("page.html.jinja")
    text = template.render(manifests=manifests, variables=COLOURS, dots=dots, **values)
    page = out / "index.html"
    page.write_text(text + "\n", encoding="utf-8")
    return page


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
