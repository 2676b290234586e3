"""What identity can mean in bfloat16: one text, read again in other shapes, and what changes.

The target reads a text whose tokens are given (teacher-forced): one token at a time, as plain
decoding does; in blocks of which a random part is kept, as verification does; alone and among
other rows. Each reading is compared with plain decoding of one row: at how many positions another
token is the best one, and how near the two best were there. `steady` readings are those of
`deterministic`: every forward has one width, whatever of it is kept.
"""

from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import common
import torch
from cyclopts import App
from torch import Tensor

import ttspec
from ttspec.bench.jsonl import write_json
from ttspec.bench.suites import load_suite
from ttspec.bench.table import Table
from ttspec.decoding.loading import device_of, dtype_of
from ttspec.models.capture import Graphs
from ttspec.models.shapes import find_shapes, random_target
from ttspec.models.target import Target
from ttspec.spans import batch_invariant

WIDTH = 16
SKIP = 32
"""Positions before the first that is compared."""


class Reading(NamedTuple):
    """In what shapes a text is read."""

    rows: int
    width: int
    """Tokens of a forward."""
    partly: bool = False
    """Only a random part of each block is kept."""
    invariant: bool = False
    """Batch-invariant: every forward has one width."""


# The names are those of the committed results; `batch_invariant` was called `steady` then.
READINGS = {
    "plain": Reading(1, 1),
    "plain, 8 rows": Reading(8, 1),
    "blocks": Reading(1, WIDTH, partly=True),
    "blocks, 8 rows": Reading(8, WIDTH, partly=True),
    "steady plain": Reading(1, WIDTH, invariant=True),
    "steady blocks": Reading(1, WIDTH, partly=True, invariant=True),
    "steady plain, 8 rows": Reading(8, WIDTH, invariant=True),
    "steady blocks, 8 rows": Reading(8, WIDTH, partly=True, invariant=True),
}
AGAIN = {
    "steady blocks": ("steady plain", "steady blocks against steady plain"),
    "steady blocks, 8 rows": ("steady plain, 8 rows", "the same, 8 rows"),
}
"""Readings compared with another one too, and what that is called."""
app = App(help=__doc__)


