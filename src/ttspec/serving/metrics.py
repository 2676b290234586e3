"""What the server counts: for Prometheus, for the page, and for who must wait.

Names are vLLM's where it has them. The engine's thread writes, the event loop reads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from ttspec.records import Chunk
from ttspec.serving import usage

if TYPE_CHECKING:
    from ttspec.serving.jobs import Job

HISTORY = 300
"""Seconds that the page can look back."""
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class ServerMetrics:
    """Counters of one server."""

    def __init__(self, model: str) -> None:
        """Everything is zero. `model` is the label `model_name`."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory and CPU seconds, on Linux
        self._model = model
        self._lock = threading.Lock()
        self._seconds = deque[dict[str, int]](maxlen=HISTORY)
        self._row_seconds = 10.0
        """That an answer has a row, the latest weighing most."""

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            made = kind(name, text, ["model_name", *labels], registry=self.registry, **options)
            return made if labels else made.labels(model_name=model)

        count, gauge = partial(make, Counter), partial(make, Gauge)
        histogram = partial(make, Histogram, buckets=LATENCIES)
        self._running = gauge("vllm:num_requests_running", "Answers that have a row.")
        self._waiting = gauge("vllm:num_requests_waiting", "Answers that wait for a row.")
        self._prompt = count("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = count("vllm:generation_tokens", "Tokens generated.")
        self._asked = count("vllm:prefix_cache_queries", "Tokens of prompts that rows might hold.")
        self._held = count("vllm:prefix_cache_hits", "Tokens of prompts that a row held.")
        self._success = count("vllm:request_success", "Answers that ended.", "finished_reason")
        self._drafts = count("vllm:spec_decode_num_drafts", "Rounds that verified drafts.")
        self._drafted = count("vllm:spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = count("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._at = count(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Rounds that accepted the draft at this position.",
            "position",
        )
        self._first = histogram("vllm:time_to_first_token_seconds", "From request to first token.")
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From request to last token.")
        self.queue_time = histogram("vllm:request_queue_time_seconds", "Waiting for a row.")
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From row to first token.")
        self._decode = histogram("vllm:request_decode_time_seconds", "From first to last token.")
        self._each = histogram(
            "vllm:request_time_per_output_token_seconds",
            "The same, for each token but the first.",
            buckets=EACH,
        )
        self._answers = histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", buckets=SIZES
        )
        self._prompts = histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt.", buckets=SIZES
        )
        self._rounds = count("ttspec:rounds", "Rounds of rows; tokens / rounds is tau.")
        self._of_rounds = count("ttspec:round_tokens", "Tokens that rounds emitted.")
        self._copied = count("ttspec:copied_tokens", "Accepted tokens that rows copied.")
        self._updates = count("ttspec:learn_updates", "Updates of drafters.")
        self.reverts = count("ttspec:learn_reverts", "Drafters given their first weights back.")
        self.failed_rounds = count("ttspec:rounds_failed", "Rounds that failed with their answers.")
        self.cancelled = count("ttspec:requests_cancelled", "Answers whose client went away.")
        self._errors = count("ttspec:request_errors", "Requests answered with an error.", "status")

    def observe_step(self, events: Sequence[tuple[Job, Chunk]], *, shared: bool) -> None:
        """A step of the schedulers gave these; `shared`: all rows of a tenant teach one drafter."""
        chunks = [chunk for _, chunk in events]
        rounds = [chunk.round for chunk in chunks if chunk.round]
        updated = [job for job, chunk in events if chunk.round and chunk.round.updates]
        drafts = [r for r in rounds if r.proposed]
        new = {
            "tokens": sum(len(chunk.token_ids) for chunk in chunks),
            "rounds": len(rounds),
            "round_tokens": sum(r.emitted for r in rounds),
            "copied": sum(r.accepted for r in rounds if r.copied),
            "updates": len({job.tenant for job in updated} if shared else updated),
        }
        self._generated.inc(new["tokens"])
        self._rounds.inc(new["rounds"])
        self._of_rounds.inc(new["round_tokens"])
        self._copied.inc(new["copied"])
        self._updates.inc(new["updates"])
        self._drafts.inc(len(drafts))
        self._drafted.inc(sum(r.proposed for r in drafts))
        self._accepted.inc(sum(r.accepted for r in drafts))
        for position in range(max((r.accepted for r in drafts), default=0)):
            kept = sum(r.accepted > position for r in drafts)
            self._at.labels(model_name=self._model, position=str(position)).inc(kept)
        with self._lock:
            second = int(time.monotonic())  # no clock that somebody may set
            if not self._seconds or self._seconds[-1]["second"] != second:
                self._seconds.append({"second": second, **dict.fromkeys(new, 0)})
            for name, value in new.items():
                self._seconds[-1][name] += value

    def observe_start(self, job: Job) -> None:
        """An answer has its first token, whether or not it ends: its prompt was read."""
        self._prompt.inc(len(job.ids))

    def observe_end(self, job: Job, chunk: Chunk) -> None:
        """An answer ended."""
        result = chunk.result
        assert result is not None
        assert job.ended is not None
        assert job.started is not None
        self._row_seconds += 0.2 * (job.ended - job.started - self._row_seconds)
        reason = usage.finish_reason(result)
        self._success.labels(model_name=self._model, finished_reason=reason).inc()
        self._asked.inc(len(job.ids))
        self._held.inc(usage.cached_tokens(job, result))
        self._whole.observe(job.ended - job.queued)
        if job.first_token is not None:
            self._first.observe(job.first_token - job.queued)
            self._prefill.observe(job.first_token - job.started)
            self._decode.observe(decode := job.ended - job.first_token)
            if (more := len(result.token_ids) - 1) > 0:
                self._each.observe(decode / more)
        self._answers.observe(len(result.token_ids))
        self._prompts.observe(len(job.ids))

    def count_error(self, status: int) -> None:
        """A request was answered with an error."""
        self._errors.labels(model_name=self._model, status=str(status)).inc()

    def retry_after(self, rows: int) -> int:
        """A guess, 1 to 60, of when one more answer may be asked for."""
        return max(1, min(60, round(self._row_seconds / max(rows, 1))))

    def exposition(self, running: int, waiting: int) -> bytes:
        """All of it, for Prometheus."""
        self._running.set(running)
        self._waiting.set(waiting)
        return generate_latest(self.registry)

    def history(self) -> list[dict[str, Any]]:
        """What happened in each of the last seconds in which anything did."""
        with self._lock:
            return [dict(second) for second in self._seconds]
