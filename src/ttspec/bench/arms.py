"""Arms by name: `static-window[window=256]`, `learn[stride=4,drafter=FOLDER]`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ttspec.config import DraftConfig, LearnConfig
from ttspec.errors import OptionError

WINDOW = REBASE = 512
"""What static-window and static-rebased mean without options: what measured best."""
FIXED_RECIPE: dict[str, Any] = {"copy": False, "adaptive": False}
"""The drafter alone, in every round."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"length": 0},
    "ngram": {},
    "static": FIXED_RECIPE | {"context": "whole"},
    "static-window": FIXED_RECIPE | {"window": WINDOW},
    "static-rebased": FIXED_RECIPE | {"rebase": REBASE},
    "static-copy": {"adaptive": False},
    "learn": FIXED_RECIPE | {"scope": "request", "context": "whole"},
    "learn-session": FIXED_RECIPE | {"scope": "session", "context": "whole"},
    "learn-shared": FIXED_RECIPE | {"scope": "shared", "context": "whole"},
    "default": {"scope": "session"},
}
FIXED = ("scope",)
"""Options that the arm's name says."""
_ARM = re.compile(r"^(?P<kind>[a-z-]+)(?:\[(?P<options>[^\[\]]*)\])?$")
_COMMA = re.compile(r",(?![^\[]*\])")  # not inside brackets


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSpec:
    """One way of decoding: its name, as the user wrote it, and what it means."""

    name: str
    kind: str
    draft: DraftConfig
    learn: LearnConfig | None
    drafter: str | None = None
    """A drafter of its own, by name; None is the run's."""

    @property
    def drafts(self) -> bool:
        """It needs the drafter that was loaded."""
        return self.kind not in ("plain", "ngram")

    def options(self) -> dict[str, Any]:
        """What the name means in this version, as JSON values."""
        learn = asdict(self.learn) if self.learn else None
        meaning: dict[str, Any] = {"draft": asdict(self.draft), "learn": learn}
        return meaning | ({"drafter": self.drafter} if self.drafter else {})


def parse_arms(text: str) -> list[ArmSpec]:
    """The arms of a list such as `plain,static,learn[stride=4,lr=3e-5]`.

    Raises:
        OptionError: An arm or one of its options does not exist, or an arm is named twice.
    """
    names = [name.strip() for name in _COMMA.split(text) if name.strip()]
    if not names:
        raise OptionError(f"--arms names no arm; arms are {', '.join(KINDS)}.\n{_EXAMPLE}")
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"--arms names {name} twice.\nName each arm once.")
    return [_parse(name) for name in names]


def _parse(name: str) -> ArmSpec:
    found = _ARM.match(name)
    kind = found["kind"] if found else name
    if not found or kind not in KINDS:
        raise OptionError(f"{name} is no arm; arms are {', '.join(KINDS)}.\n{_EXAMPLE}")
    draft, learn = (
        {f.name: get_type_hints(record)[f.name] for f in fields(record)}
        for record in (DraftConfig, LearnConfig)
    )
    learns = "scope" in KINDS[kind]
    allowed = {} if kind == "plain" else draft
    allowed = allowed | (learn if learns else {})
    allowed = {n: t for n, t in allowed.items() if n not in FIXED}
    if kind not in ("plain", "ngram"):
        allowed["drafter"] = str
    given = dict(KINDS[kind])
    for part in filter(None, (found["options"] or "").split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in allowed:
            options = ", ".join(allowed) or "none"
            near = get_close_matches(key, allowed, n=1)
            advice = f"Is {near[0]} meant? {_EXAMPLE}" if near else _EXAMPLE
            raise OptionError(f"{key} is no option of {kind}; options are {options}.\n{advice}")
        given[key] = _value(f"{kind}[{key}]", value, allowed[key])
    drafter = given.pop("drafter", None)
    return ArmSpec(
        name=name,
        kind=kind,
        draft=DraftConfig(**{n: v for n, v in given.items() if n in draft}),
        learn=LearnConfig(**{n: v for n, v in given.items() if n in learn}) if learns else None,
        drafter=drafter,
    )


def _value(name: str, text: str, hint: Any) -> Any:
    """An option's value from its text, by the field's type."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind: Any = next(k for k in kinds if k is not NoneType)
    words = {
        str(word).lower(): word for word in ((True, False) if kind is bool else get_args(kind))
    }
    if words:
        if text in words:
            return words[text]
        raise OptionError(f"{name} is {text!r}; allowed are {', '.join(words)}.")
    try:
        return kind(text)
    except ValueError as error:
        number = "a whole number" if kind is int else "a number"
        raise OptionError(f"{name} is {text!r}; allowed is {number}.") from error


_EXAMPLE = "Options stand in brackets, as in learn[stride=4,lr=3e-5] or static-window[window=256]."
