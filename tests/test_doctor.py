"""What would silently kill acceptance: each pitfall is named, and the right reading is measured."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import load_file, save_file
from toys import CONFIGS, complaint, make_drafter, make_kind, twin
from transformers import LlamaConfig, LlamaForCausalLM

from ttspec import load
from ttspec.cli import main
from ttspec.decoding.engine import Engine
from ttspec.diagnosis.findings import Finding, examine
from ttspec.diagnosis.memory import memory, memory_finding
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import make_drafter as make_drafter_of
from ttspec.drafters.checkpoint import save_drafter
from ttspec.models.target import Target, wrap_target

MANIFESTS = sorted((Path(__file__).parent / "manifests").glob("*.json"))
EAGLE = "eagle_aux_hidden_state_layer_ids"
THINKING = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def toy_target(tokenizer: Any = None, **config: Any) -> Target:
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **config}))
    return wrap_target(model, tokenizer or byte_tokenizer())


@pytest.fixture(scope="module")
def plain_target() -> Target:
    return toy_target()


def found_in(target: Target, drafter: Drafter | None) -> dict[str, Finding]:
    return {f.name: f for f in examine(Engine(twin(target), drafter))}


def changed(which: str, *gone: str, **config: Any) -> Drafter:
    """A toy drafter whose config has other keys; None stays a value."""
    kind, base = CONFIGS[which]
    full = {k: v for k, v in {**base, **config}.items() if k not in gone}
    drafter = make_drafter_of(kind, full)
    drafter.weights = make_kind(which, **config).weights
    return drafter


def on_disk(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """The random drafter in another number format."""
    make_drafter(folder, **config)
    for file in folder.glob("*.safetensors"):
        save_file({k: w.to(dtype) for k, w in load_file(file).items()}, file)
    return folder


# What the files say.

ROPE = {"rope_type": "linear", "factor": 4.0}
PITFALLS: list[tuple[str, str, tuple[str, ...], dict[str, Any], dict[str, Any], str, str]] = [
    # finding, drafter, keys removed, its config, the target's, level, text
    ("mask token", "dflash", (), {"dflash_config": {"mask_token_id": 65}}, {}, "warning",
     "a token of ordinary text"),
    ("mask token", "pard", (), {"pard_token": 65}, {}, "warning", "a token of ordinary text"),
    ("taps", "dflash", (), {"dflash_config": {"mask_token_id": 259}}, {}, "warning",
     "a default rule"),
    ("taps", "dflash", (), {"dflash_config": {"mask_token_id": 259, "target_layer_ids": [2, 2]}},
     {}, "warning", "look like the other convention"),
    ("taps", "dflash", (), {"aux_hidden_state_layer_ids": [1, 1]}, {}, "warning",
     "other convention"),
    ("taps", "dflash", (), {"num_target_layers": 36}, {}, "warning", "the target has 4"),
    ("taps", "eagle3", ("eagle_config",), {}, {"num_hidden_layers": 6}, "note", "a default rule"),
    ("taps", "eagle3", (), {"eagle_config": {EAGLE: [2, 3, 4]}}, {}, "warning", "other convention"),
    ("taps", "eagle3", (), {EAGLE: [1, 2, 3]}, {}, "warning", "look like the other convention"),
    ("rope base", "dflash", (), {}, {"rope_theta": 1e6}, "warning",
     "10000 (given), target 1000000"),
    ("rope base", "dflash", ("rope_theta",), {}, {"rope_theta": 1e6}, "warning", "no rope_theta"),
    ("rope base", "dflash", ("rope_theta",), {}, {}, "note", "a default"),
    ("rope base", "eagle3", ("rope_theta",), {}, {"rope_theta": 5e5}, "note",
     "as the published training code"),
    ("rope base", "eagle3", (), {}, {"rope_theta": 5e5}, "note", "as the published training code"),
    ("rope base", "eagle3", (), {"architectures": ["Eagle3LlamaForCausalLM"], "rope_theta": 1e6},
     {"rope_theta": 1e6}, "warning", "whatever rope_theta says"),
    ("rope base", "eagle3", (), {"rope_theta": 1e6}, {"rope_theta": 1e6}, "note",
     "some training code used 10000"),
    ("rope base", "pard", ("rope_theta",), {}, {"rope_theta": 1e6}, "warning", "no rope_theta"),
    ("rope base", "causal", (), {}, {"rope_theta": 1e6}, "ok", "a base of its own"),
    ("rms_norm_eps", "pard", ("rms_norm_eps",), {}, {}, "note", "transformers' default"),
    ("rms_norm_eps", "causal", ("rms_norm_eps",), {}, {"rms_norm_eps": 1e-5}, "warning",
     "target 1e-05"),
    ("rope scaling", "dflash", (), {}, {"rope_parameters": {**ROPE, "rope_theta": 1e4}}, "warning",
     "none, target linear, factor 4"),
    ("rope scaling", "eagle3", (), {}, {"rope_parameters": {**ROPE, "rope_theta": 1e4}}, "note",
     "as the published training code"),
    ("rope scaling", "pard", (), {"rope_scaling": ROPE}, {}, "note",
     "linear, factor 4, target none"),
    ("positions", "eagle3", (), {"max_position_embeddings": 128}, {}, "warning",
     "made for 128, target 512"),
    ("positions", "dflash", (), {}, {}, "note", "no max_position_embeddings"),
    ("window", "dflash", (), {"sliding_window": 64, "use_sliding_window": False}, {}, "note",
     "switched off by use_sliding_window: false"),
    ("window", "causal-qwen2", (), {"sliding_window": 64, "use_sliding_window": False}, {}, "note",
     "switched off by use_sliding_window: false"),
    ("window", "dflash", (), {"sliding_window": 64, "use_sliding_window": True}, {}, "warning",
     "no layer_types beside it"),
    ("window", "dflash-sliding", ("sliding_window",), {}, {}, "warning", "no sliding_window says"),
    ("window", "dflash-sliding", (), {"use_sliding_window": False}, {}, "warning", "say one thing"),
    ("window", "dflash-sliding", (), {}, {}, "note", "1 of 2 layers see the last 8 tokens only"),
    ("window", "eagle3", (), {"layer_types": ["sliding_attention"], "sliding_window": 64}, {},
     "note", "1 of 1 layers see the last 64 tokens only"),
    ("window", "eagle3", (), {"sliding_window": 64}, {}, "note", "try --draft.window 64"),
    ("rope base", "dflash", (), {"rope_parameters": {"rope_theta": 1e6}}, {}, "warning",
     "1000000 (given)"),
    ("vocabulary", "eagle3", (), {}, {}, "note", "120 of 260 target tokens (46%) can be drafted"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "which", "gone", "config", "theirs", "level", "text"),
    PITFALLS,
    ids=[f"{p[0]}-{p[1]}-{p[-1]}" for p in PITFALLS],
)
def test_a_pitfall_is_named(plain_target, name, which, gone, config, theirs, level, text):
    target = toy_target(**theirs) if theirs else plain_target
    finding = found_in(target, changed(which, *gone, **config))[name]
    assert (finding.level, text in finding.text) == (level, True), finding


@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard", "pard2", "causal"])
def test_a_sound_drafter_gets_no_warning(plain_target, which):
    found = found_in(plain_target, make_kind(which)).values()
    assert [f for f in found if f.level in ("warning", "problem")] == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_nobody_cries_wolf_over_a_published_drafter(path):
    """All but a short position limit, which really costs acceptance."""
    manifest = json.loads(path.read_text())
    drafter = make_drafter_of(manifest["kind"], manifest["config"], manifest["tensors"])
    drafter._bind_taps(manifest["target"]["layers"])
    if manifest["kind"] == "eagle3" and not drafter.taps:
        drafter.taps = tuple(manifest["taps"])
    drafter.weights, drafter.embedding = {"fc.weight": torch.empty(1)}, torch.empty(0)
    llama = "llama" in path.stem
    newer = any(name in path.stem for name in ("qwen3.5", "3.6", "qwen3.8"))
    base = 5e5 if llama else 1e7 if newer else 1e6
    rope: dict[str, Any] = {"rope_theta": base}
    if llama:
        scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= scaled | {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    shape = {"num_hidden_layers": manifest["target"]["layers"], "vocab_size": 260}
    tokenizer = byte_tokenizer()
    target = SimpleNamespace(
        config=LlamaConfig(**shape, rope_parameters=rope, rms_norm_eps=1e-6),
        tokenizer=tokenizer,
        context=32768,
        windows=(None,),
        dtype=torch.bfloat16,
    )
    found = examine(SimpleNamespace(target=target, drafter=drafter))  # type: ignore[arg-type]
    loud = {f.name for f in found if f.level in ("warning", "problem")}
    real = set()
    if (manifest["config"].get("max_position_embeddings") or 32768) < 32768:
        real.add("positions")
    assert loud == real, [f for f in found if f.name in loud - real]


def test_a_head_with_another_tokenizer_is_a_problem(toy_target_dir, tmp_path, capsys):
    folder = make_drafter(tmp_path / "d")
    byte_tokenizer().save_pretrained(folder)
    assert main(["doctor", str(toy_target_dir), str(folder), "--json"]) == 0
    assert by_name(capsys)["vocabulary"]["level"] == "ok"
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokens))
    assert main(["doctor", str(toy_target_dir), str(folder), "--json"]) == 1
    finding = by_name(capsys)["vocabulary"]
    assert finding["level"] == "problem"
    assert "2 tokens another id" in finding["text"]


def test_a_draft_model_is_told_how_much_it_shares(plain_target, tmp_path):
    drafter = make_kind("causal")
    save_drafter(tmp_path / "d", drafter.config, drafter.weights)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "tokenizer.json"
    tokens = json.loads(path.read_text())
    known = sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get)
    tokens["model"]["vocab"] = {t if i < 200 else f"x{i}": i for i, t in enumerate(known)}
    path.write_text(json.dumps(tokens))
    drafter.path = tmp_path / "d"
    finding = found_in(plain_target, drafter)["vocabulary"]
    assert finding.level == "warning"
    assert "204 of 260 target tokens (78%)" in finding.text


def test_a_lost_vocabulary_map_is_noticed(plain_target):
    drafter = make_kind("eagle3")
    drafter.weights["d2t"] = torch.zeros(120, dtype=torch.long)
    finding = found_in(plain_target, drafter)["vocabulary"]
    assert finding.level == "warning"
    assert "d2t is all zeros" in finding.text


@pytest.mark.parametrize(
    ("stored", "run", "level", "text"),
    [
        (torch.float32, "float32", "ok", "stored as float32, run in float32"),
        (torch.bfloat16, "float32", "ok", "stored as bfloat16"),
        (torch.float32, "bfloat16", "note", "weights are rounded, its head too"),
        (torch.float16, "bfloat16", "note", "stored as float16, run in bfloat16"),
        (torch.bfloat16, "float16", "warning", "large values overflow"),
    ],
)
def test_the_stored_format_is_compared_with_the_run(
    toy_target_dir, tmp_path, stored, run, level, text
):
    folder = on_disk(tmp_path / "d", stored)
    engine = load(str(toy_target_dir), str(folder), device="cpu", dtype=run)
    finding = {f.name: f for f in examine(engine)}["dtype"]
    assert (finding.level, text in finding.text) == (level, True), finding


@pytest.mark.parametrize(
    ("template", "level", "text"),
    [
        (THINKING, "note", "our prompts leave it on"),
        (THINKING.replace("not enable_thinking", "enable_thinking"), "note", "leave it off"),
        ("{{ messages[0]['content'] }}<think>", "note", "no switch changes our prompts"),
        ("{{ messages[0]['content'] }}", "ok", "no thinking mode"),
    ],
)
def test_the_thinking_mode_of_our_prompts_is_told(plain_target, template, level, text):
    target = twin(plain_target)
    target.tokenizer = byte_tokenizer()
    target.tokenizer.chat_template = template
    finding = found_in(target, None)["thinking"]
    assert (finding.level, text in finding.text) == (level, True), finding


def test_memory_of_a_run_is_rows_times_context(engine):
    one, many = memory(engine, 1, 1000), memory(engine, 3, 2000)
    fixed = one["target_weights"] + one["drafter_weights"]
    cache = one["target_cache_per_1000_tokens"] + one["drafter_cache_per_1000_tokens"]
    assert one["total"] == fixed + cache + one["learning_per_row"] + one["work"]
    assert many["total"] == fixed + 3 * (2 * cache + one["learning_per_row"]) + many["work"]
    cpu = torch.device("cpu")
    assert memory_finding(many, cpu).level == "ok"
    short = memory_finding(many | {"total": 2**60}, cpu)
    assert short.level == "warning"
    assert "fewer rows" in short.text


# What the command says.


def by_name(capsys) -> dict[str, dict[str, str]]:
    told = json.loads(capsys.readouterr().out)
    for finding in told["findings"]:
        assert finding.keys() == {"name", "level", "text"}
        assert finding["level"] in ("ok", "note", "warning", "problem")
    return {f["name"]: f for f in told["findings"]}


def test_a_drafter_that_does_not_fit_is_a_problem(toy_target_dir, tmp_path, capsys):
    folder = make_drafter(tmp_path / "d", vocab_size=300)
    assert main(["doctor", str(toy_target_dir), str(folder), "--probe", "--json"]) == 1
    finding = by_name(capsys)["fit"]
    assert finding["level"] == "problem"
    assert "vocabulary" in finding["text"]


def test_warnings_do_not_fail(toy_target_dir, tmp_path, capsys):
    folder = make_drafter(tmp_path / "d", num_target_layers=30)
    assert main(["doctor", str(toy_target_dir), str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "taps          warning  num_target_layers is 30, the target has 4" in printed
    assert max(map(len, printed.splitlines())) <= 100 + len(str(tmp_path))


def test_rows_and_context_are_taken_into_the_total(pair, capsys):
    _, target, _, drafter, *_ = pair
    command = ["doctor", target, drafter, "--rows", "4", "--context", "300", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["memory"]["rows"], told["memory"]["context"]) == (4, 300)
    assert main(["doctor", target, drafter, "--rows", "0"]) == 2
    assert '"0" for --rows' in complaint(capsys)[0]


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_a_probe_needs_weights(toy_target_dir, capsys, drafter):
    assert main(["doctor", str(toy_target_dir), drafter]) == 0
    capsys.readouterr()
    assert main(["doctor", str(toy_target_dir), drafter, "--probe"]) == 2
    err = capsys.readouterr().err
    assert f"--probe measures a drafter's weights; {drafter} has none." in err


def test_a_probe_is_a_table_and_a_list(pair, capsys):
    _, target, _, drafter, *_ = pair
    assert main(["doctor", target, drafter, "--probe"]) == 0
    printed = capsys.readouterr().out
    assert "  probe         " in printed
    assert "  as read     " in printed
    assert "  taps + 1    " in printed
    assert main(["doctor", target, drafter, "--probe", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["probe"]
    assert [r["name"] for r in rows][:3] == ["as read", "taps - 1", "taps + 1"]
    assert {r["positions"] for r in rows} == {rows[0]["positions"]}
    for row in rows:
        assert 0 <= row["low"] <= row["acceptance"] <= row["high"] <= 1


@pytest.mark.weights
def test_the_bundled_pair_is_sound(smollm2_dir):
    engine = load("smollm2-135m", device="cpu", dtype="float32")
    assert {f.name: f.level for f in examine(engine) if f.level != "ok"} == {}
    assert {"vocabulary", "taps", "rope base", "positions"} <= {f.name for f in examine(engine)}
