#!/bin/sh
# safetensors 0.8.0: `save_file` replaces the file instead of writing it, so the umask, the old file's mode and links no longer count.
#
# 0.7.0 (and 0.5.3) opens the path and writes: a new file has the mode that the umask leaves (644), an old one keeps its own, and a
# symbolic link stays and its target is written. 0.8.0 writes a temporary file beside it and moves that into its place: the mode
# is 600 each time, even where the file that was there could be read by all, and a link becomes a file of its own while its
# target keeps the old weights. `transformers`' `save_pretrained` and `huggingface_hub`'s `save_torch_state_dict`
# write through it. A server that runs as another user then finds config.json and cannot open model.safetensors.
# Expected: a new minor version writes where and how the one before it did; mode 644 under umask 022, and the link followed.
# Seen, 2026-11-29:
#     0.7.0: new file 644, written again 644, link stays True, its target is written True
#     0.8.0: new file 600, written again 600, link stays False, its target is written False
# Fails when either of these two versions behaves otherwise.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.7.0 0.8.0; do
    python3 -m pip install --quiet --target "$folder/$version" "safetensors==$version" numpy==2.2.6
    (cd "$folder" && PYTHONPATH="$folder/$version" python3 - "$version") <<'PYTHON'
import os
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save_file

version = sys.argv[1]
os.umask(0o022)
place = Path(f"files-{version}")
place.mkdir()
one, other = ({"w": numpy.full(size, 1.0, numpy.float32)} for size in (4, 9))


def mode(path):
    return f"{path.stat().st_mode & 0o777:o}"


save_file(one, place / "weights.safetensors")
new = mode(place / "weights.safetensors")
(place / "weights.safetensors").chmod(0o644)
save_file(other, place / "weights.safetensors")
again = mode(place / "weights.safetensors")

save_file(one, place / "target.safetensors")
(place / "link.safetensors").symlink_to("target.safetensors")
before = (place / "target.safetensors").read_bytes()
save_file(other, place / "link.safetensors")
stays = (place / "link.safetensors").is_symlink()
written = (place / "target.safetensors").read_bytes() != before
print(f"{version}: new file {new}, written again {again}, link stays {stays}, its target is written {written}")
wanted = ("644", "644", True, True) if version == "0.7.0" else ("600", "600", False, False)
assert (new, again, stays, written) == wanted, "it behaves otherwise"
PYTHON
done
