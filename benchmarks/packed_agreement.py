"""How often packed weights choose the token that the same weights choose unpacked to bfloat16.

    python benchmarks/packed_agreement.py FOLDER --kinds int8,int4

Needs torchao. FOLDER is a model as transformers saves it; the text is this repository's own.
"""

import copy
import time
from pathlib import Path
from typing import Any

import common
import torch
from cyclopts import App
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ttspec.cli.terminal import say, to_json

app = App(help=__doc__)
TEXTS = Path(__file__).resolve().parents[1] / "docs"
WIDTH = 64
"""Rows of the identity by which a weight is unpacked, and so of its product."""


def config_of(kind: str, device: str) -> Any:
    """torchao's; its tiles of 4 bits are for a GPU, a CPU's 4 bits are unpacked each time."""
    from torchao import quantization as ao  # pyright: ignore[reportMissingImports]

    if kind == "int8":
        return ao.Int8WeightOnlyConfig()
    if device == "cpu":
        four: Any = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        return ao.IntxWeightOnlyConfig(four, ao.PerGroup(64))
    return ao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")


@torch.no_grad()
def whole(linear: nn.Linear) -> Tensor:
    """A packed weight [out, in] as its own product multiplies by it: that of the identity."""
    if linear.weight.__class__.__name__ == "Int8Tensor":  # its product rounds after the sum
        return linear.weight.dequantize().bfloat16()
    eye = torch.eye(linear.in_features, dtype=torch.bfloat16, device=linear.weight.device)
    return torch.cat([F.linear(rows, linear.weight) for rows in eye.split(WIDTH)]).T.contiguous()


@torch.no_grad()
def compare(packed: nn.Module, plain: nn.Module, tokens: Tensor, width: int) -> dict[str, float]:
    """Read a text [1, N] by both, `width` tokens at a time."""
    caches = DynamicCache(), DynamicCache()
    same, divergence, largest = 0, 0.0, 0.0
    for piece in tokens.split(width, dim=1):
        ours, theirs = (
            model(piece, past_key_values=cache, use_cache=True).logits[0].float()
            for model, cache in zip((packed, plain), caches, strict=True)
        )
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        logs = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float(F.kl_div(*logs, reduction="sum", log_target=True))
        largest = max(largest, float((ours - theirs).abs().max()))
    count = tokens.shape[1]
    return {"same": same / count, "kl": divergence / count, "largest": largest}


@app.default
def main(folder: Path, *, kinds: str = "int8,int4", tokens: int = 4096, width: int = 128) -> None:
    """Print a line of JSON for each kind.

    Parameters
    ----------
    folder
        The model's.
    kinds
        Of packed weights: int8, int4.
    tokens
        Of text.
    width
        Tokens that are read at a time.
    """
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.md")))
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * tokens], return_tensors="pt").input_ids
    ids = ids[:, :tokens].to(device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(device).eval()
    with torch.no_grad():
        spread = float(model(ids[:, :256]).logits.float().std())
    for kind in kinds.split(","):
        begin = time.perf_counter()
        packed = copy.deepcopy(model)
        inner = packed.base_model  # without the head, which transformers leaves as it is
        quantize_(inner, config_of(kind, device))
        plain = copy.deepcopy(model)
        for name, module in inner.named_modules():
            if isinstance(module, nn.Linear):
                plain.base_model.get_submodule(name).weight = nn.Parameter(whole(module))
        say(f"{kind}: packed and unpacked in {time.perf_counter() - begin:.1f} s")
        found = compare(packed, plain, ids, width)
        took = time.perf_counter() - begin
        settings = {"kind": kind, "tokens": ids.shape[1], "width": width, "device": device}
        print(to_json({**settings, **found, "deviation": spread, "seconds": took}), flush=True)


if __name__ == "__main__":
    common.main(app)
