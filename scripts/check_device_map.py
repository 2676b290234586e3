"""A target split over two GPUs against the same on one: the same text and acceptance, in float32.

To be run by hand on a machine with two GPUs and accelerate. Makes a random Llama, so that no
checkpoint is needed; a copy of it drafts, and so does a random DFlash drafter, which reads
features of layers on both GPUs and learns. `--dry` does the same, shorter, on a CPU, split over
nothing.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ttspec
from ttspec.bench.results import first_difference
from ttspec.drafters.checkpoint import make_drafter
from ttspec.drafters.dflash import DFlash

WIDTH, LAYERS, VOCABULARY = 512, 8, 260
TARGET = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.06,  # at 0.02 a random model says one token for ever
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    dtype="float32",
)
DRAFTER: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": WIDTH // 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "block_size": 5,
    "vocab_size": VOCABULARY,
    "num_target_layers": LAYERS,
    "dflash_config": {"mask_token_id": VOCABULARY - 1, "target_layer_ids": [1, 3, 6]},
}
LEARN = ttspec.LearnConfig(stride=2, lr=3e-3, publish="now")
app = App(help=__doc__)


def made(folder: Path) -> None:
    """A random target with a byte tokenizer, the same every time."""
    torch.manual_seed(0)
    LlamaForCausalLM(TARGET).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def drafter() -> DFlash:
    """A random drafter, the same every time."""
    new = make_drafter("dflash", DRAFTER)
    noise = torch.Generator().manual_seed(1)
    new.weights = {
        name: torch.ones(shape) if len(shape) == 1 else 0.05 * torch.randn(shape, generator=noise)
        for name, shape in new.shapes().items()
    }
    assert isinstance(new, DFlash)
    return new


def halves(places: tuple[Any, Any]) -> dict[str, Any]:
    """A device map by hand: embedding and half of the layers here, the rest and the head there."""
    first = ["model.embed_tokens", "model.rotary_emb"]
    first += [f"model.layers.{i}" for i in range(LAYERS // 2)]
    second = [f"model.layers.{i}" for i in range(LAYERS // 2, LAYERS)] + ["model.norm", "lm_head"]
    return dict.fromkeys(first, places[0]) | dict.fromkeys(second, places[1])


def generated(
    folder: Path, which: str, device: str, device_map: Any, tokens: int
) -> dict[str, Any]:
    """What one way of loading generates, in two rows."""
    engine = ttspec.load(
        str(folder),
        {"plain": None, "copy": str(folder), "dflash, learning": drafter()}[which],
        device=device,
        dtype="float32",
        device_map=device_map,
    )
    places = getattr(engine.target.model, "hf_device_map", {})
    results = engine.generate(
        [[1, 2, 3] * 40, [7, 8]],
        max_new_tokens=tokens,
        temperature=0.0,
        learn=LEARN if "learning" in which else None,
    )
    return {
        "devices": len({str(place) for place in places.values()}) or 1,
        "tokens": [r.token_ids for r in results],
        "acceptance": [round(r.stats.acceptance_length, 6) for r in results],
        "updates": [r.stats.updates for r in results],
    }


@app.default
def check(*, dry: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Compare; 1 if anything differs."""
    device, places = ("cpu", ("cpu", "cpu")) if dry else ("cuda", (0, 1))
    failed, tokens = False, 40 if dry else 400
    with TemporaryDirectory() as work:
        folder = Path(work)
        made(folder)
        for which in ("plain", "copy", "dflash, learning"):
            one = generated(folder, which, device, None, tokens)
            print(f"{which:<18} one device    acceptance {one['acceptance']}")
            maps = {"halves": halves(places)} | ({} if dry else {"auto": "auto"})
            for name, spread in maps.items():
                split = generated(folder, which, device, spread, tokens)
                same = all(one[key] == split[key] for key in ("tokens", "acceptance", "updates"))
                failed |= not same or (not dry and split["devices"] != 2)
                print(
                    f"{'':<18} {name:<13} acceptance {split['acceptance']}, "
                    f"{split['devices']} devices: {'the same' if same else 'DIFFERENT'}"
                )
                if not same:
                    at = list(map(first_difference, one["tokens"], split["tokens"]))
                    print(f"{'':<18} rows differ from token {at}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(app())
