"""`ttspec serve`: an OpenAI server for one machine, whose drafter learns."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ttspec.cli.options import DraftFlags, LearnFlag, ModelFlags, ServerLearnFlags
from ttspec.cli.terminal import say
from ttspec.config import GenerateConfig
from ttspec.errors import OptionError, ResourceError
from ttspec.serving.options import ServeOptions

NEEDED = "fastapi, uvicorn, llguidance and prometheus-client"


def serve(
    target: str | None = None,
    /,
    *,
    models: ModelFlags = ModelFlags(),
    serving: Annotated[ServeOptions, Parameter(name="*")] = ServeOptions(),
    draft: DraftFlags = DraftFlags(),
    learn: LearnFlag = True,
    learning: ServerLearnFlags = ServerLearnFlags(),
    add_key: str | None = None,
) -> int:
    """Serve a target to clients of OpenAI's API; the page at / lets one chat and look on.

    Parameters
    ----------
    target
        The same as --target.
    learn
        Whether the drafter learns while it generates: from all requests. With --api-key-file, where
        keys are tenants, it learns only if a --learn option says how.
    add_key
        Draw a key for this name, add its hash to --api-key-file, show the key once, and end.
    """
    if add_key is not None:
        return _add_key(serving.api_key_file, add_key)
    if target is not None:
        models = replace(models, target=target)
    serving.require_keys()
    if learn and learning.scope is None:
        if serving.api_key_file is None:  # everybody is one tenant
            learning = replace(learning, scope="shared")
        else:
            learn = learning != ServerLearnFlags()
    config = GenerateConfig(
        context=serving.context,
        max_new_tokens=1,  # a request says how many, or has what room there is
        draft=draft.config(),
        learn=learning.config_if(learn),
    )
    try:
        from ttspec.serving.logs import logs_on_stderr
        from ttspec.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"ttspec serve needs {NEEDED}; {error.name} is missing.\n"
            "Install them with: pip install 'ttspec[serve]'"
        ) from error
    is_path = Path(models.target).exists()  # which is nobody's business
    name = serving.served_model_name or (Path(models.target).name if is_path else models.target)
    with logs_on_stderr():
        return run(lambda: models.load(notify=_show), config, serving, name, _show)


def _show(line: str) -> None:
    """For people; standard error has the log. Nobody may read it, and a disk may be full."""
    with suppress(OSError):
        print(line, flush=True)


def _add_key(path: Path | None, name: str) -> int:
    from ttspec.serving.keys import add_key

    if path is None:
        raise OptionError("--add-key was given without --api-key-file.\nName the file of keys.")
    print(add_key(path, name))
    say(f"{path} has its hash. The key is shown this once.")
    return 0
