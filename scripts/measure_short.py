"""Acceptance on short answers: n-gram copying, a plain draft model and the bundled drafters.

The 20 held-out prompts of `scripts/make_prompts.py`, greedy, first 256 tokens. An answer is cut
where its last 64 tokens repeat (share of repeated 8-grams over 0.3): loops flatter every drafter.
"""

import argparse
import json
import shutil
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


def draft_model() -> str:
    """The bundled PARD drafter as a plain draft model, in a folder."""
    from ttspec.drafters.checkpoint import BUNDLED, read_config

    source, folder = BUNDLED / "smollm2-135m-pard", Path("runs/draft-model")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.safetensors"):
        shutil.copy(file, folder)
    config = read_config(source)
    config = {k: v for k, v in config.items() if k not in ("pard_token", "spd_type")}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def main() -> None:
    """Run the arms one after the other on the same prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, default=Path(".data/held_out.jsonl"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--arms", default="plain,ngram,draft-model,dflash,eagle3,pard")
    a = parser.parse_args()
    import torch

    import ttspec
    from ttspec import DraftConfig, LearnConfig
    from ttspec.drafters.checkpoint import BUNDLED

    if a.threads:
        torch.set_num_threads(a.threads)
    prompts = [json.loads(line)["prompt"] for line in a.suite.read_text().split("\n") if line]
    texts = None
    for arm in a.arms.split(","):
        name, _, learn = arm.partition("+")
        drafter = {"plain": "none", "draft-model": draft_model()}.get(name, name)
        if (BUNDLED / f"smollm2-135m-{name}").is_dir():
            drafter = f"smollm2-135m-{name}"
        options = {"learn": LearnConfig() if learn else None}
        if name == "plain":
            options["draft"] = DraftConfig(length=0)
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
            f"{arm:12s} tau {sum(x.emitted for x in kept) / len(kept):.3f} cut at loops,",
            f"{sum(x.emitted for x in every) / len(every):.3f} in all;",
            f"{sum(r.token_ids == t for r, t in zip(results, texts, strict=True))}/{len(texts)}",
            f"texts as plain's; {seconds:.0f} s in one batch",
            flush=True,
        )


if __name__ == "__main__":
    main()
