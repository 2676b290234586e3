"""The flags that commands share. They come from the records in `config`; nothing is said twice.

A flag that was not given is None, so that a preset, a command's own default and the target's
`generation_config` can fill it in. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
from cyclopts import Group, Parameter
from cyclopts.validators import Number

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig, Scope
from ttspec.errors import OptionError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine

THREADS = 16
"""Allowed for each processor; more than one is slow already."""
Device = Literal["auto", "cpu", "cuda"]
DeviceMap = Literal["auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
MODELS, TEXT, DRAFTING, LEARNING = map(
    Group.create_ordered, ("Models", "Text", "Drafting", "Learning")
)
"""Headings of the help, below what is a command's own."""
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
"""Without a --no- form."""
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
PositiveOrNone = Annotated[int | None, Parameter(validator=Number(gte=1))]
JsonFlag = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
LearnFlag = Annotated[bool, Parameter(name="--learn", group=LEARNING)]
"""Also --no-learn; `LearnFlags` are the options behind its dot."""
ExportFormat = Annotated[Literal["published", "speculators"], Parameter(name="--format")]


NOTES = {
    "logit_bias": "Added to the score of a token, from -100 to 100, as in --logit-bias.198=-5 or "
    """--logit-bias '{"198": -5, "13": 2}'.""",
    "bad_words_ids": "The same as tokens, as in 11,12,198.",
}
"""Help of flags that are written in another way than in Python."""


def _is_repeatable(kind: Any) -> bool:
    """It takes several values, each with the flag before it: a tuple, or one left out."""
    return get_origin(kind) is tuple or any(map(_is_repeatable, get_args(kind)))


def _flags_of(record: type, *, without: tuple[str, ...] = (), **kinds: Any) -> Any:
    """A twin of an options record in which None means "not given"; its help is the record's.

    Args:
        record: The options.
        without: Those that are no flags.
        **kinds: Types of flags whose field has one that no command line can hold.
    """
    types = get_type_hints(record) | kinds
    notes = {p.arg_name: p.description for p in docstring_parser.parse_from_object(record).params}
    flags = []
    for field in fields(record):
        if field.name in without:
            continue
        note = " ".join((notes[field.name] or "").split())
        note = re.sub(r"(^|\. )None\b", r"\1Left out, it", note)  # which nobody can type
        note = note.replace("None", "left out, it")
        note = NOTES.get(field.name, note)
        if _is_repeatable(types[field.name]):
            note += " Repeatable."
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            note += f" [default: {field.default}]"
        # None here: cyclopts' own, --no-
        no = None if types[field.name] == (bool | None) or field.default is True else ()
        kind = Annotated[types[field.name] | None, Parameter(help=note, negative=no)]
        flags.append((field.name, kind, None))
    return make_dataclass(f"{record.__name__}Flags", flags, frozen=True, kw_only=True)


