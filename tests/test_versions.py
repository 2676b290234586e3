"""Versions on disk: whole or not there, whatever kills the process, the disk or a byte."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from toys import full_disk

from ttspec.errors import CheckpointError, OptionError, ResourceError
from ttspec.learning.version_writer import VersionWriter
from ttspec.learning.versions import (
    MANIFEST,
    REVERTED,
    SET_ASIDE,
    WEIGHTS,
    Version,
    VersionStore,
    current_of,
    numbers_in,
    place_of,
    sampled_sha256,
    stores_in,
)

METADATA = {
    "format": "pt",
    "ttspec_delta": "1",
    "kind": "toy",
    "drafter": "toy",
    "sha256": "0" * 64,
    "learn": "{}",
}


def write(store: VersionStore, value: float, size: int = 1000) -> Version:
    return store.write({"w": torch.full((size,), value)}, METADATA, {"requests": 3})


def value_of(version: Version) -> float:
    (value,) = set(version.delta().changes["w"].tolist())
    return value


def filled(folder: Path, count: int, **options) -> VersionStore:
    """Versions 1 to `count`, each full of its number."""
    store = VersionStore(folder, **options)
    assert [write(store, float(n + 1)).number for n in range(count)] == list(range(1, count + 1))
    return store


def now(store: VersionStore) -> int:
    found = store.current()
    return found[0].number if found else 0


# There and back.


def test_the_newest_version_is_found_again_with_what_was_said_of_it(tmp_path: Path) -> None:
    store = filled(tmp_path / "a" / "b", 2)
    store.close()
    version, delta = VersionStore(tmp_path / "a" / "b").current()
    assert (version.number, version.manifest["requests"]) == (2, 3)
    assert delta.changes["w"].tolist() == [2.0] * 1000
    assert version.manifest["bytes"] == (version.path / WEIGHTS).stat().st_size


def test_the_latest_versions_stay_and_a_number_is_never_used_again(tmp_path: Path) -> None:
    store = filled(tmp_path, 6, kept=3)
    assert numbers_in(tmp_path) == [4, 5, 6]
    store.revert(4)
    assert [write(store, float(n)).number for n in (7, 8, 9, 10)] == [7, 8, 9, 10]
    assert numbers_in(tmp_path) == [4, 8, 9, 10], "what was chosen by hand stays"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".old", ".partial"))]


def test_an_older_version_or_the_anchor_can_be_made_current_and_newer_ones_stay(tmp_path) -> None:
    store = filled(tmp_path, 3)
    store.revert(1)
    assert now(store) == 1
    assert numbers_in(tmp_path) == [1, 2, 3]
    store.revert(0)
    assert store.current() is None
    assert current_of(tmp_path) is None
    store.revert(3)
    assert now(store) == 3
    store.revert(2)
    assert now(store) == 2
    assert write(store, 4.0).number == 4, "what is learned from there is newer"
    assert now(store) == 4
    store.close()
    assert now(VersionStore(tmp_path)) == 4
    with pytest.raises(OptionError, match="has no version 9"):
        filled(tmp_path / "other", 1).revert(9)


def test_each_pair_and_tenant_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [None, "everyone", "acme", "Acme", "../acme", "acme/", "a" * 200, "acme.", ".", "é"]
    places = [place_of(tmp_path, "t" * 64, "d" * 64, name) for name in names]
    lower = {str(place).lower() for place in places}
    assert len(lower) == len(names), "also where a disk knows no capitals"
    for place in places:
        assert place.parent.parent == tmp_path
        filled(place, 1).close()
    assert stores_in(tmp_path) == sorted(places)
    assert stores_in(places[0]) == [places[0]]


def test_a_fingerprint_sees_a_changed_matrix_and_not_the_dtype() -> None:
    weights = {n: torch.randn(30, 40).to(torch.bfloat16) for n in "ab"}
    known = sampled_sha256(weights)
    assert sampled_sha256({n: w.float() for n, w in weights.items()}) == known
    assert sampled_sha256(weights | {"b": weights["b"] * 1.01}) != known
    assert sampled_sha256(weights | {"b": weights["b"].view(40, 30)}) != known


# What goes wrong.

LIVES = """
import os, sys
from pathlib import Path
import torch
from test_versions import now, write
from ttspec.learning.versions import VersionStore
torch.set_num_threads(1)
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        store = VersionStore(Path(sys.argv[1]), kept=3)
        number = now(store)
        os.write(1, f"begins {number}\\n".encode())
        while True:
            number = write(store, float(number + 1), size=50_000).number
            os.write(1, f"wrote {number}\\n".encode())
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"dead 0\\n")
"""


@pytest.mark.parametrize("lives", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_after_kills_nothing_is_lost_that_was_said_to_be_written(
    tmp_path: Path, lives: int
) -> None:
    """A process writes version after version; each is killed at a moment of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", LIVES, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin
    assert process.stdout
    rng, last, halves, longest = random.Random(19), 0, 0, 0.0
    with process:
        for life in range(lives):
            process.stdin.write("live\n")
            process.stdin.flush()
            pid, said = 0, []
            while not pid or not said:
                what, number = process.stdout.readline().split()
                pid = int(number) if what == "pid" else pid
                said += [int(number)] if what == "begins" else []
            assert last <= said[0] <= last + 1, "the last one may not have come to say so"
            last = said[0]
            if life == 0:
                with pytest.raises(ResourceError, match="is in use: another process"):
                    VersionStore(tmp_path)
            for _ in range(rng.choice([0, 0, 1, 2]) if life else 2):
                began = time.perf_counter()
                last = int(process.stdout.readline().removeprefix("wrote "))
                longest = time.perf_counter() - began
            time.sleep(rng.uniform(0.0, longest))
            os.kill(pid, signal.SIGKILL)
            while (line := process.stdout.readline()) != "dead 0\n":
                last = int(line.removeprefix("wrote "))
            halves += any(p.name.startswith(".partial") for p in tmp_path.iterdir())
        process.stdin.close()
    if lives > 20:
        assert last > 10, "it wrote next to nothing"
        assert halves > 3, "no kill came in the middle of a version"
    told: list[str] = []
    store = VersionStore(tmp_path, notify=told.append)
    assert now(store) in (last, last + 1)
    for number in numbers_in(tmp_path):
        assert value_of(Version(tmp_path / f"{number:08}", manifest(tmp_path, number))) == number
    assert len(list((tmp_path / SET_ASIDE).iterdir())) == halves, "set aside, not deleted"


