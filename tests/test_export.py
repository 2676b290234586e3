"""Drafters written for other tools: nothing is missing, and what comes back drafts the same."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import edit_weights, proposal_logits, put
from toys import (
    CONFIGS,
    MASK,
    SLIDING,
    VOCABULARY,
    complaint,
    full_disk,
    make_kind,
    toy_engine,
    twin,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ttspec import LearnConfig, load
from ttspec.cli import main
from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import find_drafter
from ttspec.drafters import export
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter, read_config, save_drafter
from ttspec.drafters.export import export_drafter
from ttspec.drafters.ngram import Ngram
from ttspec.errors import CheckpointError, OptionError

BLOCKS = [
    name
    for name, (kind, _) in CONFIGS.items()
    if kind in ("dflash", "dflash2", "dspark", "eagle3", "peagle")
]
MODELS = [name for name, (kind, _) in CONFIGS.items() if kind in ("pard", "causal")]
HEADS = [name for name, (kind, _) in CONFIGS.items() if kind == "mtp"]
BOTH = [(name, form) for name in BLOCKS for form in ("published", "speculators")]
DOMINO = [name for name, (kind, _) in CONFIGS.items() if kind == "domino"]
EVERY = [*BOTH, *[(name, "published") for name in (*DOMINO, *MODELS, *HEADS)]]
LAYERS = [1, 3, 4]
"""Taps that no reader mistakes for another convention's."""
REDUCED = {"draft_vocab_size": 120}
OPTIONS = {"max_new_tokens": 16, "seed": 5, "ignore_eos": True, "temperature": 1.5}


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


@pytest.fixture(scope="module")
def tied(toy_target_dir, tmp_path_factory):
    """A target whose head is its embedding, in a folder."""
    engine = load(str(toy_target_dir), None, device="cpu", dtype="float32")
    folder = tmp_path_factory.mktemp("tied")
    engine.target.config.tie_word_embeddings = True
    engine.target.model.tie_weights()
    engine.target.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return load(str(folder), None, device="cpu", dtype="float32").target


def engine_of(target, which: str, **config: Any) -> Engine:
    return Engine(twin(target), make_kind(which, **config))


def exported(engine: Engine, form: str, folder: Path, dtype: str = "float32") -> Engine:
    """The engine of what was written, for the same target in memory."""
    assert engine.drafter is not None
    export_drafter(engine.drafter, engine.target, form, folder, dtype=dtype)
    return Engine(twin(engine.target), find_drafter(str(folder)))


def rounds(engine: Engine, **options: Any) -> list[Any]:
    """What is drafted and accepted, with weights as they are."""
    results = engine.generate(["hello", "count, please"], learn=None, **{**OPTIONS, **options})
    return [[(r.proposed, r.accepted, r.emitted) for r in result.rounds] for result in results]


def same_drafts(a: Engine, b: Engine) -> None:
    """The drafters of two engines read the same of a target, and draft the same, to the bit."""
    assert a.drafter is not None
    assert b.drafter is not None
    assert a.drafter.kind == b.drafter.kind
    assert a.drafter.taps == b.drafter.taps
    assert a.drafter.length == b.drafter.length
    logits = [proposal_logits(aligned(e.drafter)) for e in (a, b)]
    assert torch.equal(*logits)


def same(a: Engine, b: Engine) -> list[Any]:
    """Two engines draft the same, and so they do in rounds; returns what they do."""
    same_drafts(a, b)
    done = rounds(a)
    assert rounds(b) == done
    return done


