"""The engine of a server and its schedulers: one for all, or one for each tenant.

There is one, unless all rows teach the same weights (scope shared): then every tenant has its own,
with weights of its own. Used by the engine's thread alone.
"""

from __future__ import annotations

from dataclasses import replace

from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.memory_forecast import USABLE_SHARE, target_cache_bytes
from ttspec.decoding.scheduler import Scheduler
from ttspec.free_memory import free_memory
from ttspec.records import Chunk
from ttspec.serving.keys import ANYBODY
from ttspec.serving.logs import log


class Schedulers:
    """Rows for all tenants, as many for each as fit."""

    def __init__(self, engine: Engine, config: GenerateConfig, rows: int, tenant: str) -> None:
        """Make the rows of one tenant, which are those of all where one scheduler serves all.

        Raises:
            TtspecError: Not even one row fits, or another process keeps what it learns in the
                tenant's folder.
        """
        self.engine, self._config, self.rows = engine, config, rows
        self._by_tenant = config.learn is not None and config.learn.scope == "shared"
        self._of: dict[str | None, Scheduler] = {}
        self._counted_reverts = 0
        decoder = self.of(tenant).decoder
        self.rows, self.slots = decoder.rows.count, decoder.rows.slots
        """Rows of a scheduler, and tokens of a row."""
        self.draft_length = max(decoder.gamma, decoder.copies)
        """Tokens that a round verifies at most, besides the pending one."""

    def of(self, tenant: str) -> Scheduler:
        """Whose rows a tenant's answers have; its own are made when it asks for the first time.

        Raises:
            TtspecError: As `__init__`.
        """
        whose = tenant if self._by_tenant else None
        if whose not in self._of:
            engine, longest = self.engine, 1
            config = replace(self._config, tenant=None if whose == ANYBODY else whose)
            rows = engine.rows_for(config, self.rows, longest, sessions=True)
            decoder = engine.decoder(config, rows, longest, sessions=True)
            decoder.tenant = whose
            self._of[whose] = Scheduler(decoder, config)
            fields = {"tenant": tenant, "rows": rows}
            if decoder.learner and (keeper := decoder.learner.keeper):
                fields |= {"version": keeper.version}  # of what was learned, 0 is none
            log.info("rows made", extra={"event": "rows", "fields": fields})
        return self._of[whose]

    def step(self) -> list[tuple[tuple[Scheduler, int], Chunk]]:
        """A step of each scheduler that has something to do: ((scheduler, request), chunk)."""
        return [
            ((scheduler, request), chunk)
            for scheduler in self._of.values()
            if scheduler.has_unfinished()
            for request, chunk in scheduler.step()
        ]

    def new_reverts(self) -> int:
        """How often drafters got their first weights back since this was asked last."""
        learners = [scheduler.decoder.learner for scheduler in self._of.values()]
        before, now = self._counted_reverts, sum(one.all_reverts for one in learners if one)
        self._counted_reverts = now
        return now - before

    def have_room(self, tokens: int) -> bool:
        """Whether memory is left for one more row of this length.

        A GPU has all rows' from the start.
        """
        target = self.engine.target
        if target.device.type != "cpu" or (free := free_memory(target.device)) is None:
            return True
        need = target_cache_bytes(target.config, 1, min(self.slots, tokens), target.dtype)
        return need is None or need <= USABLE_SHARE * free
