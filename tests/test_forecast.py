"""What is forecast is what is taken; too little memory is told before it is touched."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from torch.profiler import ProfilerActivity, profile
from toys import CONFIGS, PLAIN, make_drafter, make_kind, prefill, toy_engine
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ttspec import load
from ttspec.cli import main
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding import memory_forecast as forecast
from ttspec.decoding.engine import Engine
from ttspec.decoding.memory_forecast import (
    Forecast,
    drafter_cache_bytes,
    drafter_weight_bytes,
    forecast_run,
    learning_bytes,
    require_room,
    require_weights,
    target_cache_bytes,
)
from ttspec.diagnosis.memory import memory
from ttspec.drafters.ngram import Ngram
from ttspec.errors import ResourceError
from ttspec.free_memory import free_memory, mib
from ttspec.learning.live_weights import LiveWeights
from ttspec.models.target import find_target, wrap_target
from ttspec.training.answers import write_answers
from ttspec.training.config import TrainConfig
from ttspec.training.recipes import RECIPES

CPU = torch.device("cpu")
TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True})),
    "qwen3, wide heads": lambda: Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 32})),
    "mistral, windowed": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE)),
    "qwen3.5": lambda: Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            **SHAPE,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=16,
        )
    ),
}


def near(forecast: int | None, measured: int) -> bool:
    return forecast is not None and abs(forecast - measured) <= 0.02 * measured


@pytest.mark.parametrize("which", TARGETS)
def test_a_targets_cache_is_as_forecast(which: str):
    engine = Engine(wrap_target(TARGETS[which](), byte_tokenizer()), None)
    for dtype in (torch.float32, torch.bfloat16):
        engine.target.model.to(dtype)
        parts = memory(engine, 1, 100)
        measured = parts["target_cache_per_1000_tokens"] + parts["target_state_per_row"]
        assert near(target_cache_bytes(engine.target.config, 1, 999, dtype), measured)


@pytest.mark.parametrize("which", [*CONFIGS, "ngram"])
def test_a_drafters_memory_is_as_forecast(toy_target_dir: Path, which: str):
    drafter = Ngram() if which == "ngram" else make_kind(which)
    before = drafter_weight_bytes(drafter, torch.float32)
    engine = load(str(toy_target_dir), drafter, device="cpu", dtype="float32")
    drafter, parts = engine.drafter, memory(engine, 1, 100)
    assert near(
        drafter_cache_bytes(drafter, 1, 999, DraftConfig()), parts["drafter_cache_per_1000_tokens"]
    )
    if which == "pard-qwen3":  # a tied head in its files is dropped when it is bound
        assert before >= parts["drafter_weights"]
    else:
        assert before == parts["drafter_weights"]
    config = GenerateConfig(learn=LearnConfig(weights="full"))
    assert (
        forecast_run(engine.target, drafter, config, 3, 50).learning
        == 3 * parts["learning_per_row"]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_told_from_headers(toy_target_dir: Path, tmp_path: Path, dtype: str):
    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(toy_target_dir).save_pretrained(
        sharded, max_shard_size="100KB"
    )
    byte_tokenizer().save_pretrained(sharded)
    for folder in (toy_target_dir, sharded):
        target = load(str(folder), None, device="cpu", dtype=dtype).target
        weights = find_target(str(folder)).nbytes(target.dtype, target.device)
        assert near(weights, target.nbytes)


def test_learning_is_what_a_pupil_takes(engine: Engine):
    """Beside a live weights' own bytes, the gradient of the live copy."""
    config = LearnConfig(weights="full")
    decoder = engine.decoder(GenerateConfig(learn=config), 2, 10, sessions=False)
    own = decoder.learner.weights.nbytes
    size = sum(
        engine.drafter.weights[n].numel() for n in engine.drafter.learnable(config.parameters)
    )
    assert own <= learning_bytes(engine.drafter, config, 2) <= own + 2 * 2 * 4 * size


@pytest.mark.weights
def test_the_built_in_pair_is_as_forecast(smollm2_dir: Path):
    engine = load("smollm2-135m", "smollm2-135m-dflash", device="cpu", dtype="bfloat16")
    parts, need = (
        memory(engine, 2, 1000),
        forecast_run(engine.target, engine.drafter, GenerateConfig(), 2, 1000),
    )
    files = find_target("smollm2-135m").nbytes(torch.bfloat16, CPU)
    assert near(files, parts["target_weights"])
    weights = drafter_weight_bytes(engine.drafter, torch.bfloat16)
    assert near(weights, parts["drafter_weights"])
    assert near(need.total + files + weights, parts["total"])


