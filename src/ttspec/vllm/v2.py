"""vLLM's V2 model runner: where a step's tensors are, and what is called when.

Replaced are methods of this one runner, its rejection sampler and a method of its speculator, and
of each only what comes before or after it is new. Steps that only warm up are not looked at.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ttspec.vllm.hooks import Replaced
from ttspec.vllm.v1 import teaches
from ttspec.vllm.verified import EngineStep

if TYPE_CHECKING:
    from ttspec.vllm.plugin import WorkerLearning

WARM_UP = "_"
"""How ids of requests begin that vLLM makes up itself."""


class WatchedSampler:
    """A rejection sampler that shows the logits before it changes them."""

    def __init__(self, sampler: Any, learning: WorkerLearning) -> None:
        """Be `sampler` in all else."""
        self.__dict__.update(sampler=sampler, learning=learning)

    def __call__(self, logits: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample, after the logits were shown."""
        if self.learning.is_reading:
            ids, drafts = input_batch.req_ids, drafts_of(input_batch)
            if any(drafts):
                self.learning.run(lambda learner: learner.keep_logits(ids, drafts, logits))
        return self.sampler(logits, input_batch, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.sampler, name, value)


def hooks_of(runner: Any, learning: WorkerLearning) -> list[Replaced]:
    """What lets a runner that has its models tell `learning` of every step."""
    finish, add, sample = runner.finish_requests, runner.add_requests, runner.sample
    propose = runner.speculator.propose
    names = list(signature(propose).parameters)
    was_sampled = False
    teaching: set[str] = set()
    """Requests that were seen when they came, and may teach."""

    def finish_and_forget(scheduler_output: Any) -> None:
        gone = {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}
        if gone:
            teaching.difference_update(gone)
            learning.run(lambda learner: learner.forget(gone))
        finish(scheduler_output)

    def look_and_add(scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            other = bool(new.mm_features) or new.prompt_embeds is not None
            other = other or new.req_id.startswith(WARM_UP)
            if teaches(new.sampling_params, new.lora_request, other):
                teaching.add(new.req_id)
        add(scheduler_output)

    def sample_and_note(*args: Any, **kwargs: Any) -> Any:
        nonlocal was_sampled
        was_sampled = True
        return sample(*args, **kwargs)

    def learn_and_propose(*args: Any, **kwargs: Any) -> Any:
        nonlocal was_sampled
        if was_sampled:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if not given.get("dummy_run"):
                drafts = drafts_of(given["input_batch"])
                learning.run(lambda learner: learner.absorb(lambda: step(given, drafts)))
                learning.end_step(drafts)
        was_sampled = False
        return propose(*args, **kwargs)

    learning.may_teach = teaching.__contains__
    hooks = [
        Replaced(runner, "finish_requests", finish_and_forget),
        Replaced(runner, "add_requests", look_and_add),
        Replaced(runner, "sample", sample_and_note),
        Replaced(runner.speculator, "propose", learn_and_propose),
    ]
    if (sampler := runner.rejection_sampler) is not None:
        hooks.append(Replaced(runner, "rejection_sampler", WatchedSampler(sampler, learning)))
    return hooks


def drafts_of(batch: Any) -> list[int]:
    """Drafts of each request of an `InputBatch`."""
    per_request = batch.num_draft_tokens_per_req
    return [0] * batch.num_reqs if per_request is None else per_request[: batch.num_reqs].tolist()


def step(given: dict[str, Any], drafts: list[int]) -> EngineStep:
    """The step that was just sampled, by what `propose` was given."""
    batch = given["input_batch"]
    count = batch.num_reqs
    return EngineStep(
        ids=batch.req_ids,
        bounds=batch.query_start_loc_np[: count + 1].tolist(),
        drafts=drafts,
        ends=batch.seq_lens_cpu_upper_bound,
        tokens=batch.input_ids,
        positions=batch.positions,
        features=given["aux_hidden_states"] or (),
        emitted=given["num_sampled"],
    )
