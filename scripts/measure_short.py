"""Acceptance and speed on short answers: static drafter, n-gram copying, plain, learning.

The 20 held-out prompts of `scripts/make_prompts.py`, greedy, first 256 tokens. An answer is cut
where its last 64 tokens repeat (share of repeated 8-grams over 0.3): loops flatter every drafter.
"""

import argparse
import json
import time
from pathlib import Path

TAIL, LOOP = 64, 0.3


def natural(tokens: list[int]) -> int:
    """Tokens before the answer begins to loop."""
    from ttspec.records import repeated_ngrams

    for end in range(TAIL, len(tokens) + 1):
        if repeated_ngrams(tokens[end - TAIL : end]) > LOOP:
            return end
    return len(tokens)


def main() -> None:
    """Run the arms one after the other on the same prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, default=Path(".data/held_out.jsonl"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--arms", default="plain,ngram,static,learn")
    a = parser.parse_args()
    import torch

    import ttspec
    from ttspec import DraftConfig, LearnConfig

    if a.threads:
        torch.set_num_threads(a.threads)
    prompts = [json.loads(line)["prompt"] for line in a.suite.read_text().split("\n") if line]
    arms = {
        "plain": ("auto", {"learn": None, "draft": DraftConfig(length=0)}),
        "ngram": ("ngram", {"learn": None}),
        "static": ("auto", {"learn": None}),
        "learn": ("auto", {"learn": LearnConfig()}),
    }
    texts = None
    for arm in a.arms.split(","):
        drafter, options = arms[arm]
        engine = ttspec.load("smollm2-135m", drafter, device=a.device, dtype=a.dtype)
        began = time.perf_counter()
        results = engine.generate(
            prompts, max_new_tokens=a.tokens, temperature=a.temperature, seed=1, **options
        )
        seconds = time.perf_counter() - began
        texts = texts or [r.token_ids for r in results]
        kept = [
            x for r in results for x in r.rounds if x.position + x.emitted <= natural(r.token_ids)
        ]
        every = [x for r in results for x in r.rounds]
        print(
            f"{arm:7s} tau {sum(x.emitted for x in kept) / len(kept):.3f} cut at loops,",
            f"{sum(x.emitted for x in every) / len(every):.3f} in all;",
            f"{sum(r.token_ids == t for r, t in zip(results, texts, strict=True))}/{len(texts)}",
            f"texts as plain's; {seconds:.0f} s in one batch",
            flush=True,
        )


if __name__ == "__main__":
    main()
