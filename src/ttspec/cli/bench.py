"""`ttspec bench`: measure arms on a suite, report on it, compare two of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from ttspec.cli.options import DraftFlags, LearnFlags, ShapeFlags
from ttspec.cli.progress import show_progress
from ttspec.cli.replay import replay
from ttspec.cli.terminal import say, to_json
from ttspec.config import GenerateConfig
from ttspec.errors import OptionError

bench = App(
    name="bench",
    help="Measure arms on a suite of requests, report, compare.",
    help_format="markdown",
)
bench.command(replay)
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]


@bench.command
def run(
    *,
    out: Path,
    suite: str | None = None,
    requests: int | None = None,
    prompt_tokens: int | None = None,
    arms: str = "plain,static,learn",
    models: ShapeFlags = ShapeFlags(),
    rows: int = 1,
    max_new_tokens: int = 256,
    session_tokens: int | None = None,
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
        with commas between them. [default: quick]
    requests
        Only the first so many requests of each suite; with random weights, how many prompts.
        [default: all; 8]
    prompt_tokens
        With random weights: random tokens of each prompt. [default: 256]
    arms
        Of plain, ngram, static, static-window, static-rebased, static-copy, learn, learn-session,
        learn-shared, default, with options in brackets, as in static,default[stride=4,lr=3e-5];
        static[drafter=FOLDER] has a drafter of its own. Other implementations, where they are
        installed: hf, hf-compiled, hf-lookup, hf-assisted[model=FOLDER] and hf-dflash are
        transformers' own `generate`, dflash is the package of that name.
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
    from ttspec.bench.arms import PEERS, check_forced, parse_arms
    from ttspec.bench.suites import load_suites, random_suite

    for name, given in (
        ("requests", requests),
        ("prompt-tokens", prompt_tokens),
        ("rows", rows),
        ("session-tokens", session_tokens),
    ):
        if given is not None and given < 1:
            raise OptionError(f"--{name} is {given}; allowed is 1 or more.")
    specs, numbers = parse_arms(arms), _seeds(seeds)
    is_random = models.random_weights is not None
    if is_random:
        check_forced(specs)
    _check_prompts(suite, prompt_tokens, is_random)
    asked = None if is_random else load_suites(suite or "quick", requests)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    config = GenerateConfig(**options, seed=0)
    engine = models.load(notify=say)

    from ttspec.bench.manifest import describe, describe_drafter, forced, forced_sentence
    from ttspec.bench.peers import open_peers
    from ttspec.bench.runner import engines_for, find_drafters, measure_all, plan, require_rows
    from ttspec.bench.store import Store
    from ttspec.decoding.penalties import sampling_of

    if asked is None:
        vocabulary = int(engine.target.config.vocab_size)
        asked = random_suite(requests or 8, prompt_tokens or 256, vocabulary)
    drafters = find_drafters(specs, say)
    sampling = sampling_of(config, engine.target)
    engines = engines_for(engine, specs, drafters)  # complains before the folder is made
    ours = [spec for spec in specs if spec.kind not in PEERS]
    at_once = min(rows, len(asked.requests))
    memory = {"ignore_eos": ignore_eos, **options}
    for notice in require_rows(engines, ours, asked.requests, at_once, **memory):
        say(notice)
    peers, skipped = open_peers(
        engines,
        specs,
        asked.requests,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        ignore_eos=ignore_eos,
        rows=rows,
    )
    for name, reason in skipped.items():
        say(f"{name} is skipped: {reason}.")
    specs = [spec for spec in specs if spec.name not in skipped]
    if not specs:
        raise OptionError("No arm of --arms can run here.\nName one of ours, such as plain.")
    mark = forced({"random_weights": engine.random_weights})
    title = f"ttspec bench: {asked.name}" + (f" ({mark})" if mark else "")
    manifest = describe(engine, title=title) | {
        "suite": {
            "name": asked.name,
            "requests": len(asked.requests),
            "parts": asked.parts,
            "sha256": asked.sha256,
        },
        "drafters": {name: describe_drafter(d) for name, d in drafters.items()},
        **options,
        "rows": rows,
        "sampling": {k: v for k, v in asdict(sampling).items() if k != "seed"},
        "session_tokens": session_tokens,
        "ignore_eos": ignore_eos,
        "arms": [spec.name for spec in specs],
        "arm_options": {
            spec.name: spec.options()
            | (peers[spec.name].loop.provenance if spec.name in peers else {})
            for spec in specs
        },
        "skipped": skipped or None,
        "seeds": numbers,
    }
    store = Store(out, manifest)
    try:
        batches = plan(specs, len(asked.requests), numbers, order=numbers[0], rows=rows)
        steps = measure_all(
            engine,
            batches,
            asked.requests,
            store,
            drafters=drafters,
            peers=peers,
            quota=session_tokens,
            notify=say,
            ignore_eos=ignore_eos,
            **options,
        )
        code = show_progress(steps, specs, out)
        if mark:
            say(forced_sentence(manifest))
        return code
    finally:
        store.close()


@bench.command(name="import")
def import_(file: Path, *, out: Path, arm: str = "vllm") -> int:
    """Make a run folder from vLLM's figures of each request; `report` and `compare` then read it.

    Parameters
    ----------
    file
        JSON lines: responses of a vLLM server that runs with --per-request-spec-decode-metrics
        detailed, asked with return_token_ids; or what scripts/record_vllm.py writes.
    out
        Run folder, new or empty.
    arm
        What reports call it.
    """
    from ttspec.bench.importing import import_run
    from ttspec.bench.measures import acceptance
    from ttspec.bench.runs import Arm
    from ttspec.bench.table import interval

    found = import_run(file, out, arm)
    made = Arm(name=arm, turns=found.turns)
    say(
        f"{len(made.turns)} requests, {len(made.rounds):,} rounds, {made.tokens:,} tokens, "
        f"acceptance length {interval(acceptance(made), 3)}."
    )
    for sentence in found.left_out:
        say(f"Left out: {sentence}")
    for sentence in found.notes:
        say(sentence)
    say(f"Next: ttspec bench report {out}")
    return 0


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
    from ttspec.bench.findings import bench_findings
    from ttspec.bench.report import write_bench_report
    from ttspec.bench.run_set import open_runs
    from ttspec.bench.table import table_console
    from ttspec.bench.tables import all_tables

    found = open_runs(folders, different_texts=different_texts)
    page = write_bench_report(found, out or folders[0] / "report")
    console = table_console()
    for table in all_tables(found.arms, found.manifest):
        table.print(console)
    for sentence in bench_findings(found.arms, found.left_out):
        console.print(sentence, markup=False)
    console.print(
        f"\npage  {page}\ntable {page.parent / 'tables.md'}", soft_wrap=True, markup=False
    )
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
    from ttspec.bench import compare as judge
    from ttspec.bench.table import table_console

    found = judge.compare(a, b, different_texts=different_texts)
    console = table_console()
    judge.comparison_table(found, a, b).print(console)
    line, good = judge.verdict(found, metric, fail_below)
    console.print(line, markup=False, soft_wrap=True)
    return 0 if good else 1


@bench.command
def roofline(
    *,
    models: ShapeFlags = ShapeFlags(),
    rows: int = 1,
    context: int = 512,
    rounds: int = 20,
    temperature: float = 0.0,
    draft: DraftFlags = DraftFlags(),
    learn: Annotated[bool, Parameter(name="--learn")] = True,
    learning: Annotated[LearnFlags, Parameter(name="--learn")] = LearnFlags(),
    as_json: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
) -> int:
    """Say what each stage of a round must move and compute, how long that would take, and did.

    Parameters
    ----------
    rows
        Rows side by side.
    context
        Tokens in every row's cache when the rounds begin.
    rounds
        Rounds to measure at least; with learning, as many as hold five updates.
    temperature
        0 is greedy.
    learn
        Whether the drafter learns.
    as_json
        Print one JSON object, in bytes, operations and seconds.
    """
    for name, given in (("rows", rows), ("context", context), ("rounds", rounds)):
        if given < 1:
            raise OptionError(f"--{name} is {given}; allowed is 1 or more.")
    options: dict[str, Any] = {"draft": draft.config(), "learn": learning.config_if(learn)}
    engine = models.load(notify=say)

    from ttspec.bench.stages import measure
    from ttspec.bench.table import table_console

    options |= {"rows": rows, "context": context, "rounds": rounds, "temperature": temperature}
    found = measure(engine, **options)
    if as_json:
        print(to_json(found.to_dict()))
    else:
        found.table().print(table_console())
    return 0


def _check_prompts(suite: str | None, prompt_tokens: int | None, is_random: bool) -> None:
    if is_random and suite is not None:
        raise OptionError(
            "--random-weights was given together with --suite: without a checkpoint there is no "
            "tokenizer.\nPrompts are random tokens: --requests says how many, --prompt-tokens how "
            "long."
        )
    if prompt_tokens is not None and not is_random:
        raise OptionError(
            "--prompt-tokens was given without --random-weights.\nName prompts with --suite."
        )


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