def aligned(drafter: Drafter) -> Drafter:
    """The same in memory of its own: products of a file's mapped memory may round otherwise."""
    drafter = copy.copy(drafter)
    drafter.weights = {name: weight.clone() for name, weight in drafter.weights.items()}
    for table in ("head", "_lent_head"):
        if table in vars(drafter):
            setattr(drafter, table, getattr(drafter, table).clone())
    return drafter


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("which", "form"), EVERY)
def test_an_export_drafts_what_its_source_drafts(target, tmp_path, which, form):
    engine = engine_of(target, which)
    written = exported(engine, form, tmp_path / "out")
    assert any(accepted for row in same(engine, written) for _, accepted, _ in row)
    config = read_config(tmp_path / "out")
    assert ("speculators_model_type" in config) == (form == "speculators")
    assert "rebuilt" not in json.dumps(config)


@pytest.mark.parametrize(("which", "form"), BOTH)
def test_an_export_of_an_export_and_back_has_the_same_tensors(target, tmp_path, which, form):
    other = "published" if form == "speculators" else "speculators"
    first = exported(engine_of(target, which), form, tmp_path / "1")
    second = exported(first, other, tmp_path / "2")
    third = exported(second, form, tmp_path / "3")
    same(first, third)
    one, three = stored(tmp_path / "1"), stored(tmp_path / "3")
    assert one.keys() == three.keys()
    assert all(torch.equal(one[n], three[n]) and one[n].dtype == three[n].dtype for n in one)
    names = set(one) ^ set(stored(tmp_path / "2"))
    assert "embed_tokens.weight" in names


