"""`ttspec bench`: measure arms on a suite, report on it, compare two of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from ttspec.cli.options import Flag, ModelFlags, Positive, PositiveOrNone
from ttspec.cli.progress import show_progress
from ttspec.cli.terminal import say
from ttspec.config import GenerateConfig
from ttspec.errors import OptionError, require_writable

if TYPE_CHECKING:
    from ttspec.bench.preparation import PreparedRun
    from ttspec.bench.store import Store
    from ttspec.decoding.engine import Engine

bench = App(
    name="bench",
    help="Measure arms on a suite of requests, report, compare.",
    help_format="markdown",
)


@bench.command
def run(
    *,
    out: Path,
    suite: str = "quick",
    requests: PositiveOrNone = None,
    arms: str = "plain,static,learn",
    models: ModelFlags = ModelFlags(),
    rows: Positive = 1,
    max_new_tokens: int = 256,
    session_tokens: PositiveOrNone = None,
    temperature: float = 0.0,
    seeds: str = "0",
    ignore_eos: Flag = False,
) -> int:
    """Measure arms on the same requests and seeds, interleaved in random order.

    One unit is one arm's answer to one request under one seed. Ctrl-C keeps the finished units, and
    the same command goes on after them; more arms or seeds may be named then.

    Parameters
    ----------
    out
        Run folder: a new one, or one to go on with.
    suite
        A built-in suite, or a file of JSON lines: {"prompt"}, {"messages"} or {"turns"}; several
        with commas between them.
    requests
        Only the first so many requests of each suite. [default: all]
    arms
        Of plain, ngram, static, static-window, static-rebased, static-copy, learn, learn-session,
        learn-shared, default, with options in brackets, as in static,default[stride=4,lr=3e-5];
        static[drafter=FOLDER] has a drafter of its own.
    rows
        Requests of one arm side by side. More finish sooner; times are then those of a row among
        others.
    max_new_tokens
        Generated tokens of an answer at most (of a turn, where a request has several).
    session_tokens
        Generated tokens of a request over all its turns at most.
    temperature
        0 is greedy.
    seeds
        Numbers with commas between them; every request is answered once under each.
    ignore_eos
        Go on past end tokens.
    """
    from ttspec.bench.arms import parse_arms
    from ttspec.bench.suites import load_suites

    specs, numbers = parse_arms(arms), _seeds(seeds)
    asked = load_suites(suite, requests)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options |= {"ignore_eos": ignore_eos}
    GenerateConfig(**options, seed=0)  # complains before anything is loaded
    require_writable(out)  # and so does this
    engine = models.load(notify=say)

    from ttspec.bench.preparation import prepare_run
    from ttspec.bench.store import Store

    prepared = prepare_run(
        engine,
        specs,
        asked,
        numbers,
        rows=rows,
        session_tokens=session_tokens,
        notify=say,
        **options,
    )
    return _measured(engine, prepared, Store(out, prepared.manifest))


@bench.command
def replay(
    folder: Path,
    *,
    out: Path,
    arms: str = "static,learn",
    text: str | None = None,
    timed: Flag = False,
    models: ModelFlags = ModelFlags(),
    rows: PositiveOrNone = None,
) -> int:
    """Measure what arms accept on the text of an earlier run, which the target reads only once.

    Whatever drafts, the text is the same, so what is accepted is what a live run would accept.
    Nothing is timed, unless you ask for it. Left out, --dtype is the run's. Ctrl-C keeps the
    finished units, and the same command goes on after them.

    Parameters
    ----------
    folder
        Run folder of `ttspec bench run`; its target is named by --target, as there.
    out
        Run folder: a new one, or one to go on with.
    arms
        As in `ttspec bench run`; untimed not learn[supervision=block].
    text
        The arm whose text it is: in bfloat16 arms differ. [default: plain, or the first]
    timed
        Do all the work of a live run, and time it: in bfloat16 too, speeds of arms are then those
        of one text.
    rows
        Requests side by side. As many as the run had: then rounds are its rounds. [default: all,
        of all seeds, or as many as fit into memory; timed as many as the run had]
    """
    from ttspec.bench.arms import parse_arms
    from ttspec.bench.manifest import run_notice
    from ttspec.bench.preparation import find_drafters
    from ttspec.bench.replay import UntimedStore, open_source, prepare, replayable
    from ttspec.bench.store import Store

    specs = replayable(parse_arms(arms), timed=timed)
    source = open_source(folder, text)
    require_writable(out)  # complains before anything is loaded
    if models.dtype == "auto":  # in another some tokens would be drawn otherwise
        models = replace(models, dtype=source.manifest.get("dtype", "auto"))
    engine = models.load(notify=say)
    drafters = find_drafters(specs, say)
    prepared = prepare(engine, source, specs, drafters, rows, out=out, timed=timed)
    for sentence in (run_notice(prepared.manifest), *prepared.manifest["notes"]):
        say(sentence)
    if timed:
        return _measured(engine, prepared, Store(out, prepared.manifest))
    return _measured(engine, prepared, UntimedStore(out, prepared.manifest), warm_up=0)


def _measured(engine: Engine, prepared: PreparedRun, store: Store, **options: Any) -> int:
    """Measure what the store does not have, and show how far it is; the exit code."""
    from ttspec.bench.runner import measure_all

    try:
        steps = measure_all(engine, prepared, store, notify=say, **options)
        return show_progress(steps, prepared.manifest["arms"], store.folder)
    finally:
        store.close()


@bench.command
def report(*folders: Path, out: Path | None = None, different_texts: Flag = False) -> int:
    """Draw tables, plots and one HTML page from run folders; runs no model.

    Parameters
    ----------
    folders
        Run folders; several, of one target and suite, are reported on together.
    out
        Where to. [default: FOLDER/report, of several the first]
    different_texts
        Report also where greedy arms emitted different tokens.
    """
    if not folders:
        raise OptionError("bench report needs a run folder.\nName one or several.")
    from ttspec.bench.report import write_bench_report
    from ttspec.bench.report_tables import all_tables
    from ttspec.bench.run_set import open_runs
    from ttspec.bench.sentences import bench_sentences
    from ttspec.bench.table import table_console

    found = open_runs(folders, different_texts=different_texts)
    page = write_bench_report(found, out or folders[0] / "report")
    console = table_console()
    for table in all_tables(found.arms, found.manifest):
        table.print(console)
    for sentence in bench_sentences(found.arms, found.left_out):
        console.print(sentence)
    console.print(f"\npage  {page}\ntable {page.parent / 'tables.md'}", soft_wrap=True)
    return 0


@bench.command
def compare(
    a: str,
    b: str,
    *,
    fail_below: float | None = None,
    metric: Literal["acceptance", "speed"] = "acceptance",
    different_texts: Flag = False,
) -> int:
    """Say how A compares with B on the same requests; exit 1 if it falls below a ratio.

    Parameters
    ----------
    a
        Run folder, or FOLDER:ARM.
    b
        The same. Of two folders, every arm that both have is compared.
    fail_below
        Least ratio A / B that passes.
    metric
        What the verdict is about; both are printed.
    different_texts
        Compare also where greedy arms emitted different tokens.
    """
    if fail_below is not None and not 0 <= fail_below < math.inf:
        raise OptionError(
            f"--fail-below is {fail_below}; allowed is a ratio from 0 up, as in 1.02."
        )
    from ttspec.bench import compare as comparison
    from ttspec.bench.table import table_console

    found = comparison.compare(a, b, different_texts=different_texts)
    console = table_console()
    comparison.comparison_table(found, a, b).print(console)
    line, good = comparison.verdict(found, metric, fail_below)
    console.print(line, soft_wrap=True)
    return 0 if good else 1


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise OptionError(
            f"--seeds is {text!r}; allowed are different whole numbers from 0 up, as in 0,1,2."
        )
    return numbers