def read(target: Target, texts: Tensor, how: Reading) -> Tensor:
    """Logits [texts, N, V] of given texts int64 [8, N], `rows` at a time, from empty caches."""
    rows, width, partly, invariant = how
    count, length = texts.shape
    slots = -(-(length + width) // 256) * 256
    found = []
    for first in range(0, min(count, 2 if rows == 1 else count), rows):
        cache = target.cache(rows, slots, width)
        fed, start = texts.new_zeros(rows, width), texts.new_zeros(rows)
        run = Graphs(texts.device)
        spans = run.on and target.reads_spans

        def forward(longest: int) -> Any:
            return target.forward(cache, fed, start, longest, spans=spans)[0]

        kept = texts.new_zeros(rows, length, target.head.shape[0], dtype=target.dtype)
        at, rng = [0] * rows, Random(7)
        padded = torch.nn.functional.pad(texts[first : first + rows], (0, 2 * width), value=1)
        while min(at) < length:
            begins = [min(n, length) for n in at]
            fed.copy_(torch.stack([padded[r, n : n + width] for r, n in enumerate(begins)]))
            if width > 1 and not partly:
                fed[:, 1:] = 1  # padding
            start.copy_(torch.tensor(begins))
            with batch_invariant() if invariant else nullcontext():
                logits = run(forward, slots if spans else max(begins))
            for r, n in enumerate(at):
                most = min(rng.randint(1, width) if partly else 1, length - n)
                if most > 0:
                    kept[r, n : n + most] = logits[r, :most]
                    at[r] += most
        del run
        found.append(kept)
    return torch.cat(found)


def compare(own: Tensor, plain: Tensor) -> dict[str, Any]:
    """What one reading [texts, N, V] changes against another, plain decoding of one row say."""
    a, b = own[: len(plain), SKIP:].flatten(0, 1), plain[:, SKIP:].flatten(0, 1)
    flips, gaps, below, distance, change = [], [], [], [], []
    for x, y in zip(a.split(256), b.split(256), strict=True):  # in float32 they are large
        x, y = x.float(), y.float()
        top, best = y.topk(2, -1).values, x.argmax(-1)
        flips.append(best != y.argmax(-1))
        gaps.append(top[:, 0] - top[:, 1])
        below.append(top[:, 0] - y.gather(-1, best[:, None])[:, 0])
        distance.append((x.softmax(-1) - y.softmax(-1)).abs().sum(-1) / 2)
        change.append((x - y).abs().amax(-1))
    flip, gap = torch.cat(flips), torch.cat(gaps)
    return {
        "positions": len(flip),
        "flips": int(flip.sum()),
        "ties": int((gap == 0).sum()),
        "widest_margin_of_a_flip": float(gap.masked_fill(~flip, 0).max()),
        "farthest_below_the_best": float(torch.cat(below).max()),
        "mean_total_variation": float(torch.cat(distance).mean()),
        "largest_change_of_a_logit": float(torch.cat(change).max()),
        "bits_equal": torch.equal(a, b),
    }


def find_target(name: str, tokens: int, device: str, dtype: str) -> tuple[Target, Tensor]:
    """A target, and eight texts int64 [8, N] for it to read: its own, or random tokens."""
    place = device_of(device)
    if "+" in name or "," in name:
        target = random_target(find_shapes(name), place, dtype_of(dtype, place))
        make = torch.Generator().manual_seed(0)
        return target, torch.randint(target.head.shape[0], (8, tokens), generator=make).to(place)
    engine = ttspec.load(name, "none", device=device, dtype=dtype)
    prompts: Any = [request[0] for request in load_suite("quick").requests[:8]]
    answers = engine.generate(prompts, max_new_tokens=tokens, ignore_eos=True)
    return engine.target, torch.tensor([r.token_ids for r in answers], device=place)


@app.command
@torch.no_grad()
def run(
    *targets: str,
    out: Path = Path("runs/flips"),
    tokens: int = 512,
    device: str = "auto",
    dtype: str = "bfloat16",
) -> None:
    """Measure; a file for each target goes to `out`.

    Parameters
    ----------
    targets
        A target's name for real weights, reading text that it wrote; a pair as in
        `--random-weights` for published shapes, reading random tokens.
    out
        Where the files go.
    tokens
        Of each of the eight texts; of these two are read alone.
    device
        auto, cpu or cuda.
    dtype
        Of the weights.
    """
    for name in targets or ("smollm2-135m",):
        target, texts = find_target(name, tokens, device, dtype)
        logits: dict[str, Tensor] = {}
        found = {}
        for reading, how in READINGS.items():
            own = read(target, texts, how)
            if reading in ("plain", *(base for base, _ in AGAIN.values())):
                logits[reading] = own
            found[reading] = compare(own, logits["plain"])
            if reading in AGAIN:
                base, title = AGAIN[reading]
                found[title] = compare(own, logits[base])
            del own
        info = common.device_info(texts.device, dtype)
        result = {"target": target.name, **info, "width": WIDTH, "readings": found}
        write_json(out / f"{name.split('+')[0].rpartition('/')[2]}.json", result)
        print(table(result).markdown(), flush=True)
        del target, texts, logits
        torch.cuda.empty_cache()


@app.command
def show(folder: Path = common.RESULTS / "flips") -> None:
    """Print the tables of what was measured."""
    common.show_tables(folder, table)


def table(result: dict[str, Any]) -> Table:
    """One target."""
    return Table(
        title=f"{result['target']}, {result['dtype']}, {result['device']}, torch {result['torch']}",
        head=(
            *("reading", "positions", "flips", "margin of a flip, at most"),
            *("below the best, at most", "mean TV", "largest change of a logit", "bits equal"),
        ),
        rows=[
            (
                name,
                f"{own['positions']:,}",
                f"{own['flips'] / own['positions']:.2%}",
                f"{own['widest_margin_of_a_flip']:.3f}",
                f"{own['farthest_below_the_best']:.3f}",
                f"{own['mean_total_variation']:.4f}",
                f"{own['largest_change_of_a_logit']:.3f}",
                "yes" if own["bits_equal"] else "no",
            )
            for name, own in result["readings"].items()
        ],
    )


if __name__ == "__main__":
    common.main(app)
