"""How close the policy of draft lengths comes to the best fixed length, on a run that was timed.

No model runs. A text is a stream of drafts accepted, round by round: those of the run's arm
`static`, or made up. A round takes what some round of the run took that had as many drafts, so
single ones are as noisy as there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean

from common import main
from cyclopts import App

from ttspec.decoding import policy as constants
from ttspec.decoding.policy import DraftPolicy

app = App(help=__doc__)
LONGEST, ORDERS = 7, 8
"""Drafts of a block, and orders in which the streams are played."""


def read_run(folder: Path) -> tuple[list[list[int]], dict[int, list[float]]]:
    """Drafts accepted, by request and round; milliseconds of rounds, by draft length."""
    accepted = defaultdict[int, list[int]](list)
    times = defaultdict[int, list[float]](list)
    for line in map(json.loads, (folder / "rounds.jsonl").read_text().splitlines()):
        if line["arm"] == "static":
            accepted[line["request"]].append(line["accepted"])
        if line["round"] and not line.get("copied"):  # the first has the prompt
            times[line["proposed"]].append(line["wait"])
    return list(accepted.values()), times


def made_up(chance: float, random: Random, rounds: int = 600) -> list[int]:
    """A stream whose first draft is right with about `chance`, each further one less likely."""
    stream, now = list[int](), chance
    for _ in range(rounds):
        if random.random() < 0.01:
            now = chance * random.choice((0.5, 1.0, 1.5))
        accepted = 0
        while accepted < LONGEST and random.random() < now * 0.9**accepted:
            accepted += 1
        stream.append(accepted)
    return stream


def play(policy: DraftPolicy, stream: Sequence[int], draw: dict[int, list[float]], random: Random):
    """Tokens a millisecond, and tokens."""
    tokens, took = 0, 0.0
    for context, right in enumerate(stream):
        length = policy.choose()
        time, accepted = random.choice(draw[length]), min(right, length)
        tokens, took = tokens + 1 + accepted, took + time
        counted = [accepted] if length else []
        policy.observe(
            length, time, emitted=1 + accepted, accepted=counted, context=context, chained=True
        )
    return tokens / took, tokens


@app.default
def regret(folder: Path, *, set: tuple[str, ...] = ()) -> None:
    """Print the policy's speed over that of the best fixed length of each stream, and over plain.

    Args:
        folder: Run folder, timed, with the arms plain, static and one that is adaptive.
        set: Other values of constants of policy.py, as COSTS_KEPT=5.
    """
    for name, value in (pair.split("=") for pair in set):
        setattr(constants, name, type(getattr(constants, name))(value))
    accepted, times = read_run(folder)
    lengths = [0, *DraftPolicy(LONGEST).lengths]
    kinds = {"the run's own": accepted}
    for chance in (0.1, 0.25, 0.35, 0.5, 0.7):
        random = Random(1)
        kinds[f"first draft right {chance:.0%}"] = [made_up(chance, random) for _ in range(5)]
    for kind, streams in kinds.items():
        of_best, of_plain = list[float](), list[float]()
        for seed in range(ORDERS):
            random, policy = Random(seed), DraftPolicy(LONGEST)
            took = best = plain = 0.0
            for stream in random.sample(streams, len(streams)):
                speed, tokens = play(policy, stream, times, random)
                fixed = [
                    mean(1 + min(right, n) for right in stream) / mean(times[n]) for n in lengths
                ]
                took, best = took + tokens / speed, best + tokens / max(fixed)
                plain += tokens / fixed[0]
            of_best.append(best / took)
            of_plain.append(plain / took)
        print(
            f"{kind:24} of the best fixed length {mean(of_best):.3f} (worst order "
            f"{min(of_best):.3f}), of plain {mean(of_plain):.3f} ({min(of_plain):.3f})"
        )


if __name__ == "__main__":
    main(app)
