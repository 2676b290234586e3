"""What a response tells of its answers besides text: usage, and metrics in vLLM's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ttspec.records import Result, Round
from ttspec.serving.jobs import Job
from ttspec.serving.options import DraftMetrics


def usage(done: Sequence[tuple[Job, int]], held: int = 0) -> dict[str, Any]:
    """OpenAI's usage, of answers and their tokens so far; those to one prompt count it once.

    `held` are tokens of prompts that rows held already.
    """
    prompts = sum(len(ids) for ids in {id(job.ids): job.ids for job, _ in done}.values())
    written = sum(tokens for _, tokens in done)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": written,
        "total_tokens": prompts + written,
        "prompt_tokens_details": {"cached_tokens": held},
    }


def metrics(job: Job, result: Result, level: DraftMetrics, draft_length: int) -> dict[str, Any]:
    """Metrics of one answer in vLLM's shape, and what only ttspec has, under `ttspec`."""
    started, first, ended = job.started, job.first_token, job.ended
    assert started is not None
    assert ended is not None
    tokens, stats = len(result.token_ids), result.stats
    first = ended if first is None else first
    wait = (ended - first) / (tokens - 1) if tokens > 1 else None
    figures: dict[str, Any] = {
        "time_to_first_token_ms": _milliseconds(first - started),
        "generation_time_ms": _milliseconds(ended - first),
        "queue_time_ms": _milliseconds(started - job.queued),
        "mean_itl_ms": None if wait is None else _milliseconds(wait),
        "tokens_per_second": round(tokens / (ended - started), 3) if ended > started else None,
        "speculative_decoding": None,
        "ttspec": {
            "seed": stats.seed,
            "rounds": stats.rounds,
            "acceptance_length": stats.acceptance_length,
            "copied_rounds": stats.copied_rounds,
            "copied_tokens": stats.copied_tokens,
            "plain_rounds": stats.plain_rounds,
            "updates": stats.updates,
            "reverts": stats.reverts,
        },
    }
    if level != "none":
        figures["speculative_decoding"] = speculative_decoding(
            result.rounds, draft_length, detailed=level == "detailed"
        )
    return figures


def speculative_decoding(
    rounds: Sequence[Round], most: int, *, detailed: bool = False
) -> dict[str, Any]:
    """Figures of one answer in vLLM's shape. Rounds without drafts are left out, as there.

    `most` tokens are verified in a round besides the pending one; `detailed` adds every round.
    """
    pairs = [(r.proposed, r.accepted) for r in rounds if r.proposed]
    kept, drafted = sum(a for _, a in pairs), sum(p for p, _ in pairs)
    seen = Counter(pairs)
    by_length = {
        str(length): [seen[length, accepted] for accepted in range(length + 1)]
        for length in sorted({p for p, _ in pairs})
    }
    accepted = Counter(a for _, a in pairs)
    figures: dict[str, Any] = {
        "mean_acceptance_length": 1 + kept / len(pairs) if pairs else 0.0,
        "draft_acceptance_rate": kept / drafted if drafted else 0.0,
        "acceptance_histogram": [accepted[i] for i in range(most + 1)],
        "acceptance_histogram_by_draft_length": by_length,
        "num_spec_steps": len(pairs),
        "num_accepted_draft_tokens": kept,
        "num_draft_tokens": drafted,
        "num_spec_tokens": most,
    }
    if detailed:
        figures["per_step_accepted"] = [a for _, a in pairs]
        figures["per_step_drafted"] = [p for p, _ in pairs]
    return figures


def cached_tokens(job: Job, result: Result) -> int:
    """Tokens of its prompt that its row held already."""
    return len(job.ids) - len(result.prompt_ids)


def finish_reason(result: Result) -> str:
    """OpenAI's word."""
    return "stop" if result.finish_reason in ("eos", "stop") else "length"


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)
