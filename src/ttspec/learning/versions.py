"""Learned weights on disk: numbered versions, each whole or not there, of which the newest drafts.

A folder has what one pair of models learned for one tenant, and one process writes to it. A
version is a folder of two files: the change of the drafter's weights, as `delta.py` has it, and
a manifest with its checksum and history. It is written under another name, forced to the disk and
then renamed, so that a process that is killed leaves either all of it or none. What is damaged or
half written is named and set aside, never deleted and never drafted with.

Knows no engine and no thread: the engine here, a server and vLLM's workers may all use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ttspec.errors import CheckpointError, OptionError, ResourceError
from ttspec.learning.delta import Delta, read_delta

WEIGHTS, MANIFEST, REVERTED = "weights.safetensors", "manifest.json", "reverted.json"
LOCK, SET_ASIDE, PARTIAL, OLD = ".lock", "set-aside", ".partial-", ".old-"
FORMAT = 1
SAMPLED = 64
"""Values of each weight that a fingerprint is made of."""
KEPT = 5
"""Versions that stay on disk."""
EVERYONE = "everyone"
"""Whose versions those are that name no tenant."""
ANCHOR = 0
"""The number of the drafter's own weights, which are no version."""
_NUMBER = re.compile(r"\d{8}")
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def place_of(root: Path, target: str, drafter: str, tenant: str | None = None) -> Path:
    """The folder of a pair's versions for a tenant.

    Target and drafter are told by their fingerprints; a tenant of None is all without one.
    """
    if tenant is None:
        name = EVERYONE
    elif _PLAIN_NAME.fullmatch(tenant):
        name = f"tenant-{tenant}"
    else:  # no folder's name on every disk, or the same as another one on some
        name = "tenant+" + hashlib.sha256(tenant.encode()).hexdigest()[:32]
    return root / f"{target[:12]}-{drafter[:12]}" / name


@dataclass(frozen=True, slots=True)
class Version:
    """A version on disk, whose manifest was read."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def number(self) -> int:
        """From 1 up; a number is never used again."""
        return int(self.path.name)

    def delta(self) -> Delta:
        """The change of the drafter's weights, its checksum compared first.

        Raises:
            CheckpointError: It is damaged.
        """
        path, wanted = self.path / WEIGHTS, self.manifest["sha256_of_weights"]
        if _sha256(path) != wanted:
            raise CheckpointError(f"{path} is damaged: its sha256 is not {wanted[:12]}…")
        return read_delta(path)


def read_version(path: Path) -> Version:
    """A version's manifest.

    Raises:
        CheckpointError: It is missing, damaged or of another format.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        sha256, _ = manifest.pop("sha256_of_manifest"), manifest["sha256_of_weights"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}.") from error
    if sha256 != _manifest_sha256(manifest):
        raise CheckpointError(f"{file} is damaged: its sha256 is not {str(sha256)[:12]}…")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is of format {manifest.get('format')}; this ttspec reads {FORMAT}."
        )
    return Version(path, manifest)


def numbers_in(folder: Path) -> list[int]:
    """Numbers of the versions that a folder seems to have, ascending."""
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name))


def stores_in(root: Path) -> list[Path]:
    """Folders with versions: `root` itself, or those of its pairs and tenants."""
    if numbers_in(root):
        return [root]
    return sorted(p for p in root.glob("*/*") if p.is_dir() and numbers_in(p))


def order_of(folder: Path) -> list[int]:
    """Numbers of versions in the order in which they are asked whether they are whole.

    The newest first; after `VersionStore.revert` those made since, and then the one that it chose.
    """
    numbers, (chosen, then) = numbers_in(folder)[::-1], _reverted(folder)
    return [n for n in numbers if n > then or n <= chosen]


def current_of(folder: Path) -> Version | None:
    """The version to draft with; None is the drafter's own weights. Changes nothing."""
    for number in order_of(folder):
        with suppress(CheckpointError):
            found = read_version(folder / f"{number:08}")
            found.delta()
            return found
    return None


