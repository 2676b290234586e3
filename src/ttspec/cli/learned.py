"""`ttspec learned`: what `--learn.keep` has written, and which version of it drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from ttspec.cli.options import Dtype, ExportFormat, JsonFlag, ModelFlags
from ttspec.cli.terminal import say, to_json
from ttspec.errors import CheckpointError, DataError, OptionError

if TYPE_CHECKING:
    from ttspec.learning.versions import Version

learned = App(
    name="learned",
    help="List, show, export and revert what --learn.keep has written.",
    help_format="markdown",
)
HEAD = ("version", "made", "requests", "updates", "accepted", "anchor", "before", "MB")
NOTE = (
    "Accepted drafts a block, on blocks that taught nothing: of the version, of the drafter's own "
    "weights, and of the version before. Requests and updates: of the process that wrote it, which "
    "went on from its parent (show)."
)


@learned.command(name="list")
def list_(folder: Path, *, as_json: JsonFlag = False) -> int:
    """List the versions of a folder, of all pairs and tenants; a star marks what drafts next.

    Parameters
    ----------
    folder
        What --learn.keep named.
    as_json
        Print one JSON object a version.
    """
    from ttspec.bench.table import Table, table_console
    from ttspec.learning.versions import current_of, numbers_in, read_version

    for store in _stores(folder):
        current, rows = current_of(store), []
        for number in numbers_in(store):
            path = store / f"{number:08}"
            try:
                version = read_version(path)
                version.delta()
                is_current = bool(current and current.number == number)
                rows.append(_row(version, is_current))
            except CheckpointError as error:
                if as_json:
                    print(to_json({"path": str(path), "damaged": str(error)}))
                rows.append((str(number), str(error).splitlines()[0], *[""] * 6))
                continue
            if as_json:
                print(to_json({"path": str(path), "current": is_current, **version.manifest}))
        if as_json:
            continue
        title = _title(store, _first_manifest(store))
        Table(head=HEAD, rows=rows, title=title, note=NOTE).print(table_console())
        if current is None:
            print("The drafter's own weights draft next: no version is current.\n")
    return 0


@learned.command
def show(folder: Path, *, version: int | None = None, tenant: str | None = None) -> int:
    """Print all that is known of a version, as JSON.

    Parameters
    ----------
    folder
        What --learn.keep named, or the folder of one pair and tenant below it.
    version
        Its number. [default: the one that drafts next]
    tenant
        Whose, where there are several.
    """
    found = _version(_store(folder, tenant), version)
    learn = json.loads(found.delta().learn)
    print(to_json({"path": str(found.path), **found.manifest, "learn": learn}))
    return 0


@learned.command
def export(
    folder: Path,
    *,
    out: Path,
    version: int | None = None,
    tenant: str | None = None,
    target: str | None = None,
    drafter: str | None = None,
    form: ExportFormat = "published",
    dtype: Dtype = "bfloat16",
) -> int:
    """Write a version as a drafter of its own, which ttspec and vLLM load.

    Parameters
    ----------
    folder
        What --learn.keep named, or the folder of one pair and tenant below it.
    out
        A new or empty folder.
    version
        Its number. [default: the one that drafts next]
    tenant
        Whose, where there are several.
    target
        The target, where it has another name by now. [default: as the version says]
    drafter
        The drafter that it is a change of, likewise.
    form
        The format its kind is published in, or that of speculators, if it has one.
    dtype
        Number format of the weights; auto is the narrowest that holds them exactly.
    """
    from ttspec.decoding.shared_weights import fingerprint
    from ttspec.drafters.export import export_drafter, require_empty

    require_empty(out)
    found = _version(_store(folder, tenant), version)
    delta, learned_with = found.delta(), found.manifest["target"]
    models = ModelFlags(
        target=target or learned_with["name"],
        drafter=drafter or found.manifest["drafter"],
        device="cpu",
        # Rounded once, to what is written; float16 has other values than a version is known by.
        dtype=dtype if dtype == "bfloat16" else "float32",
    )
    engine = models.load(notify=say)
    if fingerprint(engine.target) != learned_with["sha256"]:
        say(
            f"{engine.target.name} is not the target that this version was learned with, or has "
            "changed since: drafts may be accepted less often."
        )
    export_drafter(delta.changed(engine.drafter), engine.target, form, out, dtype=dtype)
    say(f"{out} holds version {found.number} of {found.path.parent}: --drafter {out}")
    return 0


@learned.command
def revert(folder: Path, *, to: str, tenant: str | None = None) -> int:
    """Make an older version, or the drafter's own weights, current; newer ones stay on disk.

    What is learned from then on is newer again, and current.

    Parameters
    ----------
    folder
        What --learn.keep named, or the folder of one pair and tenant below it.
    to
        A version's number, or anchor for the drafter's own weights.
    tenant
        Whose, where there are several.
    """
    from ttspec.learning.versions import VersionStore

    if to != "anchor" and not (to.isdecimal() and int(to)):
        raise OptionError(f"--to is {to!r}; allowed are a version's number and anchor.")
    store = VersionStore(_store(folder, tenant), notify=say)
    try:
        store.revert(0 if to == "anchor" else int(to))
    finally:
        store.close()
    what = "The drafter's own weights draft" if to == "anchor" else f"Version {int(to)} drafts"
    say(f"{what} from the next start on.")
    return 0


def _stores(folder: Path) -> list[Path]:
    from ttspec.learning.versions import stores_in

    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.\nGive what --learn.keep named.")
    found = stores_in(folder)
    if not found and any(folder.glob("*/*/.lock")):
        raise DataError(
            f"{folder} has no versions yet: there was too little to judge what was learned by, or "
            "it drafted worse.\nLet more be answered. The process that learns says why at its end."
        )
    if not found:
        raise DataError(f"{folder} has no versions.\nGive what --learn.keep named.")
    return found


def _store(folder: Path, tenant: str | None) -> Path:
    found = _stores(folder)
    if tenant is not None:
        found = [store for store in found if _first_manifest(store).get("tenant") == tenant]
        if not found:
            raise DataError(f"{folder} has no versions of tenant {tenant!r}.\nSee: learned list.")
    if len(found) > 1:
        names = ", ".join(str(store) for store in found[:4])
        raise OptionError(
            f"{folder} has versions of several pairs or tenants.\n"
            f"Give --tenant, or one of their folders: {names}."
        )
    return found[0]


def _version(store: Path, number: int | None) -> Version:
    from ttspec.learning.versions import current_of, numbers_in, read_version

    if number is None:
        if found := current_of(store):
            return found
        raise DataError(
            f"No version of {store} is current: the drafter's own weights draft next.\n"
            f"Give --version, one of {', '.join(map(str, numbers_in(store)))}."
        )
    if number not in numbers_in(store):
        known = ", ".join(map(str, numbers_in(store)))
        raise OptionError(f"{store} has no version {number}.\nThere are {known}.")
    return read_version(store / f"{number:08}")


def _first_manifest(store: Path) -> dict[str, Any]:
    """The newest manifest that can be read: all say the same of pair and tenant."""
    from ttspec.learning.versions import numbers_in, read_version

    for number in reversed(numbers_in(store)):
        try:
            return dict(read_version(store / f"{number:08}").manifest)
        except CheckpointError:
            continue
    return {}


def _title(store: Path, manifest: dict[str, Any]) -> str:
    if not manifest:  # none could be read
        return str(store)
    whose = f", tenant {manifest['tenant']}" if manifest["tenant"] else ""
    return f"{store}: {manifest['drafter']} for {manifest['target']['name']}{whose}"


def _row(version: Version, is_current: bool) -> tuple[str, ...]:
    known = version.manifest
    name = f"{version.number}{' *' if is_current else ''}"
    accepted = known["held_out"]["accepted"]
    figures = [f"{accepted[name]:.3f}" for name in ("version", "anchor", "before")]
    counts = [f"{known[name]:,}" for name in ("requests", "updates")]
    return name, known["made"][:16], *counts, *figures, f"{known['bytes'] / 1e6:.1f}"
