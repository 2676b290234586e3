"""What rolling a hybrid target's states back costs, beside one of its verifications.

A verification of published shapes with random weights is captured once and replayed. At the start
where the states already stand nothing is made up for; a few tokens further the states first go on
by so many of the last verification's tokens, which is what a rollback costs here. Beside it: a copy
of all states before each verification, which putting them back would need.
"""

import json
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from cyclopts import App

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
    import torch

    from ttspec.decoding.loading import device_of
    from ttspec.models.capture import Graphs
    from ttspec.models.shapes import find_shapes, random_target

    place = device_of(device)
    cuda = place.type == "cuda"
    target = random_target(find_shapes(pair), place, torch.bfloat16)
    found: dict[str, Any] = {
        "target": target.name,
        "device": torch.cuda.get_device_name(place) if cuda else "cpu",
        "torch": torch.__version__,
        "dtype": "bfloat16",
        "width": width,
        "kept": kept,
        "context": context,
        "rows": {},
    }
    for count in rows:
        slots = context + kept * (rounds + 8) + width
        cache: Any = target.cache(count, slots, width)
        tokens = torch.ones(count, context, dtype=torch.long, device=place)
        begin = torch.zeros(count, dtype=torch.long, device=place)
        with torch.no_grad():
            target.forward(cache, tokens, begin, 0, counts=begin + context, logits=0)
        fed = torch.ones(count, width, dtype=torch.long, device=place)
        start = begin + context
        run_graph = Graphs(place)

        def verify(longest: int) -> Any:
            return target.forward(cache, fed, start, longest, spans=run_graph.on)[0]  # noqa: B023

        states = [tensor for own in cache.states.values() for tensor in (own.state, own.window)]
        copies = [torch.empty_like(tensor) for tensor in states]

        def timed(kind: str) -> float:
            if kind == "rolled back":
                start.add_(kept)  # noqa: B023
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            if kind == "states copied":
                torch._foreach_copy_(copies, states)  # noqa: B023
            else:
                run_graph(verify, slots)  # noqa: B023
            if cuda:
                torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - began)

        kinds = ("nothing to make up for", "rolled back", "states copied")
        for kind in kinds:  # captured, and warm
            timed(kind)
            timed(kind)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        order = Random(0)
        for _ in range(rounds):
            for kind in order.sample(kinds, len(kinds)):
                times[kind].append(timed(kind))
        pairs = zip(times["rolled back"], times["nothing to make up for"], strict=True)
        found["rows"][count] = {
            "milliseconds": {kind: median(took) for kind, took in times.items()},
            "rollback_milliseconds": median(a - b for a, b in pairs),
            "state_bytes": sum(tensor.nbytes for tensor in states),
            "kept_bytes": cache.state_bytes - sum(tensor.nbytes for tensor in states),
            "recurrent_layers": len(cache.states),
        }
        print(f"{count} rows: {found['rows'][count]}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{pair.split('+')[0].rpartition('/')[2]}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