# What is there.


def test_what_is_free_is_less_than_all_there_is():
    free = free_memory(CPU)
    assert free is None or free > 0
    assert free_memory(torch.device("meta")) is None


def system(root: Path, monkeypatch, *, available: int, version: int, limit: str, group: str):
    """A machine with so much memory free and a container's limit, of which half is files."""
    (root / "meminfo").write_text(f"MemAvailable: {available >> 10} kB\nSwapFree: 0 kB\n")
    line = f"0::{group}" if version == 2 else f"5:cpu,memory:{group}"
    (root / "cgroup").write_text(line + "\n")
    base = root / "fs" if version == 2 else root / "fs" / "memory"
    own = base / group.strip("/")
    own.mkdir(parents=True)
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (own / names[0]).write_text(limit)
    (own / names[1]).write_text(str(400 << 20))
    (own / "memory.stat").write_text(f"anon 1\ninactive_file {150 << 20}\nactive_file {50 << 20}\n")
    moved = {
        "/proc/meminfo": root / "meminfo",
        "/proc/self/cgroup": root / "cgroup",
        "/sys/fs/cgroup": root / "fs",
    }
    monkeypatch.setattr("ttspec.free_memory.Path", lambda name: moved.get(str(name), Path(name)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", ["/", "/box/inner"])
@pytest.mark.parametrize(
    ("available", "limit", "free"),
    [
        (8 << 30, str(1 << 30), (1 << 30) - (200 << 20)),  # files make room
        (8 << 30, "max", 8 << 30),
        (8 << 30, str(2**63 - 4096), 8 << 30),  # version 1's "no limit"
        (1 << 29, str(1 << 30), 1 << 29),
        (8 << 30, str(100 << 20), 0),
    ],
)
def test_a_containers_limit_counts(
    tmp_path, monkeypatch, version: int, group: str, available: int, limit: str, free: int
):
    where = {"version": version, "limit": limit, "group": group}
    system(tmp_path, monkeypatch, available=available, **where)
    assert free_memory(CPU) == free


# Too little.


@pytest.fixture
def has(monkeypatch):
    """Let every device have so many bytes free; None is not known."""

    def give(size: int | None) -> None:
        monkeypatch.setattr(forecast, "free_memory", lambda _: size)

    return give


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    toy_target_dir: Path, has, monkeypatch, capsys, tmp_path
):
    has(1000)
    files = find_target(str(toy_target_dir))
    wide, narrow = (mib(files.nbytes(d, CPU)) for d in (torch.float32, torch.bfloat16))
    with pytest.raises(ResourceError, match=f"take target {wide}; cpu"):  # the drafter is there
        toy_engine(toy_target_dir)
    with pytest.raises(ResourceError) as caught:
        toy_engine(toy_target_dir, dtype="bfloat16")
    first, second = str(caught.value).splitlines()
    for word in (str(toy_target_dir), f"target {narrow}", "drafter 0.1 MiB", "cpu: 0.0 MiB free"):
        assert word in first
    assert "--dtype" in second
    drafter = make_drafter(tmp_path / "drafter")
    command = ["generate", "Hi", "--target", str(toy_target_dir), "--drafter", str(drafter)]
    assert main(command) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_caches_and_learning_that_do_not_fit_on_a_gpu_are_refused_with_numbers(has):
    has(100 << 20)
    need = Forecast(target_cache=60 << 20, drafter_cache=20 << 20, learning=30 << 20)
    with pytest.raises(ResourceError) as caught:
        require_room(need, torch.device("cuda"), rows=2, slots=8192)
    assert str(caught.value).splitlines() == [
        "2 rows of 8,192 tokens take 110.0 MiB (target's cache 60.0 MiB, drafter's cache 20.0 MiB, "
        "learning 30.0 MiB); cuda: 100.0 MiB free.",
        "Use a smaller --context, fewer rows, --no-learn or --learn.weights lora.",
    ]
    has(111 << 20)
    assert require_room(need, torch.device("cuda"), rows=2, slots=8192) is None


def test_on_a_cpu_caches_that_may_never_be_full_are_a_notice(toy_target_dir: Path, has):
    engine = toy_engine(toy_target_dir)
    said: list[str] = []
    engine.notify = said.append
    has(1 << 20)
    options = {"max_new_tokens": 4, "ignore_eos": True, **PLAIN}
    assert len(engine.generate([[1, 2]] * 9, rows=9, **options)) == 9
    assert len(said) == 1
    assert said[0].startswith("9 rows of 256 tokens take")
    assert "unless they are filled" in said[0]


def test_on_a_cpu_learning_that_does_not_fit_is_refused(toy_target_dir: Path, has):
    engine = toy_engine(toy_target_dir)
    has(1 << 20)
    with pytest.raises(ResourceError, match=r"learning .* cpu: 1\.0 MiB free"):
        engine.generate([[1, 2]] * 9, max_new_tokens=4, learn=LearnConfig())


def test_nothing_is_refused_where_nothing_is_known(has):
    has(None)
    need = Forecast(target_cache=1 << 60)
    assert require_room(need, CPU, rows=1, slots=1) is None
    assert require_weights(1 << 60, 0, [CPU], name="x") is None
    has(1)
    told = require_weights(1 << 20, 0, [CPU, CPU], name="x", split=True)
    assert told == "The weights of x take target 1.0 MiB; 2 cpu devices: 0.0 MiB free."
    assert require_room(Forecast(learning=9), torch.device("cuda"), rows=1, slots=1, split=True)


def test_layers_that_are_not_understood_are_unknown():
    config = LlamaConfig(**SHAPE)
    config.num_kv_shared_layers = 2
    assert target_cache_bytes(config, 1, 10, torch.float32) is None
    assert Forecast(target_cache=None, learning=3).total == 3


# What comes and goes.


def height(work: Callable[[], object]) -> int:
    """The most bytes that torch held at once while something ran, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in sizes))


@pytest.mark.parametrize("which", ["none", "dflash", "pard"])
@pytest.mark.parametrize(
    "options",
    [
        {"learn": None, "temperature": 0.8},
        {"learn": None, "temperature": 0.8, "top_p": 0.9},
        {"learn": LearnConfig(stride=1, blocks=4, publish="now")},
        {"learn": LearnConfig(stride=1, blocks=2, supervision="block"), "temperature": 0.8},
    ],
    ids=["sampled", "nucleus", "learning", "learning from blocks"],
)
def test_what_rounds_take_is_near_the_forecast(which: str, options: dict):
    vocabulary, rows, drafter = 20_000, 6, None
    config = LlamaConfig(**{**SHAPE, "vocab_size": vocabulary})
    target = wrap_target(LlamaForCausalLM(config), byte_tokenizer())
    if which != "none":
        drafter = make_kind(which, vocab_size=vocabulary)
    if drafter is None and options["learn"]:
        pytest.skip("nothing learns")
    engine = Engine(target, drafter)
    chosen = GenerateConfig(
        seed=0, max_new_tokens=24, ignore_eos=True, draft=DraftConfig(copy=False), **options
    )
    decoder = engine.decoder(chosen, rows, 20, sessions=False)
    need = forecast_run(target, drafter, chosen, rows, decoder.rows.slots, prompt=20)

    def work() -> None:
        numbers = [*range(rows)]
        prefill(decoder, numbers, [[5] * 20] * rows, numbers, [24] * rows)
        for _ in range(5):  # one more than the blocks that are kept
            decoder.round()

    measured = height(work)
    assert 0.7 * measured < (need.working or 0) + (need.replay_buffer or 0) < 1.5 * measured


# How many rows.


def test_rows_are_as_many_as_fit_and_fewer_are_told(toy_target_dir: Path, monkeypatch):
    options = {"max_new_tokens": 4, "ignore_eos": True, "seed": 1, "learn": LearnConfig()}
    engine, said = toy_engine(toy_target_dir), []
    wanted = [r.token_ids for r in engine.generate([[1, 2]] * 9, **options)]
    engine = engine.sibling()  # without the caches of nine
    engine.notify = said.append
    pair, config = (engine.target, engine.drafter), GenerateConfig(**options)
    five, six = (forecast_run(*pair, config, n, 256, prompt=2).total for n in (5, 6))
    counts, real = [], Engine.decoder

    def decoder(self, config, rows, *given, **more):
        counts.append(rows)
        return real(self, config, rows, *given, **more)

    monkeypatch.setattr(Engine, "decoder", decoder)
    monkeypatch.setattr(
        forecast, "free_memory", lambda _: int((five + six) / 2 / forecast.USABLE_SHARE)
    )
    for _ in range(2):
        assert [r.token_ids for r in engine.generate([[1, 2]] * 9, **options)] == wanted
    assert counts == [5, 5]
    assert said == [
        "5 of 9 requests fit into memory side by side, at 256 tokens each; the others follow."
    ]
    monkeypatch.setattr(forecast, "free_memory", lambda _: None)
    assert engine.rows_for(config, 1000, 2, sessions=False) == 1000


def test_rows_that_were_asked_for_are_never_fewer(toy_target_dir: Path, monkeypatch):
    engine = toy_engine(toy_target_dir)
    options = {"max_new_tokens": 4, "ignore_eos": True, "learn": LearnConfig()}
    config = GenerateConfig(**options)
    need = forecast_run(engine.target, engine.drafter, config, 9, 256, prompt=2)
    monkeypatch.setattr(forecast, "free_memory", lambda _: need.at_once - 1)
    with pytest.raises(ResourceError, match=r"9 rows of 256 tokens take"):
        list(engine.run([[[1, 2]]] * 9, rows=9, **options))


def test_bench_says_so_before_it_begins(toy_target_dir: Path, tmp_path: Path, monkeypatch, capsys):
    drafter, suite = make_drafter(tmp_path / "drafter"), tmp_path / "suite.jsonl"
    suite.write_text('{"prompt": "hello"}\n' * 30)
    command = ["bench", "run", "--suite", str(suite), "--target", str(toy_target_dir), "--drafter"]
    command += [str(drafter), "--rows", "30", "--arms", "plain,learn", "--out"]
    monkeypatch.setattr(forecast, "free_memory", lambda _: 4 << 20)
    assert main([*command, str(tmp_path / "run"), "--dtype", "float32"]) == 1
    error = capsys.readouterr().err
    assert "learn: 30 rows of 512 tokens take" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


# Training.


@pytest.mark.parametrize(("kind", "trained"), [("dflash", 0), ("pard", 1000)])
def test_training_that_does_not_fit_is_refused_with_numbers(monkeypatch, kind, trained):
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 8}))
    target = wrap_target(model, byte_tokenizer())
    config = TrainConfig(prompts=Path("p"), out=Path("o"), kind=kind, max_length=100, batch=2)
    config = replace(config, anchors=10, block=5)
    drafted = 10 * 4 if kind == "dflash" else 60
    step = 2 * 4 * (60 * 9 * 64 + 3 * 260 * drafted)
    recipe = RECIPES[kind](target, config)
    assert recipe.step_bytes(60) == step
    weights, need = [torch.zeros(trained)], step + 16 * trained
    monkeypatch.setattr("ttspec.training.recipe.free_memory", lambda _: need)
    assert recipe.require_room(weights, 60) == need
    monkeypatch.setattr("ttspec.training.recipe.free_memory", lambda _: need - 1)
    with pytest.raises(ResourceError, match=r"a step on 2 dialogues of up to 60 tokens") as caught:
        recipe.require_room(weights, 60)
    assert "--batch" in str(caught.value).splitlines()[1]
    told = recipe.notice()  # answers may be shorter
    assert told is not None
    assert told.startswith("A step on 2 dialogues of 100 tokens takes")


def test_dialogues_are_answered_in_as_many_rows_as_fit(toy_target_dir, tmp_path, monkeypatch):
    engine, counts = load(str(toy_target_dir), None, device="cpu", dtype="float32"), []
    real = Engine.decoder

    def decoder(self, config, rows, *given, **more):
        counts.append(rows)
        return real(self, config, rows, *given, **more)

    monkeypatch.setattr(Engine, "decoder", decoder)
    config = GenerateConfig(
        max_new_tokens=5, context=60, draft=DraftConfig(length=0), learn=None, temperature=0.8
    )
    room = int(forecast_run(engine.target, None, config, 3, 60).total / forecast.USABLE_SHARE) + 1
    monkeypatch.setattr(forecast, "free_memory", lambda _: room)
    texts = []
    for rows in (None, 2):
        out = tmp_path / f"{rows}.jsonl"
        options = TrainConfig(prompts=out, out=out, max_answer=5, max_length=60, rows=rows)
        write_answers(engine, [["hello"]] * 6, out, options)
        texts.append(sorted(out.read_text().splitlines()))
    assert counts == [3, 2]
    assert texts[0] == texts[1]


def test_a_shared_drafter_learns_once(engine: Engine):
    shared = LearnConfig(scope="shared", weights="full")
    many = learning_bytes(engine.drafter, shared, 5)
    assert many == learning_bytes(engine.drafter, shared, 1)
    made = LiveWeights(shared, engine.drafter, 1)
    published = sum(w.nbytes for w in made.published.values())  # and its gradient
    assert many == pytest.approx(made.nbytes + published, rel=1e-3)
