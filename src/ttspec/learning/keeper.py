"""Keeps what all requests taught: begins at the newest version on disk, and writes better ones.

A version is written only if held-out blocks find that it drafts no worse than the anchor weights,
and no worse than the version before it. Judging and copying to the host happen between rounds;
files are written beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.errors import OptionError
from ttspec.learning.delta import Delta, delta_metadata, difference
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.memory_trainer import MemoryTrainer
from ttspec.learning.version_writer import VersionWriter
from ttspec.learning.versions import ANCHOR, Version, VersionStore, place_of

SECONDS = 60.0
"""Between two tries to make a version."""
LEAST_BLOCKS = 16
"""Held-out blocks without which nothing can be said."""
MOST_PAGES = 32
"""Held-out pages that judge."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Expected accepted drafts a block, of three sets of weights on the same held-out blocks."""

    blocks: int
    live: float = 0.0
    anchor: float = 0.0
    before: float = 0.0
    """Of the version before; the anchor's where there is none."""

    @property
    def is_kept(self) -> bool:
        """Whether there is enough to go by, and the live weights are behind neither."""
        return self.blocks >= LEAST_BLOCKS and self.live >= max(self.anchor, self.before)


def tenants_weights(
    learn: LearnConfig,
    drafter: Drafter,
    target: Callable[[], Mapping[str, str]],
    tenant: str | None,
    notify: Callable[[str], None] | None,
) -> LiveWeights:
    """Weights that all requests of a tenant teach; of the newest version where `learn.keep` is set.

    Args:
        learn: How, in scope shared.
        drafter: Has the anchor weights.
        target: Tells the target's `name` and `sha256`; asked only where something is kept.
        tenant: Whose requests teach.
        notify: Told what a user should know.

    Raises:
        ResourceError: Another process keeps what it learns in the same folder.
        OptionError, CheckpointError: What is there does not fit.
    """
    live = LiveWeights(learn, drafter, 1)
    if learn.keep:
        root = Path(learn.keep).expanduser()
        live.keeper = Keeper(root, drafter, live, target=target(), tenant=tenant, notify=notify)
    return live


