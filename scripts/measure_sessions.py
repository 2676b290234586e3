"""Acceptance over long sessions: learning against the static drafter and its two cures.

`run` decodes every session under each arm, with the same seeds, and keeps each round; it wants a
GPU. An interrupt ends an arm early and keeps what there is. `ngram` copies along the text of an arm
that was run: the text is the same for every drafter, so it takes no model. `report` draws table and
plot of one drafter's folder, `compare` of several; they run nothing and compare arms of a folder
over the tokens that all of them reached. Sessions come from `scripts/make_prompts.py`.
"""

import argparse
import gzip
import hashlib
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

WINDOW = 512
LOOPED = 0.10
"""Windows of text that repeat more of their 8-grams than this are left out of the second count."""
RESAMPLES = 2000
COLOURS = ("#666666", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
ARMS = ("plain", "static", "static-window", "static-rebased", "learn", "learn-window")


def options(arm: str, window: int, rebase: int, learn: dict) -> dict:
    """`Engine.run` options of an arm."""
    from ttspec import DraftConfig, LearnConfig

    made: dict = {"learn": None}
    if arm == "plain":
        made["draft"] = DraftConfig(length=0)
    if arm.endswith("-window"):
        made["draft"] = DraftConfig(window=window)
    if arm.endswith("-rebased"):
        made["draft"] = DraftConfig(rebase=rebase)
    if arm.startswith("learn"):
        made["learn"] = LearnConfig(scope="session").with_options(**learn)
    return made


def run(a: argparse.Namespace) -> None:
    """Decode the sessions under each arm; one gzipped file of JSON lines per arm."""
    import torch

    import ttspec

    sessions = [json.loads(line) for line in a.suite.read_text().split("\n") if line]
    numbers = range(0, len(sessions), a.every)[: a.sessions]
    sessions = [sessions[n] for n in numbers]
    engine = ttspec.load(a.target, a.drafter, dtype=a.dtype, device=a.device)
    drafter = engine.drafter
    digest = hashlib.sha256()
    for path in sorted(drafter.path.glob("*.safetensors")) if drafter.path else ():
        digest.update(path.read_bytes())
    a.out.mkdir(parents=True, exist_ok=True)
    for arm in a.arms.split(","):
        path = a.out / f"{arm}.jsonl.gz"
        chosen = options(arm, a.window, a.rebase, json.loads(a.learn))
        rows: list[dict] = [{"ids": [], "rounds": [], "prompt_tokens": 0} for _ in sessions]
        began = time.perf_counter()
        for n, chunk in engine.run(
            [s["turns"] for s in sessions],
            stream=False,
            quota=a.tokens,
            max_new_tokens=a.turn_tokens,
            temperature=a.temperature,
            seed=a.seed,
            **chosen,
        ):
            if result := chunk.result:
                rows[n]["ids"] += result.token_ids
                rows[n]["prompt_tokens"] += result.stats.prompt_tokens
                rows[n]["rounds"] += [
                    (r.position, r.proposed, r.accepted, r.emitted) for r in result.rounds
                ]
        facts = {
            "arm": arm,
            "drafter": drafter.name,
            "options": str(chosen),
            "seconds": round(time.perf_counter() - began, 1),
            "seed": a.seed,
            "temperature": a.temperature,
            "dtype": a.dtype,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "drafter_sha256": digest.hexdigest(),
            "suite_sha256": hashlib.sha256(a.suite.read_bytes()).hexdigest(),
            "argv": sys.argv[1:],
            "commit": commit(),
        }
        with gzip.open(path, "wt") as file:
            file.write(json.dumps(facts) + "\n")
            for n, session, row in zip(numbers, sessions, rows, strict=True):
                file.write(json.dumps({"n": n, "kind": session["kind"], **row}) + "\n")
        every = [r for row in rows for r in row["rounds"]]
        print(
            arm,
            f"{facts['seconds']} s, tau {sum(r[3] for r in every) / len(every):.3f},",
            f"shortest {min(len(row['ids']) for row in rows)} tokens",
            flush=True,
        )


def commit() -> str | None:
    """Git revision of the working tree, where there is one."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None


def read(folder: Path) -> dict[str, dict]:
    """Arms of a folder: facts and sessions."""
    arms = {}
    for arm in ARMS:
        path = folder / f"{arm}.jsonl.gz"
        if path.exists():
            with gzip.open(path, "rt") as file:
                facts, *rows = [json.loads(line) for line in file]
            arms[arm] = {"facts": facts, "sessions": rows}
    common = set.intersection(*({s["n"] for s in made["sessions"]} for made in arms.values()))
    for made in arms.values():
        made["sessions"] = [s for s in made["sessions"] if s["n"] in common]
    for together in zip(*(made["sessions"] for made in arms.values()), strict=True):
        reached = min(len(session["ids"]) for session in together)
        for session in together:
            session["ids"] = session["ids"][:reached]
            session["rounds"] = [r for r in session["rounds"] if r[0] + r[3] <= reached]
    return arms


def ngram(a: argparse.Namespace) -> None:
    """Copy along the text of `a.arm` in `a.folder`; write it as an arm of its own folder."""
    import torch

    from ttspec import DraftConfig, load
    from ttspec.decoding.text import next_turn_ids, prompt_ids
    from ttspec.drafters.ngram import Ngram

    tokenizer = load(a.target, None).tokenizer
    asked = [json.loads(line)["turns"] for line in a.suite.read_text().split("\n") if line]
    with gzip.open(a.folder / f"{a.arm}.jsonl.gz", "rt") as file:
        facts, *sessions = [json.loads(line) for line in file]
    drafter, zero = Ngram(), torch.zeros(1, dtype=torch.long)
    for turns, session in zip(asked, sessions, strict=False):
        answers, left = [], session["ids"]
        while left:
            most = min(a.turn_tokens, len(left))
            ends = [i + 1 for i, t in enumerate(left[:most]) if t == tokenizer.eos_token_id]
            answers.append(left[: (ends or [most])[0]])
            left = left[len(answers[-1]) :]
        state, text, done = drafter.start(1, 16384, DraftConfig()), [], 0
        session["rounds"] = []

        def read(ids: list[int], state=state, text=text) -> None:
            drafter.extend(state, torch.tensor([ids]), zero, torch.tensor([len(text)]))
            text += ids

        for turn, answer in zip(turns, answers, strict=False):
            pending = answers[0][0] if not text else text.pop()
            read(next_turn_ids(tokenizer, turn, pending) if text else prompt_ids(tokenizer, turn))
            at = 1  # the first token of an answer is the prefill's
            while at < len(answer):
                start, count = len(text), torch.tensor([drafter.length])
                proposal = drafter.propose(
                    state,
                    torch.tensor([answer[at - 1]]),
                    torch.tensor([start]),
                    count,
                    drafter.length,
                    start,
                    lambda *_: (zero, None),
                )
                drafts = proposal.tokens[0, : int(proposal.count)].tolist()
                accepted = 0
                while (
                    answer[at + accepted : at + accepted + 1]
                    == drafts[accepted : accepted + 1]
                    != []
                ):
                    accepted += 1
                emitted = min(accepted + 1, len(answer) - at)
                session["rounds"].append((done + at, len(drafts), accepted, emitted))
                read(answer[at - 1 : at - 1 + emitted])
                at += emitted
            text.append(answer[-1])
            done += len(answer)
    facts = {**facts, "arm": "static", "drafter": "ngram", "options": f"the text of {a.folder}"}
    a.out.mkdir(parents=True, exist_ok=True)
    with gzip.open(a.out / "static.jsonl.gz", "wt") as file:
        for line in (facts, *sessions):
            file.write(json.dumps(line) + "\n")
    rounds = [r for s in sessions for r in s["rounds"]]
    print(f"ngram tau {sum(r[3] for r in rounds) / len(rounds):.3f}")


def windows(session: dict) -> dict[int, tuple[int, int, float]]:
    """(tokens emitted, rounds, share of repeated 8-grams) per window of generated position."""
    from ttspec.records import repeated_ngrams

    found: dict[int, list[int]] = {}
    for position, _, _, emitted in session["rounds"]:
        counts = found.setdefault(position // WINDOW, [0, 0])
        counts[0] += emitted
        counts[1] += 1
    return {
        w: (e, n, repeated_ngrams(session["ids"][w * WINDOW : (w + 1) * WINDOW]))
        for w, (e, n) in found.items()
    }


def tau(tables: list[dict], keep: object, most: float) -> float:
    """Ratio of sums over sessions and the windows that `keep` accepts."""
    cells = [c for t in tables for w, c in t.items() if keep(w) and c[2] <= most]
    rounds = sum(c[1] for c in cells)
    return sum(c[0] for c in cells) / rounds if rounds else math.nan


def ratio(a: list[dict], b: list[dict], keep: object, most: float) -> tuple[float, float, float]:
    """tau(a) / tau(b) over the same sessions, with a 95 % bootstrap interval over sessions."""
    rng = random.Random(0)
    index = range(len(a))
    draws = []
    for _ in range(RESAMPLES):
        pick = rng.choices(index, k=len(a))
        draws.append(tau([a[i] for i in pick], keep, most) / tau([b[i] for i in pick], keep, most))
    draws.sort()
    low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES)]
    return tau(a, keep, most) / tau(b, keep, most), low, high


def report(a: argparse.Namespace) -> None:
    """Write sessions.md and sessions.png beside each other."""
    arms = read(a.folder)
    tables = {arm: [windows(s) for s in made["sessions"]] for arm, made in arms.items()}
    first = next(iter(arms.values()))
    same = {
        arm: sum(
            x["ids"] == y["ids"] for x, y in zip(made["sessions"], first["sessions"], strict=True)
        )
        for arm, made in arms.items()
    }
    kinds = [s["kind"] for s in first["sessions"]]
    full = sum(
        len(s["ids"]) == max(len(x["ids"]) for x in first["sessions"]) for s in first["sessions"]
    )
    lines = [
        f"{len(kinds)} sessions, {full} of full length, the others ran out of turns; "
        f"{sum(len(s['ids']) for s in first['sessions']):,} generated tokens. Sessions with the "
        f"same text as {next(iter(arms))}'s: "
        + ", ".join(f"{arm} {n}" for arm, n in same.items())
        + ".",
        "",
    ]
    parts = {"first 512": lambda w: w == 0, "past 1,024": lambda w: w >= 2}
    statics = [arm for arm in arms if arm.startswith("static")]
    for label, most in (("all windows", 1.0), (f"windows with at most {LOOPED} repeated", LOOPED)):
        for kind in ("all", "topic", "mixed"):
            chosen = [i for i, k in enumerate(kinds) if kind in ("all", k)]
            pick = {arm: [tables[arm][i] for i in chosen] for arm in arms}
            lines += [f"### {kind} sessions ({len(chosen)}), {label}", ""]
            lines += ["| arm | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
            for arm in arms:
                cells = [f"{tau(pick[arm], keep, most):.3f}" for keep in parts.values()]
                lines.append(f"| {arm} | " + " | ".join(cells) + " |")
            for arm in (x for x in arms if x.startswith("learn")):
                best = max(statics, key=lambda s: tau(pick[s], parts["past 1,024"], most))
                for other in dict.fromkeys(("static", best)):
                    cells = [
                        "{:.3f} [{:.3f}, {:.3f}]".format(*ratio(pick[arm], pick[other], keep, most))
                        for keep in parts.values()
                    ]
                    lines.append(f"| {arm} / {other} | " + " | ".join(cells) + " |")
            lines.append("")
    last = max(w for table in tables["static"] for w in table)
    lines += [
        "### by window",
        "",
        "| window | windows kept | repeated 8-grams | " + " | ".join(arms),
    ]
    lines[-1] += " |"
    lines.append("|---|---|---|" + "---|" * len(arms))
    for w in range(last + 1):
        cells = [t[w][2] for t in tables["static"] if w in t]
        row = [f"{tau(tables[arm], lambda x, w=w: x == w, 1.0):.3f}" for arm in arms]
        kept = sum(c <= LOOPED for c in cells)
        share = sum(cells) / len(cells)
        lines.append(
            f"| {w * WINDOW}-{(w + 1) * WINDOW} | {kept}/{len(cells)} | {share:.2f} | "
            + " | ".join(row)
            + " |"
        )
    text = "\n".join(lines) + "\n"
    (a.folder / "sessions.md").write_text(text)
    print(text)
    plot(a.folder / "sessions.png", arms, tables, kinds)


def plot(path: Path, arms: dict, tables: dict, kinds: list[str]) -> None:
    """Acceptance length by window, for both kinds of session, with intervals over sessions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    rng = random.Random(0)
    panels = (
        ("topic", 1.0, "turns on one topic"),
        ("mixed", 1.0, "unrelated turns"),
        ("all", LOOPED, f"both, windows with at most {LOOPED} repeated 8-grams"),
    )
    for axis, (kind, most, title) in zip(axes, panels, strict=True):
        chosen = [i for i, k in enumerate(kinds) if kind in ("all", k)]
        for arm, colour in zip(ARMS, COLOURS, strict=True):
            if arm not in arms or arm == "plain":
                continue
            own = [tables[arm][i] for i in chosen]
            span = range(max(w for t in own for w in t) + 1)
            x = [(w + 0.5) * WINDOW for w in span]
            keeps = [lambda v, w=w: v == w for w in span]
            y = [tau(own, k, most) for k in keeps]
            axis.plot(x, y, color=colour, label=arm, marker="o", ms=3)
            draws = [
                sorted(tau(rng.choices(own, k=len(own)), k, most) for _ in range(300))
                for k in keeps
            ]
            axis.fill_between(
                x, [d[7] for d in draws], [d[292] for d in draws], color=colour, alpha=0.15, lw=0
            )
        axis.axvline(768, color="#999999", lw=0.8, ls=":")
        axis.annotate(
            "drafter's training length",
            (768, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color="#666666",
            xytext=(3, 0),
            textcoords="offset points",
        )
        axis.set_title(f"{title} ({len(chosen)} sessions)", fontsize=9)
        axis.set_xlabel("generated tokens")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("acceptance length (tokens a round)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def compare(a: argparse.Namespace) -> None:
    """One table and one plot of several drafters: drafters.md and drafters.png in `a.out`."""
    parts = (
        ("first 512", lambda w: w == 0, 1.0),
        ("past 1,024", lambda w: w >= 2, 1.0),
        ("past 1,024, little repetition", lambda w: w >= 2, LOOPED),
    )
    lines = ["| drafter | arm | tokens | " + " | ".join(name for name, *_ in parts) + " |"]
    lines.append("|---|---|---|" + "---|" * len(parts))
    drawn = {}
    for folder in a.folders:
        arms = read(folder)
        tables = {arm: [windows(s) for s in made["sessions"]] for arm, made in arms.items()}
        drawn[folder.name] = tables
        for arm, own in tables.items():
            cells = [f"{tau(own, keep, most):.3f}" for _, keep, most in parts]
            count = sum(len(s["ids"]) for s in arms[arm]["sessions"])
            lines.append(f"| {folder.name} | {arm} | {count:,} | " + " | ".join(cells) + " |")
        statics = [arm for arm in tables if arm.startswith("static")]
        for arm in (x for x in tables if x.startswith("learn")):
            late = parts[1][1]
            best = max(statics, key=lambda s: tau(tables[s], late, 1.0))
            for other in dict.fromkeys(("static", best)):
                cells = [
                    "{:.3f} [{:.3f}, {:.3f}]".format(*ratio(tables[arm], tables[other], keep, most))
                    for _, keep, most in parts
                ]
                lines.append(f"| {folder.name} | *{arm} / {other}* | | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "drafters.md").write_text(text)
    print(text)
    from matplotlib.figure import Figure

    panels = {name: t for name, t in drawn.items() if len(t) > 1}
    flat = {n: t["static"] for n, t in drawn.items() if n not in panels}
    figure = Figure(figsize=(4.2 * len(panels), 4.0), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, tables) in zip(axes, panels.items(), strict=True):
        greys = zip(flat.items(), ("#bbbbbb", "#999999"), strict=False)
        for (other, table), colour in greys:
            line(axis, table, colour, other, ls="--")
        for arm, colour in zip(ARMS, COLOURS, strict=True):
            if arm in tables and arm != "plain":
                line(axis, tables[arm], colour, arm)
        axis.set_title(f"{name} ({len(tables['static'])} sessions)", fontsize=9)
        axis.set_xlabel("generated tokens")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("acceptance length (tokens a round)")
    figure.savefig(a.out / "drafters.png")


def line(axis: object, tables: list[dict], colour: str, label: str, **style: object) -> None:
    """Acceptance length by window, where at least half of the sessions have rounds."""
    last = max(w for t in tables for w in t)
    span = [w for w in range(last + 1) if 2 * sum(w in t for t in tables) >= len(tables)]
    x = [(w + 0.5) * WINDOW for w in span]
    y = [tau(tables, lambda v, w=w: v == w, 1.0) for w in span]
    axis.plot(x, y, color=colour, label=label, marker="o", ms=3, **style)  # type: ignore[attr-defined]


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    go = commands.add_parser("run")
    go.add_argument("--suite", type=Path, default=Path(".data/sessions.jsonl"))
    go.add_argument("--out", type=Path, default=Path("runs/sessions"))
    go.add_argument("--arms", default=",".join(ARMS[1:]))
    go.add_argument("--target", default="smollm2-135m")
    go.add_argument("--drafter", default="auto")
    go.add_argument("--device", default="auto")
    go.add_argument("--dtype", default="float32")
    go.add_argument("--sessions", type=int, default=40)
    go.add_argument("--every", type=int, default=1, help="of the suite, every n-th session")
    go.add_argument("--tokens", type=int, default=4000)
    go.add_argument("--turn-tokens", type=int, default=256)
    go.add_argument("--temperature", type=float, default=0.7)
    go.add_argument("--seed", type=int, default=1)
    go.add_argument("--window", type=int, default=512)
    go.add_argument("--rebase", type=int, default=512)
    go.add_argument("--learn", default="{}", help="JSON of LearnConfig fields")
    go.set_defaults(do=run)
    copy = commands.add_parser("ngram")
    copy.add_argument("folder", type=Path)
    copy.add_argument("--arm", default="static")
    copy.add_argument("--suite", type=Path, default=Path(".data/sessions.jsonl"))
    copy.add_argument("--out", type=Path, default=Path("runs/ngram"))
    copy.add_argument("--target", default="smollm2-135m")
    copy.add_argument("--turn-tokens", type=int, default=256)
    copy.set_defaults(do=ngram)
    show = commands.add_parser("report")
    show.add_argument("folder", type=Path, nargs="?", default=Path("runs/sessions"))
    show.set_defaults(do=report)
    several = commands.add_parser("compare")
    several.add_argument("folders", type=Path, nargs="+")
    several.add_argument("--out", type=Path, default=Path("runs"))
    several.set_defaults(do=compare)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
