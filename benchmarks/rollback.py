"""What rolling a hybrid target's states back costs, beside one of its verifications.

A verification of published shapes with random weights is captured once and replayed. At the start
where the states already stand nothing is made up for; a few tokens further the states first go on
by so many of the last verification's tokens, which is what a rollback costs here. Beside it: a copy
of all states before each verification, which putting them back would need.
"""

from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import common
import torch
from cyclopts import App

from ttspec.bench.jsonl import write_json
from ttspec.decoding.loading import device_of
from ttspec.models.capture import Graphs
from ttspec.models.shapes import find_shapes, random_target
from ttspec.models.target import Target

NOTHING, ROLLED_BACK, COPIED = KINDS = ("nothing to make up for", "rolled back", "states copied")
app = App(help=__doc__)


@app.default
def run(
    *,
    out: Path = Path("runs/rollback"),
    pair: str = "qwen3.5-9b+dflash",
    width: int = 16,
    rows: tuple[int, ...] = (1, 8),
    kept: int = 4,
    context: int = 512,
    rounds: int = 40,
    device: str = "auto",
) -> None:
    """Measure; the figures go to `out`.

    Parameters
    ----------
    out
        Where the file goes.
    pair
        As in `--random-weights`; its target must be a hybrid.
    width
        Tokens of a verification.
    rows
        Numbers of rows.
    kept
        Tokens of a verification that stay.
    context
        Tokens before the first.
    rounds
        Replays of each kind, in random order.
    device
        auto, cpu or cuda.
    """
    target = random_target(find_shapes(pair), device_of(device), torch.bfloat16)
    found: dict[str, Any] = {
        "target": target.name,
        **common.device_info(target.device, target.dtype),
        "width": width,
        "kept": kept,
        "context": context,
        "rows": {},
    }
    for count in rows:
        found["rows"][count] = measure(target, count, width, kept, context, rounds)
        print(f"{count} rows: {found['rows'][count]}", flush=True)
    write_json(out / f"{pair.split('+')[0].rpartition('/')[2]}.json", found)


def measure(
    target: Target, rows: int, width: int, kept: int, context: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of each kind, and the sizes of states."""
    slots = context + kept * (rounds + 8) + width
    cache: Any = target.cache(rows, slots, width)
    begin = torch.zeros(rows, dtype=torch.long, device=target.device)
    with torch.no_grad():
        prompt = begin.new_ones(rows, context)
        target.forward(cache, prompt, begin, 0, counts=begin + context, logits=0)
    fed, start = begin.new_ones(rows, width), begin + context
    graphs = Graphs(target.device)
    states = [tensor for own in cache.states.values() for tensor in (own.state, own.window)]
    copies = [torch.empty_like(tensor) for tensor in states]

    def verify(longest: int) -> Any:
        return target.forward(cache, fed, start, longest, spans=graphs.on)[0]

    def milliseconds(kind: str) -> float:
        if kind == ROLLED_BACK:
            start.add_(kept)
        if kind == COPIED:
            return 1000 * common.timed(target.device, lambda: torch._foreach_copy_(copies, states))
        return 1000 * common.timed(target.device, lambda: graphs(verify, slots))

    for kind in (*KINDS, *KINDS):  # captured, and warm
        milliseconds(kind)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order = Random(0)
    for _ in range(rounds):
        for kind in order.sample(KINDS, len(KINDS)):
            times[kind].append(milliseconds(kind))
    pairs = zip(times[ROLLED_BACK], times[NOTHING], strict=True)
    state_bytes = sum(tensor.nbytes for tensor in states)
    return {
        "milliseconds": {kind: median(own) for kind, own in times.items()},
        "rollback_milliseconds": median(a - b for a, b in pairs),
        "state_bytes": state_bytes,
        "kept_bytes": cache.state_bytes - state_bytes,
        "recurrent_layers": len(cache.states),
    }


if __name__ == "__main__":
    common.main(app)