class VersionStore:
    """The one process that writes to a folder of versions."""

    def __init__(
        self, folder: Path, *, kept: int = KEPT, notify: Callable[[str], None] | None = None
    ) -> None:
        """Open or make a folder, and set aside what an earlier process left half written.

        The latest `kept` versions stay.

        Raises:
            ResourceError: Another process has it, or it cannot be made.
            OptionError: There is a file in its place.
        """
        self.folder, self.kept, self._notify = folder, max(1, kept), notify
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                f"{folder} is in use: another process, or another engine or way of drafting in "
                "this one, keeps there what it learns.\nEnd that first, or name another folder."
            ) from None
        except (FileExistsError, NotADirectoryError) as error:
            raise OptionError(
                f"{folder} cannot be a folder of versions: there is a file in its place.\n"
                "Name a new folder."
            ) from error
        except OSError as error:
            raise ResourceError(
                f"{folder} cannot be written: {error.strerror or error}.\nName another folder."
            ) from error
        for path in sorted(folder.iterdir()):
            if path.name.startswith(PARTIAL):
                self._set_aside(path, "it was not finished")
            elif path.name.startswith(OLD):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def is_open(self) -> bool:
        """Whether the folder is this one's."""
        return self._lock.is_locked

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    def current(self) -> tuple[Version, Delta] | None:
        """The version to draft with; None is the drafter's own weights.

        What turns out to be damaged is set aside, and the next older one is asked.
        """
        for number in order_of(self.folder):
            path = self.folder / f"{number:08}"
            try:
                found = read_version(path)
                return found, found.delta()
            except CheckpointError as error:
                self._set_aside(path, str(error).splitlines()[0])
        return None

    def write(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], facts: Mapping[str, Any]
    ) -> Version:
        """Write the next version; when this returns it outlives a power cut.

        Args:
            tensors: On the host: low-rank factors, or what `delta.difference` gives.
            metadata: Of `delta_metadata`.
            facts: For the manifest: JSON values.

        Raises:
            ResourceError: The disk is full or broken; nothing changed.
        """
        number = self._next_number()
        path = self.folder / f"{number:08}"
        partial = self.folder / f"{PARTIAL}{number:08}-{os.getpid()}"
        try:
            partial.mkdir(exist_ok=True)  # a disk that failed may have kept an earlier try's
            save_file(dict(tensors), partial / WEIGHTS, metadata=dict(metadata))
            _force(partial / WEIGHTS)
            manifest: dict[str, Any] = {
                **facts,
                "format": FORMAT,
                "number": number,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "ttspec": _own_version(),
                "bytes": (partial / WEIGHTS).stat().st_size,
                "sha256_of_weights": _sha256(partial / WEIGHTS),
            }
            text = {**manifest, "sha256_of_manifest": _manifest_sha256(manifest)}
            (partial / MANIFEST).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
            _force(partial / MANIFEST)
            _force(partial)
            partial.rename(path)
            _force(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise ResourceError(f"{path} could not be written: {reason}.") from error
        self._prune(number)
        return Version(path, manifest)

    def revert(self, number: int) -> None:
        """Make an older version, or the anchor (0), current; newer ones stay on disk.

        Raises:
            OptionError: There is no such version.
            CheckpointError: It is damaged.
        """
        numbers = numbers_in(self.folder)
        if number != ANCHOR:
            if number not in numbers:
                known = ", ".join(map(str, [ANCHOR, *numbers]))
                raise OptionError(f"{self.folder} has no version {number}.\nThere are {known}.")
            read_version(self.folder / f"{number:08}").delta()
        text = json.dumps({"to": number, "after": max(numbers, default=ANCHOR)})
        partial = self.folder / f"{PARTIAL}{REVERTED}"
        partial.write_text(text + "\n", encoding="utf-8")
        _force(partial)
        partial.replace(self.folder / REVERTED)
        _force(self.folder)

    def _next_number(self) -> int:
        aside, reverted = numbers_in(self.folder / SET_ASIDE), _reverted(self.folder)
        return 1 + max([*numbers_in(self.folder), *aside, *reverted])

    def _prune(self, written: int) -> None:
        """Delete all but the latest versions; `written` is one, and was read back just now."""
        numbers = [n for n in numbers_in(self.folder) if n <= written]
        stay = {*numbers[-self.kept :], _reverted(self.folder)[0]}
        for number in numbers:
            if number in stay:
                continue
            old = self.folder / f"{OLD}{number:08}"  # a version is never there in part
            with suppress(OSError):
                (self.folder / f"{number:08}").rename(old)
            shutil.rmtree(old, ignore_errors=True)

    def _set_aside(self, path: Path, why: str) -> None:
        aside = self.folder / SET_ASIDE
        aside.mkdir(exist_ok=True)
        name = path.name.replace(PARTIAL, "half-")
        taken = {p.name for p in aside.iterdir()}
        names = chain([name], (f"{name}-{n}" for n in count(2)))
        to = next(n for n in names if n not in taken)
        path.rename(aside / to)
        if self._notify:
            self._notify(f"{path} is no whole version: {why} It lies in {aside / to} now.")


def sampled_sha256(weights: Mapping[str, Tensor]) -> str:
    """A fingerprint of a model from a few values of every weight, spread evenly.

    A fine-tuned or quantised model has another one; the dtype in which one is loaded, float32 or
    bfloat16, makes no difference.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name} {list(weight.shape)} ".encode())
        flat = weight.reshape(-1)
        if not len(flat):
            continue
        at = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64)
        some = flat[at.long().to(flat.device)].cpu()
        if some.is_floating_point():
            some = some.to(torch.bfloat16)
        digest.update(some.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reverted(folder: Path) -> tuple[int, int]:
    """The version that was chosen by hand, and the newest one when that was; 0 and 0 for none."""
    try:
        reverted = json.loads((folder / REVERTED).read_text(encoding="utf-8"))
        return int(reverted["to"]), int(reverted["after"])
    except FileNotFoundError:
        return ANCHOR, ANCHOR
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / REVERTED} is damaged: {error}.\n"
            "Delete it to draft with the newest version, or write it again: ttspec learned revert."
        ) from error


def _force(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(dict(manifest), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _own_version() -> str:
    try:
        return version("ttspec")
    except PackageNotFoundError:
        return "unknown"