class Keeper:
    """What connects weights that learn with a store of versions of them."""

    memory_trainer: MemoryTrainer | None = None
    """Has what is held out; a learner's, once there is one."""

    def __init__(
        self,
        root: Path,
        drafter: Drafter,
        live: LiveWeights,
        *,
        target: Mapping[str, str],
        tenant: str | None,
        notify: Callable[[str], None] | None,
    ) -> None:
        """Begin at the newest version.

        `root` is the user's folder, for all pairs and tenants.

        Raises:
            ResourceError: Another process has the pair's folder, or it cannot be made.
            OptionError: The newest version is of weights that do not learn here.
            CheckpointError: It is of another drafter.
        """
        self.drafter, self.live = drafter, live
        self._metadata = delta_metadata(drafter, live.config)
        place = place_of(root, target["sha256"], self._metadata["sha256"], tenant)
        self.store = VersionStore(place, notify=notify)
        self.writer = VersionWriter(notify)
        self.updates = self.requests = self.refused = 0
        """Since the process began: updates, requests that taught, and what was found worse."""
        self.evaluation = Evaluation(0)
        """The last one."""
        self._notify = notify
        known = {name: self._metadata[name] for name in ("kind", "drafter")}
        self._facts: dict[str, Any] = {"target": dict(target), "tenant": tenant, **known}
        # On the host: another thread may not touch a GPU while graphs are captured.
        self._anchor = {n: w.to("cpu") for n, w in live.anchor.items()}
        self._news, self._tried = False, time.monotonic()
        self.version = ANCHOR
        """The newest one: the one that was begun at, or the last one written."""
        try:
            if found := self.store.current():
                self._begin_at(*found)
        except BaseException:
            self.store.close()
            raise
        self._before = self._drafting()

    def note(self, updated: Sequence[bool], updates: Sequence[int]) -> None:
        """An update is over; now and then, make a version.

        Args:
            updated: Rows that it taught.
            updates: How many each request had so far, this one among them.
        """
        if not any(updated) or not self.store.is_open:
            return
        self._news = True
        self.updates += 1
        self.requests += sum(had and n == 1 for had, n in zip(updated, updates, strict=True))
        if time.monotonic() - self._tried >= SECONDS:
            self.make_version()

    def make_version(self) -> bool:
        """Judge what was learned and have it written, unless it is worse; says whether it is."""
        self._tried = time.monotonic()
        if not (self._news or self.writer.failed):
            return False
        self.evaluation = self._evaluate()
        if not self.evaluation.is_kept:
            self.refused += self.evaluation.blocks >= LEAST_BLOCKS
            return False
        self._news, self._before = False, self._drafting()
        learned = {n: w[0].to("cpu", copy=True) for n, w in self.live.learned.items()}
        facts = {
            **self._facts,
            "updates": self.updates,
            "requests": self.requests,
            "refused": self.refused,
            "held_out": {
                "blocks": self.evaluation.blocks,
                "accepted": {
                    "version": round(self.evaluation.live, 4),
                    "anchor": round(self.evaluation.anchor, 4),
                    "before": round(self.evaluation.before, 4),
                },
            },
        }
        self.writer.submit(lambda: self._write(learned, facts))
        return True

    def close(self) -> bool:
        """Keep what is worth it, wait until it is written, and let others have the folder.

        Returns:
            False where the disk did not take it.
        """
        if not self.store.is_open:
            return True
        why_not = None
        try:
            self.writer.flush()
            if (self._news or self.writer.failed) and not self.make_version():
                why_not = self._why_not()
            elif not self.updates:
                why_not = "there was no update"
            self.writer.close()
        finally:
            self.store.close()
        if self.writer.failed:
            why_not = "it could not be written"
        if why_not and self._notify:
            what = "What was learned last is not kept" if self.updates else "Nothing new is kept"
            self._notify(f"{what} in {self.store.folder}: {why_not}.")
        return not self.writer.failed

    def _begin_at(self, version: Version, delta: Delta) -> None:
        delta.require(self.drafter)
        config = self.live.config
        start = delta.start(self.drafter, config)
        if start is None:
            raise OptionError(
                f"{version.path} is a change of other weights than learn.weights "
                f"{config.weights}, learn.rank {config.rank} and learn.parameters "
                f"{config.parameters} name.\nGive the options that it was learned with "
                "(ttspec learned show), or another folder."
            )
        self.live.start_from(start)
        self.version = version.number

    def _drafting(self) -> dict[str, Tensor]:
        """A copy of what was learned, as it drafts."""
        return {name: weight.detach().clone() for name, weight in self.live.averaged().items()}

    def _evaluate(self) -> Evaluation:
        """Score the live weights, and those they are compared with."""
        if self.memory_trainer is None:
            return Evaluation(0)
        sets = {"live": self.live.averaged(), "before": self._before, "anchor": {}}
        blocks, drafts = self.memory_trainer.evaluate(sets, MOST_PAGES)
        return Evaluation(blocks, **drafts)

    def _write(self, learned: dict[str, Tensor], facts: Mapping[str, Any]) -> Version:
        """On the writer's thread: what was learned, as a change of the anchor weights."""
        full = self.live.config.weights == "full"
        changes = difference(learned, self._anchor) if full else learned
        tensors = {name: change.contiguous() for name, change in changes.items()}
        version = self.store.write(tensors, self._metadata, {**facts, "parent": self.version})
        self.version = version.number
        return version

    def _why_not(self) -> str:
        found = self.evaluation
        if found.blocks < LEAST_BLOCKS:
            length = f" of {self.memory_trainer.length} drafts" if self.memory_trainer else ""
            return (
                f"{found.blocks} blocks{length} were held out, and {LEAST_BLOCKS} are needed to "
                "judge it; shorter answers have none"
            )
        return (
            f"it drafts {found.live:.3f} accepted tokens on {found.blocks} held-out blocks, "
            f"the version before {found.before:.3f}, the anchor {found.anchor:.3f}"
        )
