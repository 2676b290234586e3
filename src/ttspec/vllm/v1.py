"""vLLM's V1 model runner: where a step's tensors are, and what is called when.

Replaced are methods of this one runner, and of each only what comes before or after it is new.
"""

from __future__ import annotations

from inspect import signature
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttspec.vllm.hooks import Replaced
from ttspec.vllm.verified import EngineStep

if TYPE_CHECKING:
    from ttspec.vllm.plugin import WorkerLearning


def hooks_of(runner: Any, learning: WorkerLearning) -> list[Replaced]:
    """What lets a runner that has its models tell `learning` of every step."""
    update_states, sample = runner._update_states, runner._sample
    propose = runner.propose_draft_token_ids
    names = list(signature(propose).parameters)

    def may_teach(request: str) -> bool:
        known = runner.requests[request]
        other = bool(known.mm_features) or known.prompt_embeds is not None
        return teaches(known.sampling_params, known.lora_request, other)

    def update_states_and_forget(scheduler_output: Any) -> Any:
        gone = {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}
        gone |= scheduler_output.scheduled_cached_reqs.resumed_req_ids
        if gone:
            learning.run(lambda learner: learner.forget(gone))
        return update_states(scheduler_output)

    def keep_logits_and_sample(logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        drafts = spec_decode_metadata.num_draft_tokens if spec_decode_metadata else []
        if learning.is_reading and any(drafts):
            assert logits is not None
            ids = runner.input_batch.req_ids
            learning.run(lambda learner: learner.keep_logits(ids, drafts, logits))
        return sample(logits, spec_decode_metadata)

    def learn_and_propose(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        metadata = given["spec_decode_metadata"]
        drafts = metadata.num_draft_tokens if metadata else []
        learning.run(lambda learner: learner.absorb(lambda: step(runner, given, drafts)))
        learning.end_step(drafts)
        return propose(*args, **kwargs)

    learning.may_teach = may_teach
    return [
        Replaced(runner, "_update_states", update_states_and_forget),
        Replaced(runner, "_sample", keep_logits_and_sample),
        Replaced(runner, "propose_draft_token_ids", learn_and_propose),
    ]


def step(runner: Any, given: dict[str, Any], drafts: list[int]) -> EngineStep:
    """The step that a runner has just sampled, by what `propose_draft_token_ids` was given."""
    count = runner.input_batch.num_reqs
    ids = list(runner.input_batch.req_ids[:count])
    scheduled = given["scheduler_output"].num_scheduled_tokens
    bounds = [0, *accumulate(scheduled[request] for request in ids)]
    return EngineStep(
        ids=ids,
        bounds=bounds,
        drafts=drafts or [0] * count,
        ends=runner.optimistic_seq_lens_cpu,
        tokens=runner.input_ids.gpu,
        positions=runner._get_positions(bounds[-1]),
        features=given["aux_hidden_states"] or (),
        emitted=(given["sampled_token_ids"] >= 0).sum(1, dtype=torch.int32),
    )


def teaches(sampling: Any, lora: Any, other: bool) -> bool:
    """Whether a request may teach: tokens only, no grammar, no adapter, and it did not refuse.

    Args:
        sampling: Its `SamplingParams`; `"vllm_xargs": {"ttspec": 0}` in the request refuses.
        lora: Its adapter.
        other: Whether its prompt is more than tokens.
    """
    if sampling is None or lora is not None or other:
        return False
    asked = (sampling.extra_args or {}).get("ttspec", True)
    return bool(asked) and sampling.structured_outputs is None
