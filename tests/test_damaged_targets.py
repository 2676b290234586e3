"""Target folders with one thing wrong: a right run or one clear error, never another text."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from toys import complaint, little_memory
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ttspec import load
from ttspec.cli import main
from ttspec.config import LearnConfig
from ttspec.errors import TargetError, TtspecError

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "dtype": "float32",
}
PLAIN_HEADS = {
    k: v
    for k, v in SHAPE.items()
    if k not in ("num_key_value_heads", "head_dim", "intermediate_size")
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**PLAIN_HEADS, n_inner=64)),
}


def make_opt(context: int = 64) -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            **PLAIN_HEADS | {"max_position_embeddings": context},
            ffn_dim=64,
            word_embed_proj_dim=32,
            init_std=0.2,
        )
    )


PROMPT = list(b"def main")
TENSORS = ("missing", "renamed", "resized", "nan")
VALUES = [None, 0, -1, 3, 7.5, True, False, "text", "", [], {}, [1, 2], {"a": 1}, 10**6, 1e9]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, make in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            make().save_pretrained(folders[name])
        byte_tokenizer().save_pretrained(folders[name])
    return folders


def theirs(folder: Path) -> list[int]:
    """The answer that transformers gives, loading for itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, do_sample=False, max_new_tokens=10, attention_mask=ids > -1)
    return out[0, len(PROMPT) :].tolist()


def ours(folder: Path) -> list[int] | TtspecError:
    try:
        engine = load(str(folder), "ngram", device="cpu", dtype="float32")
        result = engine.generate([PROMPT], max_new_tokens=10, temperature=0.0, learn=None)[0]
    except TtspecError as error:
        return error
    return result.token_ids


def damage_tensor(folder: Path, how: str, rng: random.Random) -> str:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = rng.choice(sorted(weights))
    weight = weights.pop(name)
    if how == "renamed":
        weights[name.replace("weight", "wieght").replace("bias", "bais")] = weight
    elif how == "resized":
        weights[name] = torch.cat([weight, weight[:2]])
    elif how == "nan":
        weight.flatten()[rng.randrange(weight.numel())] = float("nan")
        weights[name] = weight
    save_file(weights, file, metadata={"format": "pt"})
    return name


def damage_config(folder: Path, rng: random.Random) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    key = rng.choice(sorted(config))
    old = config[key]
    values = [*VALUES, str(old)]
    if isinstance(old, int) and not isinstance(old, bool):
        values += [float(old), old + 1, old * 2, old - 1, old // 2] * 2
    config[key] = rng.choice(
        [value for value in values if value != old or type(value) is not type(old)]
    )
    file.write_text(json.dumps(config))
    return f"{key} = {config[key]!r}, was {old!r}"


@pytest.mark.parametrize("case", range(100))
def test_a_damaged_folder_ends_in_a_right_run_or_one_clear_error(
    case: int, whole: dict[str, Path], tmp_path: Path
):
    rng = random.Random(case)
    folder = tmp_path / "model"
    shutil.copytree(whole[rng.choice(sorted(whole))], folder)
    if case % 5 < 2:
        how = TENSORS[case // 5 % 4]
        name = damage_tensor(folder, how, rng)
        answer = ours(folder)
        assert isinstance(answer, TtspecError), name
        assert name in str(answer)
    else:
        name = damage_config(folder, rng)
        answer = ours(folder)
    if isinstance(answer, TtspecError):
        assert len(str(answer).splitlines()) == 2, answer
        assert str(folder) in str(answer) or name.partition(" ")[0] in str(answer)
    else:
        assert answer == theirs(folder), name


@pytest.mark.parametrize("command", ["generate hi --drafter none", "doctor"])
def test_commands_say_it_in_two_lines(
    command: str, whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    name = damage_tensor(folder, "missing", random.Random(0))
    first, *more = command.split()
    place = [str(folder)] if first == "doctor" else [*more, "--target", str(folder)]
    assert main([first, *place]) == 2
    lines = complaint(capsys)
    assert len(lines) == 2
    assert f"has no tensor {name}" in lines[0]


def replaced(name: str, text: bytes):
    return lambda folder: (folder / name).write_bytes(text)


def generating(**changes: Any):
    def change(folder: Path) -> None:
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("config.json", b"null"), "config.json is no JSON object"),
        (replaced("generation_config.json", b"{"), "generation_config.json is no JSON object"),
        (replaced("generation_config.json", b"\xff\xfe\x00"), "config.json is no JSON object"),
        (replaced("tokenizer_config.json", b"[]"), "tokenizer_config.json is no JSON object"),
        (replaced("tokenizer.json", b"{}"), "its tokenizer cannot be loaded"),
        (replaced("tokenizer.json", b"\xff\xfe\x00"), "its tokenizer cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer: no tokenizer"),
        (replaced("model.safetensors", b"PK garbage"), "model.safetensors is damaged"),
        (generating(eos_token_id="x"), "eos_token_id = 'x'; it must be a whole number"),
        (generating(eos_token_id=[258, 2.5]), "eos_token_id = [258, 2.5]"),
        (generating(eos_token_id={}), "eos_token_id = {}"),
        (generating(do_sample=True, top_k="20"), "top_k = '20'; it must be a whole number"),
        (generating(do_sample=True, top_p=[0.9]), "top_p = [0.9]; it must be a number"),
        (generating(do_sample=True, temperature=True), "temperature = True"),
    ],
)
def test_files_that_hold_something_else_are_named(
    change: Any, message: str, whole: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    change(folder)
    answer = ours(folder)
    assert isinstance(answer, TtspecError)
    assert message in str(answer)
    assert len(str(answer).splitlines()) == 2


@pytest.mark.parametrize("number", [10**6, 10**9])
@pytest.mark.parametrize(
    ("which", "key", "message"),
    [
        ("llama", "num_hidden_layers", ": num_hidden_layers is {:,}; the files hold 21 tensors."),
        ("gpt2", "n_layer", ": n_layer is {:,}; the files hold 28 tensors."),
        ("llama", "intermediate_size", " asks for a model of "),
        ("qwen3", "vocab_size", " asks for a model of "),
        ("gpt2", "n_positions", " asks for a model of "),
    ],
)
def test_sizes_that_no_file_can_hold_are_refused_before_they_take_memory(
    which: str, key: str, message: str, number: int, whole: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(whole[which], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: number}))
    with little_memory(2**29):
        answer = ours(folder)
    assert isinstance(answer, TargetError)
    assert f"{folder}{message.format(number)}" in str(answer)
    assert "must belong together" in str(answer)


