#!/bin/sh
# torch 2.13.0: of two views of one table that are made before either is written, the second cannot be written with gradients.
#
# A cache of keys is one table, each layer has a view of it, and the views are made before the layers run. With gradients the
# first layer's write goes well. The second one's raises "a leaf Variable that requires grad is being used in an in-place
# operation", though that view is no leaf: asked for `is_leaf` or `grad_fn` it says so, and from then on the same write goes
# well. A question changes what the next line does. `requires_grad` asks the same in vain. A view made after the first write is
# not concerned.
# Expected: both writes go well, since views share their table's history, whatever was asked before.
# Seen, 2026-11-29:
#     nothing asked: a leaf Variable that requires grad is being used in an in-place operation.
#     requires_grad: a leaf Variable that requires grad is being used in an in-place operation.
#     is_leaf: written, gradient 5.0
#     grad_fn: written, gradient 5.0
#     view made later: written, gradient 5.0
# Fails when all of them go well.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0
PYTHONPATH="$folder/site" python3 - <<'PYTHON'
import torch


def written(asked, *, later=False):
    table, weight = torch.zeros(2, 4), torch.ones(4, requires_grad=True)
    first, second = table[0], table[1]
    first.copy_(2 * weight)
    if later:
        second = table[1]
    if asked:
        getattr(second, asked)
    try:
        second.copy_(3 * weight)
    except RuntimeError as error:
        return str(error)
    return f"written, gradient {torch.autograd.grad(table.sum(), weight)[0][0].item()}"


found = {name or "nothing asked": written(name) for name in (None, "requires_grad", "is_leaf", "grad_fn")}
found["view made later"] = written(None, later=True)
for name, said in found.items():
    print(f"{name}: {said}")
assert found["is_leaf"] == found["grad_fn"] == found["view made later"] == "written, gradient 5.0"
assert "leaf Variable" in found["nothing asked"], "it goes well now"
assert "leaf Variable" in found["requires_grad"], "it goes well now"
PYTHON