def options_of(record: Any) -> dict[str, Any]:
    """The fields of a record, as keyword options."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _given(flags: Any) -> dict[str, Any]:
    return {name: value for name, value in options_of(flags).items() if value is not None}


@Parameter(name="--draft", group=DRAFTING)
class DraftFlags(_flags_of(DraftConfig)):
    """`--draft.length` and so on."""

    def config(self) -> DraftConfig:
        """What was given, as a `DraftConfig`."""
        return DraftConfig(**_given(self))


@Parameter(name="--learn", group=LEARNING)
@dataclass(frozen=True, kw_only=True)
class LearnFlags(_flags_of(LearnConfig)):
    """`--learn.stride` and so on."""

    preset: Literal["default", "paper"] = "default"
    """What the other learning options start from: what measured best, or the published recipe."""

    def config(self) -> LearnConfig:
        """The learning options: the preset, changed where the user or the command says so."""
        changes = _given(self)
        start = LearnConfig.paper() if changes.pop("preset") == "paper" else LearnConfig()
        return replace(start, **changes)

    def config_if(self, on: bool) -> LearnConfig | None:
        """The same, or None for a static drafter, which cannot have learning options."""
        if on:
            return self.config()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if changed:
            raise OptionError(
                f"--no-learn was given together with --learn.{changed[0]}.\nDrop one of the two."
            )
        return None


@Parameter(name="--learn", group=LEARNING)
@dataclass(frozen=True, kw_only=True)
class SessionLearnFlags(LearnFlags):
    """The same, for commands that hold a session."""

    scope: Scope = "session"
    """Who learns: each request (a turn), the session, or one drafter for all (shared)."""


@Parameter(name="--learn", group=LEARNING)
@dataclass(frozen=True, kw_only=True)
class ServerLearnFlags(LearnFlags):
    """The same, for a server: who its requests come from decides the default."""

    scope: Scope | None = None
    """Who learns: each request, each session, or one drafter for all (shared). Left out, it is
    shared; with --api-key-file nobody learns unless there is a --learn option."""


@Parameter(name="--learn", group=LEARNING)
@dataclass(frozen=True, kw_only=True)
class SharedLearnFlags(LearnFlags):
    """The same, where one drafter learns from all requests, and nothing else is allowed."""

    scope: Annotated[Scope | None, Parameter(show=False)] = None


@Parameter(name="*", group=TEXT)
class GenerateFlags(
    _flags_of(
        GenerateConfig,
        without=("draft", "learn"),
        logit_bias=dict[str, float],
        bad_words_ids=tuple[str, ...],
    )
):
    """`--temperature` and so on, as they stand at the top level of a command."""

    def options(self) -> dict[str, Any]:
        """What was given, as fields of `GenerateConfig`."""
        given = _given(self)
        try:
            if words := given.get("bad_words_ids"):
                given["bad_words_ids"] = tuple(tuple(map(int, w.split(","))) for w in words)
            if biases := given.get("logit_bias"):
                given["logit_bias"] = {int(token): bias for token, bias in biases.items()}
        except ValueError as error:
            raise OptionError(
                f"--logit-bias or --bad-words-ids names {str(error).rpartition(': ')[2]}, which is "
                "no number of a token.\n"
                "Allowed is as in --logit-bias.198 -5 and --bad-words-ids 11,12,198."
            ) from error
        return given


@Parameter(name="*", group=MODELS)
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which pair of models, and where it runs."""

    target: str = "smollm2-135m"
    """Built-in name, local folder, .gguf file or hub id of the model that defines the output."""
    drafter: str = "auto"
    """Built-in name, local folder or hub id; auto is the target's own, none is plain decoding."""
    device: Device = "auto"
    """Where the models run; auto takes a GPU if there is one."""
    device_map: DeviceMap | None = None
    """auto spreads a target that fits no single GPU over all of them."""
    dtype: Dtype = "auto"
    """Number format; auto is bfloat16 where the hardware has it, else float32."""
    compile: Annotated[bool, Parameter(negative=())] = False
    """On a GPU, compile the models when they first run: one or two minutes, then a round takes a
    third less time."""
    threads: PositiveOrNone = None
    """CPU threads; left out, torch decides."""

    def load(self, notify: Callable[[str], None] | None = None) -> Engine:
        """Load the pair. This is where torch is imported."""
        self.set_up()
        import ttspec
        from ttspec.heap import freeze_heap

        engine = ttspec.load(
            self.target,
            None if self.drafter == "none" else self.drafter,
            device=self.device,
            device_map=self.device_map,
            dtype=self.dtype,
            compile=self.compile,
            notify=notify,
        )
        freeze_heap()
        return engine

    def set_up(self) -> None:
        """Quiet libraries, and the threads that were asked for."""
        most = THREADS * (os.cpu_count() or 1)
        if (self.threads or 0) > most:  # more than the system gives end the process
            raise OptionError(f"--threads is {self.threads}; allowed is 1 to {most} here.")
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if self.threads is not None:
            torch.set_num_threads(self.threads)


@Parameter(name="*", group=MODELS)
@dataclass(frozen=True, kw_only=True)
class ExactModelFlags(ModelFlags):
    """The same, for commands that compare tokens."""

    dtype: Dtype = "float32"
    """Number format; only float32 promises the same tokens."""
