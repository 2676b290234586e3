"""Acceptance on short answers: n-gram copying, a plain draft model and the bundled drafters.

The 20 held-out prompts of `scripts/make_prompts.py`, greedy, first 256 tokens. An answer is cut
where its last 64 tokens repeat (share of repeated 8-grams over 0.3): loops flatter every drafter.
"""

import json
from pathlib import Path

import common
import torch
from cyclopts import App

import ttspec
from ttspec import DraftConfig, LearnConfig
from ttspec.drafters.checkpoint import BUNDLED
from ttspec.records import acceptance_length, repeated_ngrams

TAIL, LOOP = 64, 0.3
app = App(help=__doc__)


def before_loop(tokens: list[int]) -> int:
    """Tokens before the answer begins to loop."""
    ends = range(TAIL, len(tokens) + 1)
    looping = (end for end in ends if repeated_ngrams(tokens[end - TAIL : end]) > LOOP)
    return next(looping, len(tokens))


@app.default
def run(
    *,
    suite: Path = Path(".data/held_out.jsonl"),
    dtype: str = "float32",
    device: str = "auto",
    tokens: int = 256,
    temperature: float = 0.0,
    threads: int | None = None,
    arms: str = "plain,ngram,draft-model,dflash,eagle3,pard",
) -> None:
    """Run the arms one after the other on the same prompts; `dflash+learn` is a learning one."""
    if threads:
        torch.set_num_threads(threads)
    prompts = [json.loads(line)["prompt"] for line in suite.read_text().split("\n") if line]
    texts, draft_model = None, common.plain_draft_model(Path("runs/draft-model"))
    for arm in arms.split(","):
        name, _, learn = arm.partition("+")
        drafter = {"plain": "none", "draft-model": draft_model}.get(name, name)
        if (BUNDLED / f"smollm2-135m-{name}").is_dir():
            drafter = f"smollm2-135m-{name}"
        engine = ttspec.load("smollm2-135m", drafter, device=device, dtype=dtype)
        results = []

        def generate() -> None:
            results[:] = engine.generate(
                prompts,
                max_new_tokens=tokens,
                temperature=temperature,
                seed=1,
                learn=LearnConfig() if learn else None,
                draft=DraftConfig(length=0) if name == "plain" else DraftConfig(),
            )

        seconds = common.timed(engine.target.device, generate)
        texts = texts or [r.token_ids for r in results]
        every = [r for result in results for r in result.rounds]
        kept = [
            r
            for result in results
            for r in result.rounds
            if r.position + r.emitted <= before_loop(result.token_ids)
        ]
        print(
            f"{arm:12s} tau {acceptance_length(kept):.3f} cut at loops,",
            f"{acceptance_length(every):.3f} in all;",
            f"{sum(r.token_ids == t for r, t in zip(results, texts, strict=True))}/{len(texts)}",
            f"texts as plain's; {seconds:.0f} s in one batch",
            flush=True,
        )


if __name__ == "__main__":
    common.main(app)
