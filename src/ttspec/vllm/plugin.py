"""One worker of vLLM: whether it learns, its learner, and what happens when something fails.

A worker is asked once, when it has made its model runner. Without `"ttspec"` in the engine's
`additional_config`, or where something does not fit, nothing is wrapped and vLLM is what it is.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttspec.decoding.loading import dtype_of
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter
from ttspec.errors import TtspecError
from ttspec.learning.keeper import tenants_weights
from ttspec.learning.live_weights import resolve_learn_config
from ttspec.vllm import hooks, status, v1, v2
from ttspec.vllm.capturing import capture_when_warm, failure_of
from ttspec.vllm.drafting import LiveDrafter
from ttspec.vllm.kept import known_target
from ttspec.vllm.module import learned_names
from ttspec.vllm.packing import keep_matrices
from ttspec.vllm.settings import Settings, status_file
from ttspec.vllm.steps import EngineLearner, rounds_an_update


def _folder(model: Any) -> Path:
    """Where the files of a `ModelConfig` are, which vLLM has loaded or is about to load."""
    folder = Path(model.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(folder), revision=model.revision, local_files_only=True))


def attach(worker: Any, given: Any) -> None:
    """Let a worker learn if all fits; else say why not, in one line."""
    worker.ttspec = learning = WorkerLearning(worker)
    if failed := failure_of(lambda: learning.prepare(given)):
        learning.stop(failed, said=learning.rank == 0)  # all ranks find the same


class WorkerLearning:
    """A worker's learning: off, paused, or under way."""

    learner: EngineLearner | None = None
    """On the rank that learns."""
    drafter: Drafter

    def __init__(self, worker: Any) -> None:
        from vllm.distributed import get_tp_group  # type: ignore[import-not-found]
        from vllm.logger import init_logger  # type: ignore[import-not-found]

        self.log, self.group = init_logger("vllm.ttspec"), get_tp_group()
        self.worker, self.runner, self.config = worker, worker.model_runner, worker.vllm_config
        self.rank: int = self.group.rank_in_group
        self.state, self.reason = "off", ""
        self._all_learn = self._sends = False
        """Whether several ranks share weights, and whether they do so now."""
        self._hooks: list[hooks.Replaced] = []
        """Those in place: none while steps are of no interest."""
        self._status_written = 0.0
        self._warned = False

    def prepare(self, given: Any) -> None:
        """Check what all ranks find alike, and wait for the models.

        Raises:
            TtspecError: Something does not fit.
        """
        homes = {kind.__module__ for kind in type(self.runner).__mro__}
        is_v2 = "vllm.v1.worker.gpu.model_runner" in homes
        if reason := hooks.unfit_engine(self.config, "V2" if is_v2 else "V1"):
            raise TtspecError(reason)
        self.settings = Settings.of(given).for_engine(
            requests=self.config.scheduler_config.max_num_seqs,
            longest=self.config.model_config.max_model_len,
        )
        if self.runner.device.type == "cpu":
            keep_matrices(self.runner.speculator if is_v2 else self.runner.drafter)
        self._hooks_of = v2.hooks_of if is_v2 else v1.hooks_of
        load_model = self.runner.load_model

        def load_then_learn(*args: Any, **kwargs: Any) -> None:
            load_model(*args, **kwargs)
            for part in (self._read_drafter, self._bind, self._hook):
                failed = failure_of(part)
                first = self._first_failing(bool(failed))  # all ask: else some would wait for ever
                if first is not None:
                    return self.stop(failed or "another rank does not", said=first == self.rank)
            self._sends = self._all_learn = self.group.world_size > 1
            self.state = "learning"
            capture_when_warm(self)
            return None

        self.runner.load_model = load_then_learn

    def _read_drafter(self) -> None:
        """The drafter's own files, as vLLM has just loaded them."""
        self.source = _folder(self.config.speculative_config.draft_model_config)
        self.drafter = load_drafter(self.source.name, self.source)

    def _bind(self) -> None:
        """Take all memory now; on the rank that learns, bind its own drafter to the target."""
        model, text = self.runner.get_model(), self.config.model_config.hf_text_config
        if not hasattr(getattr(model, "model", None), "embed_tokens"):
            raise TtspecError(
                f"{type(model).__name__} has its embedding elsewhere than text models"
            )
        dtype = self.config.model_config.dtype
        if self.runner.device.type == "cpu" and dtype == torch.float32:
            dtype = dtype_of("auto", self.runner.device)  # an update takes less than half as long
        embedding = self._gathered(model.model.embed_tokens.weight, text.vocab_size).to(dtype)
        tied = getattr(text, "tie_word_embeddings", False) or not hasattr(model, "lm_head")
        head = embedding if tied else self._gathered(model.lm_head.weight, text.vocab_size)
        self.drafter.embedding = embedding[:0]
        learn = resolve_learn_config(self.settings.learn, self.drafter, 1)
        first = {n: self.drafter.weights[n] for n in learned_names(self.drafter, learn)}
        draft_model, like = self.runner.get_draft_model(), self.drafter.embedding
        self.live = LiveDrafter(draft_model, first, like, self.group, rounds_an_update(learn))
        if self.rank == 0:
            self.drafter.bind(embedding, head.to(dtype), int(text.num_hidden_layers))
            self._make_learner(tied=tied)

    def _make_learner(self, *, tied: bool) -> None:
        engine = self.config.parallel_config.data_parallel_rank
        live = tenants_weights(
            self.settings.learn,
            self.drafter,
            lambda: known_target(_folder(self.config.model_config), tied=tied),
            f"engine-{engine}" if engine else None,
            self.log.info,
        )
        self.learner = EngineLearner(
            self.settings,
            self.drafter,
            int(self.config.speculative_config.num_speculative_tokens),
            self.live.publish,
            live=live,
            may_teach=lambda request: self.may_teach(request),
        )
        if live.keeper:
            self.live.publish(self.learner.shared)
        self._close_with_worker()
        self.log.info(
            "ttspec learns: %s drafter %s%s, taps %s, %d requests at a time, %.0f MB",
            self.drafter.kind,
            self.source.name,
            f" from version {kept.version}" if (kept := live.keeper) and kept.version else "",
            list(self.drafter.taps) or "none",
            self.settings.rows,
            self.learner.nbytes / 1e6,
        )
        atexit.register(status_file(self.config).unlink, missing_ok=True)

    def _close_with_worker(self) -> None:
        """Let what is to be written be written when the worker ends in an orderly way."""
        shutdown = self.worker.shutdown

        def close_and_shutdown(*args: Any, **kwargs: Any) -> None:
            self._close()
            shutdown(*args, **kwargs)

        self.worker.shutdown = close_and_shutdown

    def _close(self) -> None:
        if self.learner is None or (keeper := self.learner.shared.keeper) is None:
            return
        try:
            self.learner.finish()
            with torch.inference_mode(False), torch.no_grad():
                keeper.close()
        except Exception as error:
            self.log.warning("ttspec kept nothing at the end: %s", " ".join(str(error).split()))

    def _first_failing(self, here: bool) -> int | None:
        """The first rank on which something failed; None if it did on none."""
        failed = torch.zeros(self.group.world_size, device=self.runner.device)
        failed[self.rank] = here
        failed = self.group.all_reduce(failed)
        return int(failed.argmax()) if failed.any() else None

    def _gathered(self, weight: Tensor, vocabulary: int) -> Tensor:
        """A table of the target, of which every rank has a part."""
        return self.group.all_gather(weight.detach(), dim=0)[:vocabulary]

    def _hook(self) -> None:
        """Let vLLM tell of its steps."""
        self._hooks = self._hooks_of(self.runner, self)
        for hook in self._hooks:
            hook.replace()

    def _unhook(self) -> None:
        """Leave vLLM as it is without ttspec, where steps are of no interest any more."""
        if not self._sends:
            for hook in self._hooks:
                hook.put_back()
            self._hooks = []

    # Called by the hooks.

    may_teach: Callable[[str], bool]
    """Set by the model runner's front end."""

    @property
    def is_reading(self) -> bool:
        """Whether logits of the step are of interest."""
        return self.learner is not None and self.learner.is_reading and self.state == "learning"

    def run(self, work: Callable[[EngineLearner], None]) -> None:
        """Do some of learning's work; a failure ends learning and nothing else."""
        if self.state != "learning" or self.learner is None:
            return
        try:
            work(self.learner)
        except Exception as error:
            self.stop(f"{type(error).__name__}: {error}")
            self.log.debug("ttspec failed", exc_info=True)

    def end_step(self, drafts: Sequence[int]) -> None:
        """A step with so many drafts of each request was read: other ranks, and figures."""
        if self._sends:
            # Of no more requests than are read: an update counts theirs.
            rounds = min(self.settings.rows, sum(count > 0 for count in drafts))
            if self.live.count_rounds(rounds):
                self._send()
        now = time.monotonic()
        if self.rank == 0 and now - self._status_written > status.EVERY:
            self._status_written = now
            figures = self.write_status()
            if figures and self.learner and not self._warned and status.is_never_accepted(figures):
                self.run(lambda learner: self._warn(learner, figures))

    def _send(self) -> None:
        """Give every rank what rank 0 has, at a step that all of them count."""
        with torch.inference_mode(False):
            try:
                self.live.send()
            except Exception as error:  # the other ranks go on sending, and so must this one
                self.stop(f"{type(error).__name__}: {error}")

    # Asked by an operator.

    def stop(self, reason: str, *, said: bool = True) -> None:
        """Learn no more; what was learned stays. One line says why, unless another rank says it."""
        self.state, self.reason = "off", " ".join(reason.split())
        self._unhook()
        if said:
            self.log.warning("ttspec does not learn: %s", self.reason)
        self.write_status()

    def pause(self) -> None:
        """Learn nothing until `resume`; the weights stay as they are. All ranks are asked."""
        self._sends = False
        self.run(lambda learner: learner.forget_all())
        self._unhook()
        if self.state == "learning":
            self.state = "paused"
            self.write_status()

    def resume(self) -> None:
        """Go on learning; V2 does not know requests that were under way: new ones teach."""
        self._sends = self._all_learn
        if self.state == "paused":
            self.state = "learning"
            self.write_status()
        if not self._hooks and (self.state == "learning" or self._sends):
            self._hook()

    def revert(self) -> None:
        """Give the drafter back the weights that it came with. All ranks are asked."""
        if self.learner:
            with torch.inference_mode(False), torch.no_grad():
                self.learner.finish()
                self.learner.shared.revert()
                self.live.publish(self.learner.shared)
        if self._all_learn:
            self._send()

    def status(self) -> dict[str, Any]:
        """What an operator wants to know; plain values."""
        found: dict[str, Any] = {"state": self.state, "reason": self.reason, "rank": self.rank}
        if self.learner:
            found |= status.figures(self.learner)
        return found

    def write_status(self) -> dict[str, Any] | None:
        """Leave the figures where the API server's /metrics finds them; best effort."""
        found = None
        if self.rank:
            return found
        try:
            found = self.status()
            status.write(status_file(self.config), found)
        except Exception as error:  # a step must not end by it
            self.log.debug("ttspec wrote no figures: %s", error)
        return found

    def _warn(self, learner: EngineLearner, figures: dict[str, Any]) -> None:
        """Say once that no draft is ever accepted, and why."""
        with torch.inference_mode(False):
            expected = learner.shared.expected_drafts()
        if expected is not None:
            self._warned = True
            self.log.warning("ttspec: %s", status.why_never_accepted(figures, expected))
