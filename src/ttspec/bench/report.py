"""Tables, plots and a page from run folders. Reads stored records only; never runs a model."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ttspec.bench import measures as m
from ttspec.bench.figures import PLOTS, acceptance_figure, position_figure
from ttspec.bench.manifest import mark
from ttspec.bench.page import render_bench, render_page
from ttspec.bench.run_set import RunSet
from ttspec.bench.store import read_run
from ttspec.bench.style import stamp, to_svg, write_figure
from ttspec.bench.tables import all_tables, pairs_of, run_of


def write_report(folder: Path) -> Path:
    """Draw `folder/report/` anew from the rounds stored in `folder`; returns the page's path.

    Raises:
        DataError: The folder is not a run folder.
    """
    manifest, arms = read_run(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    figure = acceptance_figure(arms)
    write_figure(figure, out / "acceptance", "png")
    page = out / "index.html"
    page.write_text(render_page(manifest, arms, to_svg(figure)), encoding="utf-8")
    return page


def write_bench_report(run: RunSet, out: Path) -> Path:
    """Draw plots, tables and page of a benchmark into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    timed = any(arm.seconds for arm in run.arms)
    wanted = {
        "cost": timed and any(arm.updates for arm in run.arms),
        "stages": any(any(r.seconds) for arm in run.arms for r in arm.rounds),
        "speed": timed,  # not of what was imported without times, or replayed
    }
    plots = {name: plot.draw(run.arms) for name, plot in PLOTS.items() if wanted.get(name, True)}
    figures = dict(plots)
    if any(run_of(arm) for arm in run.arms):  # a panel a folder, for a README
        figures["across"] = position_figure(run.arms, across=True)
    for name, figure in figures.items():
        if marked := mark(run.manifest):
            stamp(figure, marked)
        write_figure(figure, out / name)
    tables = all_tables(run.arms, run.manifest)
    page = out / "index.html"
    summary = json.dumps(summarise_run(run), indent=1, ensure_ascii=False) + "\n"
    for path, text in {
        out / "tables.md": "\n".join(table.markdown() for table in tables),
        out / "summary.json": summary,
        page: render_bench(run.manifests, run.arms, run.left_out, tables, plots),
    }.items():
        path.write_text(text, encoding="utf-8")
    return page


def summarise_run(run: RunSet) -> dict[str, Any]:
    """The figures as plain values, small enough to commit."""
    bins = m.by_position(run.arms)
    arms = {
        arm.name: {
            "units": len(arm.units),
            "tokens": arm.tokens,
            "acceptance_length": plain(m.acceptance(arm)),
            "acceptance_length_over_requests": plain(m.acceptance_over_requests(arm)),
            "accepted_share": m.drafted_share(arm),
            "accepted_at": m.draft_positions(arm),
            "repeated_8grams": arm.repeated_8grams,
            "tokens_per_second": plain(m.speed(arm)),
            "first_token_seconds": m.first_token(arm),
            "inter_token_seconds": m.inter_token(arm),
            "seconds_a_token": m.stage_seconds(arm),
            "learning_share": arm.learning_share,
            "updates": arm.updates,
            "stretches": {s.name: plain(s.acceptance(arm)) for s in m.STRETCHES},
            "by_position": [plain(b) for b in bins[arm.name]],
        }
        for arm in run.arms
    }
    pairs = [
        {
            "arm": a.name,
            "against": b.name,
            "acceptance_length": plain(m.pair_acceptance(a, b)),
            "tokens_per_second": plain(m.pair_speed(a, b)),
            "stretches": {s.name: plain(s.pair(a, b)) for s in m.STRETCHES},
        }
        for a, b in pairs_of(run.arms)
    ]
    return {"runs": run.manifests, "arms": arms, "pairs": pairs}


def plain(value: Any) -> Any:
    """Records of numbers as JSON values; nan is null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return None if value != value else value