CHANGES = {
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "old rope type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "partial rotation": {"partial_rotary_factor": 0.5},
    "draft vocabulary": REDUCED,
    "whole vocabulary": {"draft_vocab_size": VOCABULARY},
    "causal": {"is_causal": True, **SLIDING},
    "not causal": {"is_causal": False, **SLIDING},
    "causal everywhere": {"is_causal": True},
    "activation": {"hidden_act": "gelu"},
    "rotary layout": {"is_neox_style": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of q, k and v": {"qkv_bias": True},
    "scales": {"embed_scale": 3.0, "logit_scale": 0.5, "final_logit_softcapping": 20.0},
    "a stale base": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "mrope": {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
}


@pytest.mark.parametrize(
    ("change", "form"),  # either format comes first in every other one
    [(name, ("published", "speculators")[i % 2]) for i, name in enumerate(CHANGES)],
)
@pytest.mark.parametrize("which", ["dflash", "eagle3"])
def test_what_a_config_says_survives_both_formats(target, tmp_path, which, change, form):
    if which == "eagle3" and "causal" in change:
        return  # it always is
    engine = engine_of(target, which, **CHANGES[change])
    other = "published" if form == "speculators" else "speculators"
    first = exported(engine, form, tmp_path / "1")
    same_drafts(engine, first)
    same_drafts(engine, exported(first, other, tmp_path / "2"))
    if which == "dflash":
        assert first.drafter.causal == engine.drafter.causal
        assert first.drafter.windows == engine.drafter.windows


def test_vllm_finds_the_keys_it_reads_in_a_dflash_config_of_speculators(target, tmp_path):
    engine = engine_of(target, "dflash-sliding", is_causal=False)
    exported(engine, "speculators", tmp_path / "d")
    config = read_config(tmp_path / "d")
    assert "model_type" not in config
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["speculators_model_type"] == "dflash"
    assert config["aux_hidden_state_layer_ids"] == [1, 3]
    assert config["block_size"] == 5
    assert config["mask_token_id"] == MASK
    assert config["draft_vocab_size"] == VOCABULARY
    assert config["sliding_window_non_causal"] is True
    assert config["sample_from_anchor"] is False
    assert config["dtype"] == "float32"
    method = config["speculators_config"]["proposal_methods"][0]
    assert method["speculative_tokens"] == 4
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": target.name, "architectures": ["LlamaForCausalLM"]}
    body = config["transformer_layer_config"]
    assert body["model_type"] == "qwen3"
    assert body["layer_types"] == ["sliding_attention", "full_attention"]
    assert body["sliding_window"] == 8
    assert body["max_position_embeddings"] == 512
    assert body["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    weights = stored(tmp_path / "d")
    assert torch.equal(weights["embed_tokens.weight"], target.embedding)
    assert torch.equal(weights["lm_head.weight"], target.head)


def test_a_dflash_config_as_published_stays_as_it_is(target, tmp_path):
    engine = engine_of(target, "dflash")
    exported(engine, "published", tmp_path / "d")
    assert read_config(tmp_path / "d") == {**CONFIGS["dflash"][1], "torch_dtype": "float32"}
    exported(exported(engine, "speculators", tmp_path / "s"), "published", tmp_path / "back")
    back = read_config(tmp_path / "back")
    assert back["dflash_config"] == CONFIGS["dflash"][1]["dflash_config"]
    assert back.items() >= {"block_size": 5, "num_target_layers": 4, "rope_theta": 1e4}.items()
    assert stored(tmp_path / "back").keys() == stored(tmp_path / "d").keys()


def test_an_original_eagle3_config_says_what_readers_would_guess(target, tmp_path):
    exported(engine_of(target, "eagle3", rope_theta=None), "published", tmp_path / "e")
    config = read_config(tmp_path / "e")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    assert "eagle_config" not in config
    assert config["rope_theta"] == 10000.0
    assert config["norm_before_residual"] is False
    assert not config.keys() & {"norm_before_fc", "fc_norm", "norm_output", "target_hidden_size"}
    assert config["attention_bias"] is config["mlp_bias"] is False
    assert config["ttspec"] == {"length": 4}
    weights = stored(tmp_path / "e")
    assert "embed_tokens.weight" not in weights
    assert "midlayer.mlp.up_proj.weight" in weights
    ids = weights["d2t"] + torch.arange(120)
    assert weights["t2d"].nonzero()[:, 0].tolist() == ids.tolist()


def test_an_eagle3_config_of_speculators_says_every_switch(target, tmp_path):
    exported(engine_of(target, "eagle3.1"), "speculators", tmp_path / "e")
    config = read_config(tmp_path / "e")
    switches = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    assert [config[key] for key in switches] == [False, False, True, True]
    assert config["target_hidden_size"] is None
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert "model_type" not in config
    weights = stored(tmp_path / "e")
    assert "layers.0.mlp.up_proj.weight" in weights
    assert "embed_tokens.weight" in weights
    exported(engine_of(target, "eagle3-qk-norm"), "speculators", tmp_path / "q")
    assert read_config(tmp_path / "q")["transformer_layer_config"]["model_type"] == "qwen3"


def test_taps_that_readers_would_take_for_others_are_refused(target, tmp_path):
    engine = engine_of(
        target, "eagle3", eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    )
    assert engine.drafter.taps == (1, 2, 3)
    with pytest.raises(CheckpointError, match="begin with 1"):
        export_drafter(engine.drafter, engine.target, "published", tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_an_embedding_of_its_own_stays(target, tmp_path):
    folder = tmp_path / "own"
    drafter = make_kind("eagle3")
    save_drafter(folder, drafter.config, drafter.weights)
    edit_weights(folder, put("embed_tokens.weight", torch.randn(VOCABULARY, 64)))
    engine = Engine(twin(target), load_drafter("own", folder))
    for form in ("published", "speculators"):
        same(engine, exported(engine, form, tmp_path / form))
        assert "embed_tokens.weight" in stored(tmp_path / form)


def test_a_narrower_eagle3_keeps_its_width(target, tmp_path):
    narrow = {"hidden_size": 32, "target_hidden_size": 64}
    folder = tmp_path / "narrow"
    drafter = make_kind("eagle3", **narrow)
    save_drafter(folder, drafter.config, drafter.weights)
    edit_weights(folder, put("embed_tokens.weight", torch.randn(VOCABULARY, 32)))
    engine = Engine(twin(target), load_drafter("narrow", folder))
    for form in ("published", "speculators"):
        same(engine, exported(engine, form, tmp_path / form))
        assert read_config(tmp_path / form)["target_hidden_size"] == 64


# Tables that our own checkpoints leave out.


def left_out(which: str, tables: list[str], **config: Any) -> Drafter:
    drafter = make_kind(which, ttspec={"length": 3, "rebuilt": tables}, **config)
    assert not drafter.weights.keys() & set(tables)
    return drafter


@pytest.mark.parametrize("form", ["published", "speculators"])
def test_a_rebuilt_eagle3_head_is_written_out(target, tmp_path, form):
    engine = Engine(twin(target), left_out("eagle3", ["lm_head.weight"]))
    same(engine, exported(engine, form, tmp_path / "e"))
    weights = stored(tmp_path / "e")
    assert torch.equal(weights["lm_head.weight"], target.head[engine.drafter.draft_ids])
    assert load_drafter("e", tmp_path / "e").length == 3


@pytest.mark.parametrize("which", ["pard", "causal", "pard2"])
def test_rebuilt_tables_of_a_draft_model_are_written_out(target, tmp_path, which):
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    engine = Engine(twin(target), left_out(which, tables))
    same(engine, exported(engine, "published", tmp_path / "m"))
    weights = stored(tmp_path / "m")
    assert torch.equal(weights["model.embed_tokens.weight"], target.embedding)
    assert torch.equal(weights["lm_head.weight"], target.head)
    assert read_config(tmp_path / "m")["ttspec"] == {"length": 3}


def test_a_tied_embedding_is_written_once(tied, tmp_path):
    drafter = left_out("pard", ["model.embed_tokens.weight"], tie_word_embeddings=True)
    engine = Engine(twin(tied), drafter)
    same(engine, exported(engine, "published", tmp_path / "m"))
    weights = stored(tmp_path / "m")
    assert torch.equal(weights["model.embed_tokens.weight"], tied.embedding)
    assert "lm_head.weight" not in weights


def test_nothing_of_ours_stays_in_a_config_where_nothing_is_needed(target, tmp_path):
    tables = ["model.embed_tokens.weight"]
    engine = Engine(twin(target), make_kind("causal", ttspec={"rebuilt": tables}))
    exported(engine, "published", tmp_path / "m")
    assert "ttspec" not in read_config(tmp_path / "m")


@pytest.mark.parametrize("which", MODELS)
def test_transformers_reads_draft_models(target, tmp_path, which):
    engine = engine_of(target, which)
    drafter = exported(engine, "published", tmp_path / "m").drafter
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) <= {"target_proj.weight"}
    assert type(model).__name__ == read_config(tmp_path / "m")["architectures"][0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.get_vocab() == target.tokenizer.get_vocab()
    assert tokenizer.chat_template == target.tokenizer.chat_template
    ids = torch.tensor([tokenizer.encode("some text")])
    model_only = {n: w for n, w in engine.drafter.weights.items() if n != "target_proj.weight"}
    with torch.no_grad():
        found = model(ids).logits
        wanted = torch.func.functional_call(engine.drafter.module, model_only, (ids,))
    torch.testing.assert_close(found, wanted.logits, atol=1e-5, rtol=1e-5)
    assert drafter.interpretation.keys() == engine.drafter.interpretation.keys()


def test_a_draft_model_takes_its_own_tokenizer_along(target, tmp_path):
    folder = tmp_path / "own"
    drafter = make_kind("causal")
    save_drafter(folder, drafter.config, drafter.weights)
    target.tokenizer.save_pretrained(folder)
    edit = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**edit, "model_max_length": 77}))
    engine = Engine(twin(target), load_drafter("own", folder))
    exported(engine, "published", tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").model_max_length == 77


def test_the_tokenizer_of_a_target_without_a_folder_is_saved(target, tmp_path):
    given = load((target.model, target.tokenizer), make_kind("causal"))
    export_drafter(given.drafter, given.target, "published", tmp_path / "m")
    saved = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert saved.get_vocab() == target.tokenizer.get_vocab()


# Number formats.


def test_weights_are_bfloat16_unless_told_otherwise(target, tmp_path):
    engine = engine_of(target, "eagle3")
    export_drafter(engine.drafter, engine.target, "published", tmp_path / "e")
    kinds = {w.dtype for n, w in stored(tmp_path / "e").items() if n not in ("d2t", "t2d")}
    assert kinds == {torch.bfloat16}
    assert read_config(tmp_path / "e")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_auto_is_the_narrowest_dtype_that_loses_nothing(target, tmp_path, dtype):
    drafter = make_kind("dflash")
    kind = getattr(torch, dtype)
    drafter.weights = {n: w.to(kind) for n, w in drafter.weights.items()}
    engine = Engine(twin(target), drafter)
    same(engine, exported(engine, "published", tmp_path / "d", "auto"))
    assert {w.dtype for w in stored(tmp_path / "d").values()} == {kind}
    assert read_config(tmp_path / "d")["torch_dtype"] == dtype


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_full_disk_leaves_no_half_of_a_drafter(target, tmp_path, monkeypatch, file: str) -> None:
    engine = Engine(target, make_kind("dflash"))
    write, size = Path.write_text, 1000 if file == "model.safetensors" else 10**9

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[:5], **options)
        raise OSError(28, "No space left on device")

    if file == "config.json":
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space|File too large"), full_disk(size):
        export_drafter(engine.drafter, engine.target, "published", tmp_path / "new")
    monkeypatch.undo()
    assert not list((tmp_path / "new").iterdir())
    export_drafter(engine.drafter, engine.target, "published", tmp_path / "new")


def test_what_another_process_wrote_meanwhile_stays(target, tmp_path, monkeypatch) -> None:
    cast = export._cast

    def later_than_another(*given: Any) -> Any:
        (tmp_path / "model.safetensors").write_text("another's")
        return cast(*given)

    monkeypatch.setattr(export, "_cast", later_than_another)
    engine = Engine(target, make_kind("dflash"))
    with pytest.raises(CheckpointError, match="nothing was overwritten"):
        export_drafter(engine.drafter, engine.target, "published", tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["another's"]


def test_values_that_float16_cannot_hold_are_refused(target, tmp_path):
    drafter = make_kind("dflash")
    drafter.weights["fc.weight"][0, 0] = 1e6
    engine = Engine(twin(target), drafter)
    with pytest.raises(OptionError, match=r"fc\.weight"):
        export_drafter(engine.drafter, engine.target, "published", tmp_path / "d", dtype="float16")
    assert not (tmp_path / "d").exists()


# What was learned.

LEARN = LearnConfig(stride=1, lr=3e-2, scope="session")


# Each kind and each form: what a variant's config says is exported above, learned or not.
@pytest.mark.parametrize(
    ("which", "form"),
    [
        ("dflash", "published"),
        ("eagle3", "speculators"),
        ("pard2", "published"),
        ("causal", "published"),
    ],
)
def test_learned_weights_come_out(target, tmp_path, which, form):
    engine = engine_of(target, which)
    options = {"max_new_tokens": 12, "ignore_eos": True, "context": 200, "temperature": 0.0}
    session = engine.session(learn=LEARN, **options)
    session.send("hello")
    learned = session.learned()
    anchor = engine.drafter
    assert learned is not anchor
    assert learned.config is anchor.config
    names = set(anchor.learnable("full"))
    for name, weight in anchor.weights.items():
        assert learned.weights[name].shape == weight.shape
        assert torch.equal(learned.weights[name], weight) == (name not in names), name
    state = session._scheduler.decoder.state
    assert all(torch.equal(state.weights[n][0], learned.weights[n]) for n in names)
    now = Engine(twin(target), learned)
    assert same(now, exported(now, form, tmp_path / "out")) != rounds(engine)
    # The session goes on from where it is; what was taken out stays as it was.
    kept = {n: w.clone() for n, w in learned.weights.items()}
    session.send("and then?")
    assert all(torch.equal(kept[n], w) for n, w in learned.weights.items())
    assert not all(torch.equal(kept[n], w) for n, w in session.learned().weights.items())


def test_a_static_session_has_learned_nothing(target):
    engine = engine_of(target, "dflash")
    session = engine.session(learn=None, max_new_tokens=5)
    session.send("hello")
    learned = session.learned()
    assert all(torch.equal(learned.weights[n], w) for n, w in engine.drafter.weights.items())


def test_asking_a_session_that_drafts_nothing_for_what_it_learned_is_an_error(target):
    engine = engine_of(target, "dflash")
    session = engine.session(max_new_tokens=5)
    for ask in (session.learned, Engine(twin(target), None).session().learned):
        with pytest.raises(OptionError) as caught:
            ask()
        assert len(str(caught.value).splitlines()) == 2
    session.send("hello")
    session.learned()
    session.close()
    with pytest.raises(OptionError, match="closed"):
        session.learned()


# Refusals and the command.


def refusal(engine: Engine, form: str, folder: Path, **options: str) -> str:
    with pytest.raises(OptionError) as caught:
        export_drafter(engine.drafter, engine.target, form, folder, **options)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_nothing_is_ever_overwritten(target, tmp_path):
    engine = engine_of(target, "dflash")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        assert str(taken) in refusal(engine, "published", taken)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
    empty = tmp_path / "a" / "b"
    empty.mkdir(parents=True)
    exported(engine, "published", empty)
    before = {p.name: p.read_bytes() for p in empty.iterdir()}
    refusal(engine, "speculators", empty)
    assert {p.name: p.read_bytes() for p in empty.iterdir()} == before


def test_what_has_no_such_format_is_refused(target, tmp_path):
    for which in ("pard", "causal"):
        message = refusal(engine_of(target, which), "speculators", tmp_path / "x")
        assert "--format published" in message
        assert which in message
    assert "ngram" in refusal(Engine(twin(target), Ngram()), "published", tmp_path / "x")
    engine = engine_of(target, "dflash")
    assert "'gguf'" in refusal(engine, "gguf", tmp_path / "x")
    assert "'int8'" in refusal(engine, "published", tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("form", ["published", "speculators"])
def test_the_command_exports_a_drafter(pair, tmp_path, capsys, form):
    _, target, _, drafter, *_ = pair
    out = tmp_path / "out"
    command = ["export", drafter, "--target", target, "--format", form, "--out", str(out)]
    assert main([*command, "--dtype", "float32"]) == 0
    printed, told = capsys.readouterr()
    assert printed == ""
    assert str(out) in told
    engines = [
        load(target, str(folder), device="cpu", dtype="float32") for folder in (drafter, out)
    ]
    same(*engines)
    assert main([*command, "--dtype", "auto"]) == 2
    assert len(complaint(capsys)) == 2


@pytest.mark.parametrize("drafter", ["none", "ngram", "/nowhere", "auto"])
def test_the_command_says_what_it_cannot_export(pair, tmp_path, capsys, drafter):
    out = tmp_path / "out"
    assert main(["export", drafter, "--target", pair[1], "--out", str(out)]) == 2
    assert len(complaint(capsys)) == 2
    assert not out.exists()


def test_the_command_refuses_a_format_that_there_is_not(pair, tmp_path, capsys):
    _, target, _, _, *_ = pair
    folder = tmp_path / "m"
    drafter = make_kind("causal")
    save_drafter(folder, drafter.config, drafter.weights)
    command = ["export", str(folder), "--target", target, "--out", str(tmp_path / "out")]
    assert main([*command, "--format", "speculators"]) == 2
    assert "--format published" in complaint(capsys)[1]
    assert main([*command, "--format", "gguf"]) == 2
    capsys.readouterr()
