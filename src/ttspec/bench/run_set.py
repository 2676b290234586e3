"""Run folders read as one: arms on the units that all have finished, checked to be comparable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttspec.bench.manifest import run_notice
from ttspec.bench.metrics import different_texts, on_common_units
from ttspec.bench.results import Arm
from ttspec.bench.store import read_run
from ttspec.errors import DataError

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunSet:
    """A run folder, or several, ready to be compared."""

    manifests: dict[str, Manifest]
    """By the folder's label."""
    arms: list[Arm]
    left_out: list[str]
    """What is not in the figures, in sentences."""

    @property
    def manifest(self) -> Manifest:
        """The first folder's, which speaks for all where they must agree; a replay marks all."""
        first, *others = self.manifests.values()
        replay = next((m["replay"] for m in (first, *others) if m.get("replay")), None)
        return {**first, "replay": replay} if replay else first


def open_runs(folders: Sequence[Path], *, different_texts: bool = False) -> RunSet:
    """Read one run folder, or several of one target and suite, as one run.

    Of several, an arm's name begins with its folder's. With `different_texts` arms that must say
    the same need not.

    Raises:
        DataError: A folder is damaged, holds nothing, or does not fit the others.
    """
    labels = [folder.name for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise DataError("The same run folder was named twice.\nName each once.")
    runs = dict(zip(labels, map(read_run, folders), strict=True))
    manifests = {label: manifest for label, (manifest, _) in runs.items()}
    first = manifests[labels[0]]
    for folder, manifest in zip(folders[1:], list(manifests.values())[1:], strict=True):
        if part := different_part(first, manifest):
            raise DataError(
                f"{folder} and {folders[0]} have different {part}s, so no pairs.\n"
                f"Report on runs of one {part} together, the others apart."
            )
    arms = [
        replace(arm, name=f"{label}: {arm.name}") if len(runs) > 1 else arm
        for label, (_, own) in runs.items()
        for arm in own
    ]
    pairs = on_common_units(arms)
    if not pairs or not pairs[0].turns:
        raise DataError(
            f"{', '.join(map(str, folders))} has no request that every arm has finished.\n"
            "Go on with `ttspec bench run`; the same command takes it up where it ended."
        )
    if not different_texts:
        check_texts(first, pairs)
    notes = _left_out(arms, pairs, manifests.values())
    return RunSet(manifests, pairs, list(dict.fromkeys(notes)))


def checksum_of(manifest: Manifest, part: str) -> str | None:
    """What tells a target or suite from others: its checksum, or its name where that is all."""
    found = manifest.get(part) or {}
    return found.get("sha256") or found.get("name")


def different_part(a: Manifest, b: Manifest) -> str | None:
    """Target or suite, where two runs differ in it and so have no pairs."""
    return next((p for p in ("target", "suite") if checksum_of(a, p) != checksum_of(b, p)), None)


def check_texts(manifest: Manifest, arms: Sequence[Arm]) -> None:
    """Greedy arms in float32 emit the same tokens, or one of them is wrong.

    Raises:
        DataError: They do not.
    """
    greedy = manifest.get("temperature") == 0 and manifest.get("dtype") == "float32"
    if not greedy:
        return  # elsewhere rounding decides close calls; the tables count the differences
    first, *others = arms
    for arm in others:
        for (request, seed), position in different_texts(arm, first):
            raise DataError(
                f"{arm.name} emitted other greedy tokens than {first.name}: request {request}, "
                f"seed {seed}, from token {position} on.\n`ttspec check` finds out whether it is a "
                "close call; --different-texts reports all the same."
            )


def _left_out(
    arms: Sequence[Arm], kept: Sequence[Arm], manifests: Iterable[Manifest]
) -> Iterator[str]:
    manifests = list(manifests)
    yield from filter(None, map(run_notice, manifests))
    units = {arm.name: len(arm.units) for arm in kept}
    yield from (f"{a.name} has no finished request." for a in arms if a.name not in units)
    for arm in arms:
        if (more := len(arm.units) - units.get(arm.name, len(arm.units))) > 0:
            yield f"{arm.name} has {more} units more than other arms."
    for manifest in manifests:
        for arm, errors in (manifest.get("failed") or {}).items():
            yield f"{arm}: {len(errors)} units failed; the first: {errors[0]}"
        yield from manifest.get("notes") or []
