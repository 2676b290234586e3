"""Plain decoding beside transformers' own `generate`: the same weights, greedy, in turns.

    python benchmarks/transformers_speed.py --target TARGET

Prompts of a suite, one request at a time. `--compile` compiles both on a GPU (transformers' then
has a static cache). In float32 both write the same texts.
"""

import copy
import time
import warnings
from itertools import chain
from typing import Any

import common
import torch
from cyclopts import App
from transformers import GenerationConfig, StaticCache

from ttspec.bench.suites import load_suites
from ttspec.cli.options import ModelFlags
from ttspec.config import DraftConfig
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.template import ChatTemplate
from ttspec.models.target import cache_keyword

app = App(help=__doc__)


def transformers_model(model: Any) -> Any:
    """The same modules with the same weights, and transformers' own attention."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("sdpa")
    twin.generation_config = GenerationConfig()
    return twin


@app.default
def main(
    *,
    models: ModelFlags = ModelFlags(drafter="none"),
    suite: str = "quick",
    requests: int = 8,
    tokens: int = 200,
) -> None:
    """Measure; the first prompt warms both up and is not counted."""
    engine = models.load()
    target, ends = engine.target, list(engine.target.ends)
    model, device = transformers_model(target.model), target.device
    prompts = [request[0] for request in load_suites(suite, requests).requests]
    template = ChatTemplate(engine.tokenizer)
    many = [ChatHistory(template).ask(prompt) for prompt in prompts]
    config: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": ends}
    cache: dict[str, Any] = {}
    if models.compile:
        slots = max(map(len, many)) + tokens
        cache = {cache_keyword(model): StaticCache(config=model.config, max_cache_len=slots)}

    def theirs(ids: list[int]) -> list[int]:
        given = torch.tensor([ids], device=device)
        for each in cache.values():
            each.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keywords of older versions
            how = GenerationConfig(**config, pad_token_id=ends[0] if ends else 0)
            mask = torch.ones_like(given)
            out = model.generate(given, attention_mask=mask, generation_config=how, **cache)
        return out[0, len(ids) :].tolist()

    def ours(ids: list[int]) -> list[int]:
        plain = {"draft": DraftConfig(length=0), "learn": None, "temperature": 0.0}
        return engine.generate(ids, max_new_tokens=tokens, **plain)[0].token_ids

    seconds, counts, same = (
        {"ttspec": 0.0, "transformers": 0.0},
        {"ttspec": 0, "transformers": 0},
        0,
    )
    for number, ids in enumerate(many):
        texts = {}
        for name, write in (("ttspec", ours), ("transformers", theirs)):
            began = time.perf_counter()
            texts[name] = write(ids)  # ends with numbers on the host
            if number:
                seconds[name] += time.perf_counter() - began
                counts[name] += len(texts[name])
        same += texts["ttspec"] == texts["transformers"]
    for name, spent in seconds.items():
        print(f"{name}: {counts[name] / spent:.1f} tokens a second")
    print(f"{same} of {len(many)} texts are the same")


if __name__ == "__main__":
    common.main(app)
