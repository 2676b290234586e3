#!/bin/sh
# torch 2.13.0: AOTInductor compiles parameters of few numbers into the code, so new weights that are loaded into a package change the others alone.
#
# A package made by `aoti_compile_and_package` takes new weights without a compiler: `get_constant_fqns` lists their names, `load_constants` puts them in,
# and `check_full_update=True` makes sure that none was left out. A drafter that learns beside a compiled one would be published so. Parameters of one
# number, and vectors of up to eight, become literals of the generated code. They are not listed, and not missed by the check: gates, scales, PReLU's
# slope, a bias or a sink for each of eight heads stay what they were at compile time, while the matrices around them are new ones. Nothing warns. Only who
# hands over a whole state_dict hears of it, by an error ("Constant not found").
# Expected: all parameters are listed, or the package is refused new weights; outputs are the model's after a full update.
# Seen, 2026-11-30 (a CPU, float32), a model before 50 steps of SGD and after them; the package's distance from it over the outputs' deviation:
#     listed: layer.weight, nine
#     not listed: bend.weight, eight, gate, scale
#     off by 0.00 before learning, by 5.53 after, with a full update
# Fails when all are listed, or outputs are the model's. It needs a C++ compiler.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.2
cd "$folder"
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn

torch.set_num_threads(1)


class Drafter(nn.Module):
    """A layer, and things of few numbers that learn as well."""

    def __init__(self):
        super().__init__()
        self.layer, self.bend = nn.Linear(72, 72, bias=False), nn.PReLU()
        self.gate, self.scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.tensor(1.0))
        self.eight, self.nine = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(9))

    def forward(self, x):
        made = self.gate * self.bend(self.layer(x))
        heads = made.unflatten(-1, (9, 8)) + self.eight + self.nine[:, None]
        return (x + heads.flatten(-2)) * self.scale


def off():
    with torch.no_grad():
        want = model(x)
        return float((package(x) - want).abs().max() / want.std())


torch.manual_seed(0)
model, x, target = Drafter(), torch.randn(64, 72), torch.randn(64, 72) + 1
with torch.no_grad():
    path = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)))
package = torch._inductor.aoti_load_package(path)
before, sgd = off(), torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(50):
    sgd.zero_grad()
    (model(x) - target).square().mean().backward()
    sgd.step()
state, listed = model.state_dict(), sorted(package.get_constant_fqns())
package.load_constants({name: state[name] for name in listed}, check_full_update=True)
rest, after = sorted(set(state) - set(listed)), off()
print("listed:", ", ".join(listed))
print("not listed:", ", ".join(rest))
print(f"off by {before:.2f} before learning, by {after:.2f} after, with a full update")
sys.exit(not (listed == ["layer.weight", "nine"] and before < 0.01 and after > 0.1))
PYTHON
