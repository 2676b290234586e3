"""What identity can mean in bfloat16: one text, read again in other shapes, and what changes.

The target reads a text whose tokens are given (teacher-forced): one token at a time, as plain
decoding does; in blocks of which a random part is kept, as verification does; alone and among
other rows. Each reading is compared with plain decoding of one row: at how many positions another
token is the best one, and how near the two best were there. `steady` readings are those of
`deterministic`: every forward has one width, whatever of it is kept.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

from cyclopts import App

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "flips"
WIDTH = 16
SKIP = 32
"""Positions before the first that is compared."""
READINGS = {
    # name: rows, tokens of a forward, whether blocks are kept in part, whether it is steady
    "plain": (1, 1, False, False),
    "plain, 8 rows": (8, 1, False, False),
    "blocks": (1, WIDTH, True, False),
    "blocks, 8 rows": (8, WIDTH, True, False),
    "steady plain": (1, WIDTH, False, True),
    "steady blocks": (1, WIDTH, True, True),
    "steady plain, 8 rows": (8, WIDTH, False, True),
    "steady blocks, 8 rows": (8, WIDTH, True, True),
}
app = App(help=__doc__)


def read(target: Any, texts: Any, rows: int, width: int, *, partly: bool, steady: bool) -> Any:
    """Logits [texts, N, V] of given texts int64 [8, N], `rows` at a time, from empty caches."""
    import torch

    from ttspec.models.capture import Graphs
    from ttspec.spans import batch_invariant as steadily

    count, length = texts.shape
    slots = -(-(length + width) // 256) * 256
    wanted = range(0, min(count, 2 if rows == 1 else count), rows)
    out = []
    for first in wanted:
        cache = target.cache(rows, slots, width)
        fed = texts.new_zeros(rows, width)
        start = texts.new_zeros(rows)
        run = Graphs(texts.device)
        spans = run.on and target.reads_spans

        def forward(longest: int) -> Any:
            return target.forward(cache, fed, start, longest, spans=spans)[0]  # noqa: B023

        said = texts.new_zeros(rows, length, target.head.shape[0], dtype=target.dtype)
        at, rng = [0] * rows, Random(7)
        padded = torch.nn.functional.pad(texts[first : first + rows], (0, 2 * width), value=1)
        while min(at) < length:
            blocks = [padded[r, min(n, length) : min(n, length) + width] for r, n in enumerate(at)]
            fed.copy_(torch.stack(blocks))
            if width > 1 and not partly:
                fed[:, 1:] = 1  # padding
            start.copy_(torch.tensor([min(n, length) for n in at]))
            with steadily() if steady else nullcontext():
                logits = run(forward, slots if spans else min(max(at), length))
            for r, n in enumerate(at):
                most = min(rng.randint(1, width) if partly else 1, length - n)
                if most > 0:
                    said[r, n : n + most] = logits[r, :most]
                    at[r] += most
        del run
        out.append(said)
    return torch.cat(out)


def compare(own: Any, plain: Any) -> dict[str, float]:
    """What one reading [texts, N, V] changes against plain decoding of one row."""
    import torch

    flips = count = ties = 0
    worst, distance, change, below, equal = 0.0, 0.0, 0.0, 0.0, True
    for a, b in zip(own[: len(plain)], plain, strict=True):
        a, b = a[SKIP:].float(), b[SKIP:].float()
        top = b.topk(2, -1).values
        gap = top[:, 0] - top[:, 1]
        best = a.argmax(-1)
        flipped = best != b.argmax(-1)
        flips += int(flipped.sum())
        ties += int((gap == 0).sum())
        count += len(a)
        if flipped.any():
            worst = max(worst, float(gap[flipped].max()))
        below = max(below, float((top[:, 0] - b.gather(-1, best[:, None])[:, 0]).max()))
        distance += float((a.softmax(-1) - b.softmax(-1)).abs().sum(-1).sum()) / 2
        change = max(change, float((a - b).abs().max()))
        equal = equal and torch.equal(a, b)
    return {
        "positions": count,
        "flips": flips,
        "ties": ties,
        "widest_margin_of_a_flip": worst,
        "farthest_below_the_best": below,
        "mean_total_variation": distance / count,
        "largest_change_of_a_logit": change,
        "bits_equal": equal,
    }


@app.command
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
    import torch

    import ttspec
    from ttspec.bench.suites import load_suite
    from ttspec.decoding.loading import device_of, dtype_of
    from ttspec.models.shapes import find_shapes, random_target

    place = device_of(device)
    out.mkdir(parents=True, exist_ok=True)
    for name in targets or ("smollm2-135m",):
        if "+" in name or "," in name:
            target = random_target(find_shapes(name), place, dtype_of(dtype, place))
            make = torch.Generator().manual_seed(0)
            texts = torch.randint(target.head.shape[0], (8, tokens), generator=make).to(place)
        else:
            engine = ttspec.load(name, "none", device=device, dtype=dtype)
            target = engine.target
            prompts = [request[0] for request in load_suite("quick").requests[:8]]
            told = engine.generate(prompts, max_new_tokens=tokens, ignore_eos=True)
            texts = torch.tensor([r.token_ids for r in told], device=place)
        with torch.no_grad():
            plain, found = None, {}
            for reading, (rows, width, partly, steady) in READINGS.items():
                said = read(target, texts, rows, width, partly=partly, steady=steady)
                plain = said if plain is None else plain
                found[reading] = compare(said, plain)
                if reading == "steady plain":
                    base = said
                elif reading == "steady blocks":
                    found["steady blocks against steady plain"] = compare(said, base)
                elif reading == "steady plain, 8 rows":
                    many = said
                elif reading == "steady blocks, 8 rows":
                    found["the same, 8 rows"] = compare(said, many)
                del said
        result = {
            "target": target.name,
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "dtype": dtype,
            "width": WIDTH,
            "readings": found,
        }
        path = out / f"{name.split('+')[0].rpartition('/')[2]}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table(result), flush=True)
        del target, texts, plain
        if place.type == "cuda":
            torch.cuda.empty_cache()


@app.command
def show(folder: Path = RESULTS) -> None:
    """Print the tables of what was measured."""
    for path in sorted(folder.glob("*.json")):
        print(table(json.loads(path.read_text(encoding="utf-8"))))


def table(result: dict[str, Any]) -> str:
    """One target as Markdown."""
    lines = [
        f"{result['target']}, {result['dtype']}, {result['device']}, torch {result['torch']}",
        "",
        "| reading | positions | flips | margin of a flip, at most | below the best, at most "
        "| mean TV | largest change of a logit | bits equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in result["readings"].items():
        lines.append(
            f"| {name} | {own['positions']:,} | {own['flips'] / own['positions']:.2%} "
            f"| {own['widest_margin_of_a_flip']:.3f} | {own['farthest_below_the_best']:.3f} "
            f"| {own['mean_total_variation']:.4f} | {own['largest_change_of_a_logit']:.3f} "
            f"| {'yes' if own['bits_equal'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
