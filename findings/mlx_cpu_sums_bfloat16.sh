#!/bin/sh
# mlx 0.32.4, a CPU (Linux): products with quantised weights add up in bfloat16, so 8 bits are no better than 4, and a softmax over 32,768 sums to 128.
#
# Models of mlx-lm keep states in bfloat16, as checkpoints have them, and `quantized_matmul` is their every layer. The CPU's ordinary `matmul` and `sum`
# keep sums in float32. The kernel for the usual "affine" weights keeps its sum in the dtype of the states: 8 bits, of which the last is lost with each
# addition. An MLP's 14,336 products are wrong by an eighth, whatever weights are rounded to; where most products have one sign (states after a gate, a
# mean that is not 0) the sum stops growing. A model seems hurt by 4 bits, and 8 bits do not help; states in float32 do. "mxfp4", which adds up within
# groups first, is off less; float16 has three bits more and is off less, too. `softmax` (without `precise`), `cumsum` and the gradient of `table[ids]`
# add up so as well: they stop at 256. Nothing fails or warns.
# Expected: bfloat16 rounds the result, so about 0.2 % as with `matmul`, on top of what rounding weights costs; probabilities that sum to 1.
# Seen, 2026-11-30; error of the product over its size, against the same quantised weights in float32; ordinary matmul, then 4 bits, 8 bits, mxfp4:
#     bfloat16, 576 products, both signs: 0.2 %, 2.6 %, 2.8 %, 0.9 %; all positive: 0.2 %, 10.2 %, 10.5 %, 0.4 %
#     bfloat16, 1536 products, both signs: 0.2 %, 4.2 %, 4.7 %, 1.0 %; all positive: 0.1 %, 31.0 %, 31.1 %, 0.7 %
#     bfloat16, 4096 products, both signs: 0.2 %, 7.0 %, 7.4 %, 1.5 %; all positive: 0.2 %, 58.5 %, 58.6 %, 1.8 %
#     bfloat16, 14336 products, both signs: 0.2 %, 10.6 %, 12.5 %, 2.5 %; all positive: 0.2 %, 81.2 %, 81.3 %, 13.2 %
#     float16, 14336 products, both signs: 0.0 %, 1.6 %, 1.8 %, 0.3 %; all positive: 0.0 %, 36.5 %, 36.7 %, 0.3 %; float32: all 0.0 %
#     32,768 equal probabilities: their sum is 128; cumsum of 4,096 ones 256, gradient of a row that is read 4,096 times 256, sum 4096
# Fails when the errors are those of matmul.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import mlx.core as mx

mx.set_default_device(mx.cpu)
WEIGHTS = {"4 bits": ("affine", 64, 4), "8 bits": ("affine", 64, 8), "mxfp4": ("mxfp4", 32, 4)}


def off(got, right):
    return (mx.linalg.norm(got.astype(mx.float32) - right) / mx.linalg.norm(right)).item()


def errors(length, dtype, positive):
    mx.random.seed(0)
    states, weights = mx.random.normal((4, length)).astype(dtype), (mx.random.normal((64, length)) / length**0.5).astype(dtype)
    if positive:
        states, weights = abs(states), abs(weights)
    result = {"matmul": off(states @ weights.T, states.astype(mx.float32) @ weights.astype(mx.float32).T)}
    for name, (mode, group_size, bits) in WEIGHTS.items():
        how = dict(mode=mode, group_size=group_size, bits=bits)
        packed = mx.quantize(weights, **how)
        unpacked = mx.dequantize(*packed, **how).astype(mx.float32)
        result[name] = off(mx.quantized_matmul(states, *packed, transpose=True, **how), states.astype(mx.float32) @ unpacked.T)
    return result


seen = {}
for dtype in (mx.bfloat16, mx.float16, mx.float32):
    for length in (576, 1536, 4096, 14336):
        for positive in (False, True):
            result = seen[dtype, length, positive] = errors(length, dtype, positive)
            kind = "all positive" if positive else "both signs"
            print(f"{str(dtype).split('.')[-1]}, {length} products, {kind}:", ", ".join(f"{100 * error:.1f} %" for error in result.values()))
ids, ones = mx.zeros((4096,), dtype=mx.int32), mx.ones((4096,), dtype=mx.bfloat16)
equal = mx.softmax(mx.zeros((32768,), dtype=mx.bfloat16)).astype(mx.float32).sum().item()
row = mx.grad(lambda table: table[ids].sum())(mx.ones((2, 4), dtype=mx.bfloat16))[0, 0].item()
print(f"equal probabilities sum to {equal:.0f}; cumsum {mx.cumsum(ones)[-1].item():.0f}, gradient of a row {row:.0f}, sum {ones.sum().item():.0f}")
long = [seen[mx.bfloat16, 4096, positive] for positive in (False, True)]
sys.exit(not all(result["8 bits"] > 10 * result["matmul"] for result in long))
PYTHON
