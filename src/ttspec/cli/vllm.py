"""`ttspec vllm`: what of an installed vLLM fits, before anything is served."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

vllm = App(name="vllm", help="Learn inside vLLM: check what fits.", help_format="markdown")


@vllm.command
def check(target: str, drafter: str) -> int:
    """Say whether a drafter can learn inside the vLLM that is installed here.

    Nothing is served, and vLLM is not imported: its sources are compared with the hooks that
    `ttspec.vllm` knows.

    Parameters
    ----------
    target
        Built-in name, local folder or hub id.
    drafter
        Built-in name, local folder or hub id; vLLM itself wants a folder, or a hub id.
    """
    from ttspec.cli.terminal import say
    from ttspec.decoding.loading import find_drafter
    from ttspec.errors import OptionError
    from ttspec.models.source import resolve
    from ttspec.vllm.check import examine_engine, examine_pair
    from ttspec.vllm.hooks import vllm_folder
    from ttspec.vllm.settings import Settings

    found, source = find_drafter(drafter, notify=say), resolve(target, notify=say)
    if found is None:
        raise OptionError("There is no drafter to learn: 'none'.\nGive a drafter's folder.")
    folder = Path(source.path)
    lines = examine_engine(vllm_folder()) + examine_pair(folder, found, Settings())
    for line in lines:
        print(f"{'ok' if line.fits else 'NO':3s} {line.name:10s} {line.text}")
    return 0 if all(line.fits for line in lines) else 1
