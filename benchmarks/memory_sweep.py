"""What a memory of requests gains over a stream of them, without rounds: for choosing its settings.

    ttspec bench run --arms plain --suite science.jsonl --rows 64 --out RUN ...
    python benchmarks/memory_sweep.py RUN[,RUN...] TARGET DRAFTER SETTINGS.jsonl

SETTINGS.jsonl holds one JSON object a line, such as {"lr": 1e-4, "texts": 8, "mean": 0.0}. Requests
come 8 at a time. Drafts that would be accepted of 48 blocks of each are counted with the weights
before they teach; then they are remembered, and some updates are made. Printed is the ratio to the
static drafter, tokens a round, over all requests and over each 48. Of several runs 100 requests
come in turn. With {"offline": 4000} the first half of the requests teaches so many updates at once,
and nothing later does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ttspec
from ttspec.bench.replay import open_source, record
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.penalties import sampling_of
from ttspec.learning import study as settings
from ttspec.learning.lessons import taught
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.memory import PAGE, LessonMemory, MemoryRows, Texts
from ttspec.learning.study import Study
from ttspec.learning.update_report import UpdateReport
from ttspec.models.capture import Graphs

ROWS, LENGTH, SHOWN, JUDGED, TURN = 8, 512, 48, 48, 100
DEFAULTS: dict[str, Any] = {
    "lr": 2e-4, "beta1": 0.9, "beta2": 0.99, "texts": 16, "blocks": 32, "pages": 8, "mean": 0.98,
    "updates": 10, "decay": 1.5, "memory": 512, "drafts": None,
    "offline": None,
}  # fmt: skip


def main(run: str, target_name: str, drafter_name: str, path: str) -> None:
    """Read a run once, and let each setting learn from it."""
    engine = ttspec.load(target_name, drafter_name, dtype="bfloat16")
    target, drafter = engine.target, engine.drafter
    assert drafter is not None
    options = drafter.with_context(DraftConfig())
    sampling = sampling_of(GenerateConfig(temperature=0.7, seed=0), target)
    streams: list[list[tuple[Any, ...]]] = []
    for name in run.split(","):
        recording, _, _ = record(target, sorted(drafter.taps), open_source(Path(name)), sampling)
        features = torch.cat([recording.states[tap] for tap in drafter.taps], -1)
        sources = (recording.tokens, features, recording.hidden)
        found = sorted((a.first, a.last + 1, len(a.tokens)) for a in recording.answers.values())
        streams.append([(*place, sources) for place in found])
    answers = streams[0]
    if len(streams) > 1:
        turns = range(0, min(map(len, streams)), TURN)
        answers = [one for at in turns for stream in streams for one in stream[at : at + TURN]]
    batches = []
    for at in range(0, len(answers) - ROWS + 1, ROWS):
        like = answers[0][3]
        *tables, hidden = (t.new_zeros(ROWS, LENGTH, *t.shape[1:]) for t in like)
        begin, end = torch.zeros(2, ROWS, dtype=torch.long)
        for row, (first, last, count, sources) in enumerate(answers[at : at + ROWS]):
            size = min(last - first, LENGTH)
            for table, source in zip((*tables, hidden), sources, strict=True):
                table[row, :size] = source[first : first + size]
            begin[row], end[row] = min(last - first - count, size), size
        batches.append([t.to(target.device) for t in (*tables, hidden, begin, end)])

    place = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1)).to(target.device)
    column = torch.arange(LENGTH, device=target.device)
    known, probe = [], LessonMemory(drafter, 4)
    for ids, seen, hidden, begin, end in batches:
        said = [probe.summary(target.judge(h[None])[0]) for h in hidden]
        likely, p, rest = (torch.stack(part) for part in zip(*said, strict=True))
        judged = (column >= begin[:, None]) & (column < end[:, None] - 1)
        known.append(Texts(ids, seen, judged, judged & False, likely.long(), p, rest))
    whole = Study(drafter, options, drafter.length)

    def tokens_a_round(weights: dict[str, Tensor], texts: Texts) -> float:
        lesson = whole.blocks(texts, texts.judged, place, JUDGED)
        drafts = whole.expected_drafts(weights, texts, lesson)
        return 1 + float(drafts.sum() / lesson.mask.any(-1).sum().clamp(min=1))

    static = [tokens_a_round(drafter.weights, texts) for texts in known]
    print(f"static {sum(static) / len(static):.3f} over {len(known) * ROWS} requests", flush=True)
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        own = DEFAULTS | json.loads(line)
        settings.DECAY = own["decay"] or 1e9
        betas = {name: own[name] for name in ("lr", "beta1", "beta2")}
        live = LiveWeights(LearnConfig(scope="shared", **betas), drafter, 1)
        memory = LessonMemory(drafter, own["memory"])
        rows, graphs = MemoryRows(memory, ROWS), Graphs(target.device)
        study = Study(drafter, options, own["drafts"] or taught(drafter, drafter.length))
        report = UpdateReport.empty(1, target.device)
        pages = torch.zeros(own["texts"], dtype=torch.long, device=target.device)
        chances = torch.zeros(own["texts"], own["pages"] * PAGE, device=target.device)
        mean = {n: w[0].clone() for n, w in live.master.items()}

        def compute(_: int) -> None:
            report.table.zero_()
            texts = memory.read(pages, own["pages"])
            lesson = study.blocks(texts, texts.judged & ~texts.held_out, chances, own["blocks"])
            report.loss[:1].copy_(study.backward(live, texts, lesson))
            report.blocks.fill_(1.0)
            report.norm[:1].copy_(live.gradient_norms())

        def step(_: int) -> None:
            live.step(report)

        found, spent, updates = [], 0.0, 0
        for (ids, seen, hidden, begin, end), texts in zip(batches, known, strict=True):
            drafting = {n: w.to(target.dtype) for n, w in mean.items()}
            found.append(tokens_a_round(drafter.weights | drafting, texts))
            for row in range(ROWS):
                rows.forget(row)
            rows.write(ids, seen, begin * 0, begin)
            at = (begin[:, None] + column[: int((end - begin).max())]).clamp(max=LENGTH - 1)
            row = torch.arange(ROWS, device=at.device)[:, None]
            count, logits = (end - begin - 1).clamp(min=0), target.judge(hidden[row, at])
            rows.write(ids[row, at], seen[row, at], begin, count, logits)
            _wait(target.device)
            began, count = time.perf_counter(), own["updates"]
            if own["offline"]:  # all at once, after the first half
                count = own["offline"] if len(found) == len(known) // 2 else 0
            for _ in range(count):
                chosen, chance = memory.sample(own["texts"], own["pages"])
                pages.copy_(chosen)
                chances.copy_(chance)
                graphs(compute, 0, compile=False)
                graphs(step, 0, compile=False, warm=False)
                updates += 1
                weight = min(own["mean"], (1 + updates) / (10 + updates))
                for name, master in live.master.items():
                    mean[name].lerp_(master[0].detach(), 1 - weight if own["mean"] else 1.0)
            _wait(target.device)
            spent += time.perf_counter() - began
        some = SHOWN // ROWS
        parts = [
            f"{sum(found[i : i + some]) / sum(static[i : i + some]):.3f}"
            for i in range(0, len(found), some)
        ]
        cost = 1e3 * spent / max(updates, 1)
        print(
            f"{line} {sum(found) / sum(static):.4f} | {' '.join(parts)} | {cost:.1f} ms", flush=True
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
