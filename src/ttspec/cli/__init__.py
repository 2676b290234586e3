"""The `ttspec` command: which commands there are, and how errors become exit codes.

Commands are named by import path, and a command imports torch when it runs, so that help and
complaints about arguments come at once. Each command is a file of its name. They share options.py
(flags, made of the records in `config`), terminal.py (notices, streams), progress.py (`bench`) and
saving.py (`--save-drafter`); demo_turns.py is the demo's.
"""

import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError, convert

from ttspec.errors import ResourceError, TrainingError, TtspecError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
TAKEN = (errno.EEXIST, errno.ENOTDIR)
ADVICE: dict[int | None, str] = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there, or name another place."
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "Allow writing there, or name another place."
    ),
    **dict.fromkeys(TAKEN, "Name a folder; this is a file."),
}
"""What to do about an error of the system."""

COMMANDS = {
    "demo": "Show what drafting, copying and learning do: one session in four ways.",
    "generate": "Answer one prompt.",
    "chat": "Talk with the target; the drafter learns over the whole conversation.",
    "serve": "Serve OpenAI's API from this machine, with a page to chat and to look on.",
    "check": "Check that a drafter, learning or not, changes no token of the target's own text.",
    "doctor": "Say what is loaded, from where, what it needs, and whether the drafter fits.",
    "bench": "Measure arms on a suite of requests, report, compare.",
    "train": "Build a drafter for a target.",
    "adapt": "Let a drafter learn offline from recorded traffic.",
    "learned": "List, show, export and revert what --learn.keep has written.",
    "export": "Write a drafter for vLLM and other tools.",
    "vllm": "Learn inside vLLM: check what fits.",
}
GROUPS = ("bench", "learned", "vllm")


def _version() -> str:
    try:
        return version("ttspec")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _convert(kind: Any, tokens: Any) -> Any:
    """What cyclopts makes of an option's text; alone it would round 1.5 to a whole number."""
    for token in tokens if _is_whole(kind) else ():
        try:
            int(token.value)
        except ValueError:
            message = f"{token.value!r} was given; allowed is a whole number."
            raise ValueError(message) from None
    return convert(kind, tokens)


def _is_whole(kind: Any) -> bool:
    """It is a type of whole numbers: int, int | None, tuple[int, ...] and so on."""
    return kind is int or any(map(_is_whole, get_args(kind)))


app = App(
    name="ttspec",
    version=_version,
    help="Speculative decoding whose drafter learns while it generates.",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(converter=_convert),
    help_format="plaintext",  # the list of commands comes at once, without a renderer
)
for _name, _help in COMMANDS.items():
    # Those with commands of their own say so themselves.
    _format: dict[str, Any] = {} if _name in GROUPS else {"help_format": "markdown"}
    app.command(f"ttspec.cli.{_name}:{_name}", name=_name, help=_help, **_format)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is 0, 1, 2 or 130, as the errors below say."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    _quieten_libraries()
    _show_what_can_be_shown()
    try:
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except UnusedCliTokensError as error:
        words, command = " ".join(error.unused_tokens or ()), app.parse_commands(tokens)[0]
        return _complain(
            f"{words!r} was given beside what the command takes.\nPut a text of several words in "
            "quotes; repeat an option that takes several values (--stop A --stop B). Try: "
            f"{' '.join(['ttspec', *command])} --help",
            WRONG_INPUT,
        )
    except CycloptsError as error:
        advice = f"Try: {' '.join(['ttspec', *app.parse_commands(tokens)[0]])} --help"
        return _complain(f"{error}\n{advice}", WRONG_INPUT)
    except TtspecError as error:
        failed = isinstance(error, ResourceError | TrainingError)
        return _complain(str(error), FAILED if failed else WRONG_INPUT)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has had enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ImportError as error:
        if error.__cause__ is None:
            raise
        first: BaseException = error  # transformers says no more than that there was one
        while first.__cause__:
            first = first.__cause__
        return _complain(
            f"A package that is installed here cannot be imported: {first}.\nInstall a build of it "
            "that fits the others (`pip check`), or remove it.",
            FAILED,
        )
    except OSError as error:
        code = WRONG_INPUT if error.errno in TAKEN else FAILED
        where = f"{error.filename}: " if error.filename else ""
        advice = ADVICE.get(error.errno, "")
        if code == WRONG_INPUT and error.filename and Path(error.filename).is_symlink():
            advice = "Name another place; this is a link that leads to no folder."
        return _complain(f"{where}{error.strerror or error}\n{advice}", code)


def _complain(message: str, code: int) -> int:
    """Print a message in at most two lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unknown error"]
    print("ttspec: error: " + lines[0], *lines[1:2], sep="\n", file=sys.stderr)
    return code


def _show_what_can_be_shown() -> None:
    """Let no character end a command that a terminal or a pipe cannot encode: it becomes a `?`.

    Where a stream was closed before the start, as by `>&-`, what is said goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _quieten_libraries() -> None:
    """Keep the chatter of the libraries below off the user's screen."""
    for name, value in {
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
