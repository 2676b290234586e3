"""`ttspec bench replay`: arms over the text of an earlier run."""

from __future__ import annotations

from pathlib import Path

from ttspec.cli.options import ModelFlags
from ttspec.cli.progress import show_progress
from ttspec.cli.terminal import say
from ttspec.errors import OptionError


def replay(
    folder: Path,
    *,
    out: Path,
    arms: str = "static,learn",
    text: str | None = None,
    models: ModelFlags = ModelFlags(),
    rows: int | None = None,
) -> int:
    """Measure what arms accept on the text of an earlier run, which the target reads only once.

    Whatever drafts, the text is the same, so what is accepted is what a live run would accept.
    Nothing is timed. Ctrl-C keeps the finished units, and the same command goes on after them.

    Parameters
    ----------
    folder
        Run folder of `ttspec bench run`; its target is named by --target, as there.
    out
        Run folder: a new one, or one to go on with.
    arms
        As in `ttspec bench run`; not learn[supervision=block], nor other implementations.
    text
        The arm whose text it is: in bfloat16 arms differ. [default: plain, or the first]
    rows
        Requests side by side. As many as the run had: then rounds are its rounds. [default: all,
        of all seeds, or as many as fit into memory]
    """
    if rows is not None and rows < 1:
        raise OptionError(f"--rows is {rows}; allowed is 1 or more.")

    from ttspec.bench.arms import parse_arms
    from ttspec.bench.manifest import mark_sentence
    from ttspec.bench.replay import TimelessStore, check_replayed, open_source, prepare
    from ttspec.bench.runner import find_drafters, measure_all
    from ttspec.bench.store import rows_of

    specs = check_replayed(parse_arms(arms))
    source = open_source(folder, text)
    engine = models.load(notify=say)
    drafters = find_drafters(specs, say)
    # What fits may be another number today: a replay goes on in the rows that it had.
    made = prepare(engine, source, specs, drafters, rows, at_most=rows_of(out))
    say(mark_sentence(made.manifest))
    for note in made.manifest["notes"]:
        say(note)
    store = TimelessStore(out, made.manifest)
    try:
        steps = measure_all(
            engine,
            made.batches,
            made.requests,
            store,
            drafters=drafters,
            warm_up=0,
            notify=say,
            **made.options,
        )
        return show_progress(steps, specs, out)
    finally:
        store.close()