def test_a_resized_embedding_is_told_with_both_sizes_and_what_to_set(
    whole: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(whole["qwen3"], folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(264)
    save_file(
        {k: w.contiguous() for k, w in model.state_dict().items() if k != "lm_head.weight"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    message = str(ours(folder))
    assert "embed_tokens.weight" in message
    assert "[264, 32]" in message
    assert "[260, 32]" in message
    assert "set vocab_size to 264" in message
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 264}))
    assert ours(folder) == theirs(folder)


def test_no_process_draws_what_is_missing(whole: dict[str, Path], tmp_path: Path):
    """What transformers loads is of another text every time: that is what must not be."""
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    drawn = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for _ in range(2)]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(drawn[0][name], drawn[1][name])
    assert "has no tensor " + name in str(ours(folder))


def test_weights_that_float16_cannot_hold_are_refused_with_the_dtype(
    whole: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(ours(folder), list)
    with pytest.raises(
        TargetError, match=r"model.norm.weight holds infinity in float16.\n.*float32"
    ):
        load(str(folder), None, device="cpu", dtype="float16")


def changed(folder: Path, *, times: dict[str, float], largest: int | None = None) -> None:
    """Scale weights by the end of their names; give one token the largest embedding there is."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        weight *= next((factor for end, factor in times.items() if name.endswith(end)), 1.0)
    if largest is not None:
        weights["model.embed_tokens.weight"][largest] = 65504.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_logits_that_overflow_are_told_with_the_dtype_and_what_to_do(
    temperature: float, drafter: str, whole: dict[str, Path], tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    changed(folder, times={"o_proj.weight": 3e4, "v_proj.weight": 3e4})
    engine = load(str(folder), drafter, device="cpu", dtype="float16")
    for options in ({"temperature": temperature}, {"temperature": 0.8, "top_p": 0.9, "top_k": 5}):
        with pytest.raises(TargetError, match=r"NaN\) in float16.*\n.*bfloat16 or float32"):
            engine.generate([PROMPT], max_new_tokens=10, **options)


@pytest.mark.parametrize("acceptance", ["invariant", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_overflow_in_the_middle_of_an_answer_is_told_and_the_next_answer_is_right(
    acceptance: str, temperature: float, whole: dict[str, Path], tmp_path: Path
):
    """Once its third token is read, the hidden state grows past what float16 holds."""
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    changed(folder, times={"down_proj.weight": 100.0})
    options: dict[str, Any] = {"temperature": temperature, "seed": 5, "acceptance": acceptance}
    options |= {"ignore_eos": True, "learn": None}
    engine = load(str(folder), "none", device="cpu", dtype="float16")
    clean = engine.generate([PROMPT], max_new_tokens=10, **options)[0].token_ids
    assert clean[2] not in [*PROMPT, *clean[:2]]
    changed(folder, times={}, largest=clean[2])
    for drafter in ("none", "ngram"):
        engine = load(str(folder), drafter, device="cpu", dtype="float16")
        for _ in range(2):
            found = engine.generate([PROMPT], max_new_tokens=3, **options)[0].token_ids
            assert found == clean[:3]
            with pytest.raises(TargetError, match=r"NaN\) in float16"):
                engine.generate([PROMPT], max_new_tokens=10, **options)
        with pytest.raises(TargetError, match=r"NaN\) in float16"):
            engine.generate([[*PROMPT, clean[2]]], max_new_tokens=1, **options)


@pytest.mark.parametrize("which", ["opt", "gpt2"])
@pytest.mark.parametrize("learn", [False, True])
def test_a_table_of_positions_is_enough_to_the_last_token(which: str, learn: bool, tmp_path: Path):
    """Rows that rest, and drafts that pass the end, are looked up nowhere."""
    folder = tmp_path / which
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = make_opt() if which == "opt" else MODELS["gpt2"]()
    model.eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    draft = tmp_path / "draft"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        (make_opt(32) if which == "opt" else MODELS["gpt2"]()).save_pretrained(draft)
    byte_tokenizer().save_pretrained(draft)
    prompts = [PROMPT, [65], list(range(50)), [66, 67] * 31]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            while ids.shape[1] < 64:
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        wanted.append(ids[0, len(prompt) :].tolist())
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 100}
    options["learn"] = LearnConfig(stride=8) if learn else None
    for drafter in [str(draft)] if learn else ["ngram", str(draft)]:
        engine = load(str(folder), drafter, device="cpu", dtype="float32")
        together = engine.generate(prompts, **options)
        assert [result.token_ids for result in together] == wanted
        assert {result.finish_reason for result in together} == {"context"}
        assert engine.generate(prompts[2], **options)[0].token_ids == wanted[2]