def manifest(folder: Path, number: int) -> dict:
    return json.loads((folder / f"{number:08}" / MANIFEST).read_text())


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_a_version_with_a_flipped_bit_is_named_and_set_aside(tmp_path: Path, name: str) -> None:
    rng = random.Random(3)
    store = filled(tmp_path, 5)
    for number in (5, 4, 3):
        file = tmp_path / f"{number:08}" / name
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    assert current_of(tmp_path).number == 2, "who only reads changes nothing"
    store.close()
    told: list[str] = []
    store = VersionStore(tmp_path, notify=told.append)
    assert now(store) == 2
    assert [str(tmp_path / f"{n:08}") in text for n, text in zip((5, 4, 3), told, strict=True)]
    aside = sorted(p.name for p in (tmp_path / SET_ASIDE).iterdir())
    assert aside == ["00000003", "00000004", "00000005"]
    assert all((tmp_path / SET_ASIDE / n / name).is_file() for n in aside)
    assert write(store, 6.0).number == 6


@pytest.mark.parametrize("lost", [WEIGHTS, MANIFEST])
def test_a_version_that_lost_a_file_is_set_aside(tmp_path: Path, lost: str) -> None:
    store = filled(tmp_path, 2)
    (tmp_path / "00000002" / lost).unlink()
    assert now(store) == 1


@pytest.mark.parametrize("text", ["{", '{"to": 1e999, "after": 2}', "[" * 99_999])
def test_a_damaged_choice_is_an_error_that_says_what_to_do(tmp_path: Path, text: str) -> None:
    store = filled(tmp_path, 2)
    (tmp_path / REVERTED).write_text(text)
    with pytest.raises(CheckpointError, match=r"reverted.json is damaged.*\n.*Delete it"):
        store.current()


def test_a_try_that_a_failing_disk_kept_is_in_no_later_ones_way(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    left = tmp_path / f".partial-00000001-{os.getpid()}"
    left.mkdir()
    (left / WEIGHTS).write_bytes(b"half")
    assert value_of(write(store, 3.0)) == 3.0
    assert now(store) == 1
    assert not left.exists()


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="there is a file in its place"):
            VersionStore(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_takes_nothing_is_told_once_and_tried_again(tmp_path: Path) -> None:
    """The disk is real: the system lets no file of this process grow beyond a size."""
    told: list[str] = []
    store = filled(tmp_path, 1)
    writer = VersionWriter(told.append)
    with full_disk():
        for value in (2.0, 3.0):
            writer.submit(lambda value=value: write(store, value, size=100_000))
            writer.flush()
            assert writer.failed
    assert len(told) == 1
    assert "could not be written" in told[0]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".partial")] == []
    assert now(store) == 1
    writer.submit(lambda: write(store, 4.0, size=100_000))
    writer.close()
    assert not writer.failed
    assert len(told) == 2
    assert now(store) == writer.written.number == 2
    assert value_of(store.current()[0]) == 4.0


def test_a_writer_outlives_what_it_writes_and_who_is_told(tmp_path: Path) -> None:
    """Else whoever closes it would wait for ever."""

    def fails(_: object = None) -> Version:
        raise OSError

    store, writer = VersionStore(tmp_path), VersionWriter(fails)
    writer.submit(fails)
    writer.flush()
    assert writer.failed
    writer.submit(lambda: write(store, 1.0))
    writer.close()
    assert not writer.failed
    assert now(store) == 1


def test_of_versions_that_wait_only_the_newest_is_written(tmp_path: Path) -> None:
    store, go, begun = VersionStore(tmp_path), threading.Event(), threading.Event()
    writer, written = VersionWriter(), []

    def job(value: float):
        def run() -> Version:
            begun.set()
            assert go.wait(10)
            written.append(value)
            return write(store, value)

        return run

    writer.submit(job(1.0))
    assert begun.wait(10)
    for value in (2.0, 3.0, 4.0):
        writer.submit(job(value))
    go.set()
    writer.close()
    assert written == [1.0, 4.0]
