"""`ttspec export`: write a drafter for vLLM and other tools."""

from pathlib import Path

from ttspec.cli.options import Dtype, ExportFormat, ModelFlags
from ttspec.cli.terminal import say
from ttspec.errors import OptionError


def export(
    drafter: str,
    *,
    out: Path,
    target: str = "smollm2-135m",
    form: ExportFormat = "published",
    dtype: Dtype = "bfloat16",
) -> int:
    """Write a drafter so that vLLM, transformers and other tools load it.

    Parameters
    ----------
    drafter
        Built-in name, local folder or hub id; auto is the target's own.
    out
        A new or empty folder.
    target
        Built-in name, local folder or hub id of the target that it drafts for.
    form
        The format its kind is published in, or that of speculators, if it has one.
    dtype
        Number format of the weights; auto is the narrowest that holds them exactly.
    """
    # Imports torch: not before the arguments are known to be complete.
    from ttspec.drafters.export import export_drafter, require_empty

    require_empty(out)
    # Rounded once, to what is written; auto has to see every bit, float16 what it cannot hold.
    held = dtype if dtype == "bfloat16" else "float32"
    engine = ModelFlags(target=target, drafter=drafter, device="cpu", dtype=held).load(notify=say)
    if engine.drafter is None:
        raise OptionError(
            f"There is no drafter to export: {drafter!r} for {target} is none.\n"
            "Give a drafter's folder, a hub id or a built-in name."
        )
    export_drafter(engine.drafter, engine.target, form, out, dtype=dtype)
    say(f"{out} holds {engine.drafter.name}, of kind {engine.drafter.kind}, for {target}.")
    return 0
