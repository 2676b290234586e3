"""What an operator can set: `--additional-config '{"ttspec": {"share": 0.05}}'`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ttspec.config import LearnConfig
from ttspec.errors import OptionError

FOR_ALL = (
    ("scope", "shared", "vLLM has one drafter for all requests"),
    ("supervision", "hindsight", "it learns from what was committed"),
)
"""Fields of `LearnConfig` that have one value here, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server learns."""

    rows: int = 8
    """Requests that are read at the same time, at most; the others are served all the same."""
    tokens: int = 4096
    """Tokens of a request after which it teaches no more."""
    share: float = 0.06
    """Of the time in which the engine works, at most so much goes into learning: as much as in
    ttspec's own engine at first."""
    learn: LearnConfig = field(default_factory=lambda: LearnConfig(scope="shared"))
    """How; one drafter learns from all requests. With `keep`, a folder, versions stay on disk."""

    @classmethod
    def of(cls, given: Mapping[str, Any] | Any) -> Settings:
        """Read the table that the engine was started with; True is an empty one.

        Raises:
            OptionError: It is no table, a key is unknown, or a value is not allowed.
        """
        given = {} if given is True else given
        if not isinstance(given, Mapping):
            raise OptionError(f"ttspec is {given!r}; allowed is a table of settings, such as {{}}.")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"ttspec.{name} is no setting; settings are {', '.join(known)}.")
        chosen = dict(given)
        learn = {} if chosen.get("learn") is None else chosen["learn"]
        if not isinstance(learn, Mapping):
            raise OptionError(
                f"ttspec.learn is {learn!r}; allowed is a table of LearnConfig.\n"
                "A server that shall not learn is one without ttspec in additional-config."
            )
        chosen["learn"] = LearnConfig(**{"scope": "shared", **learn})
        for name, must_be, why in FOR_ALL:
            if (value := getattr(chosen["learn"], name)) != must_be:
                raise OptionError(f"ttspec.learn.{name} is {value!r}; allowed is {must_be}: {why}.")
        settings = cls(**chosen)
        for name, least in (("rows", 1), ("tokens", 64)):
            value = getattr(settings, name)
            if type(value) is not int or value < least:
                raise OptionError(f"ttspec.{name} is {value!r}; allowed is {least} or more.")
        if type(settings.share) not in (int, float) or not 0 < settings.share <= 1:
            raise OptionError(f"ttspec.share is {settings.share!r}; allowed is above 0, at most 1.")
        return settings

    def for_engine(self, requests: int, longest: int) -> Settings:
        """The same, with no more rows and tokens than an engine has at all."""
        return replace(self, rows=min(self.rows, requests), tokens=min(self.tokens, longest))


def status_file(config: Any) -> Path:
    """Where the figures of an engine are, which all its processes know."""
    rank = config.parallel_config.data_parallel_rank
    return Path(tempfile.gettempdir()) / f"ttspec-{config.instance_id}-{rank}.json"
