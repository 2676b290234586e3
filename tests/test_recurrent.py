"""Targets with recurrent layers: states follow rows that are rolled back, and texts are plain's."""

import copy
import string
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from hybrids import DENSE, KINDS, random_hybrid
from torch import Tensor
from toys import PLAIN, assert_goes_on, assert_is_fresh, finish, make_kind, parrot, plain, twin
from transformers import (
    BambaConfig,
    GenerationConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from ttspec.compiled import compiling
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.stages import round_widths
from ttspec.diagnosis.memory import memory
from ttspec.drafters.ngram import Ngram
from ttspec.errors import TargetError
from ttspec.models.recurrent import StateCache
from ttspec.models.target import Target, load_target, wrap_target
from ttspec.models.unsupported import attention_windows
from ttspec.rowcache import RowCache

WIDTH, SLOTS = 6, 500


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    return {kind: wrap_target(random_hybrid(kind), byte_tokenizer()) for kind in KINDS}


@pytest.fixture(scope="module")
def target(targets) -> Target:
    return targets["qwen3_5"]


@pytest.fixture(scope="module")
def typist() -> Engine:
    """Writes printable ASCII, so that texts of tokens are what was written."""
    model = random_hybrid("qwen3_5")
    symbols = string.ascii_letters + string.digits + ".,;!?"
    kept = torch.tensor(byte_tokenizer().convert_tokens_to_ids(list(symbols)))
    with torch.no_grad():
        rows = model.lm_head.weight[kept].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[kept] = rows
    return Engine(wrap_target(model, byte_tokenizer()), make_kind("dflash"))


def skip_an_advance(monkeypatch) -> None:
    """The fault: layer 1 takes every token of a round for rejected; its states stand still."""
    whole = StateCache.read

    def read(self, module, *args):
        if module.layer_idx == 1 and self._counts is None:
            own, start = self.states[1], self._start
            own.base.copy_(torch.where(start < self.slots, start, own.base))
        return whole(self, module, *args)

    monkeypatch.setattr(StateCache, "read", read)


# The contract of the cache.


def run(target: Target, rows: int, rounds: int, widths: Sequence[int] | None = None) -> float:
    """Rows that are fed, verified, cut back, at rest, cleared and reused, against whole texts.

    With `widths` verifications are of these, compiled, and say what is seen by spans.

    Returns:
        The largest error of a logit, or of a state at the end.
    """
    random = torch.Generator().manual_seed(rows)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    texts = torch.randint(0, 256, (rows, SLOTS), generator=random)
    with torch.no_grad():
        wanted = target.model(input_ids=texts, use_cache=False).logits
    cache, at, error = target.cache(rows, SLOTS, WIDTH), [0] * rows, 0.0

    def feed(some: list[int], counts: list[int]) -> None:
        """Text, padded on the right with what must not be read."""
        nonlocal error
        tokens = torch.full((len(some), max(counts)), 7)
        for i, (row, count) in enumerate(zip(some, counts, strict=True)):
            tokens[i, :count] = texts[row, at[row] : at[row] + count]
        start = torch.tensor([at[row] for row in some])
        logits = said(target, cache, tokens, start, torch.tensor(some), torch.tensor(counts))
        for i, (row, count) in enumerate(zip(some, counts, strict=True)):
            error = max(error, gap(logits[i, :count], wanted[row, at[row] : at[row] + count]))
            at[row] += count

    feed(list(range(rows)), [number(1, 90) for _ in range(rows)])
    for _ in range(rounds):
        full = [row for row in range(rows) if at[row] > SLOTS - 100]
        cleared = [row for row in range(rows) if row in full or number(0, 40) == 0]
        for row in cleared:
            at[row] = 0
        turns = [row for row in range(rows) if row in cleared or number(0, 30) == 0]
        if turns:
            feed(turns, [number(1, 70) for _ in turns])
        width = widths[number(0, len(widths) - 1)] if widths else number(1, WIDTH)
        rest = [rows > 1 and number(0, 4) == 0 for _ in range(rows)]
        start = torch.tensor([SLOTS if r else n for r, n in zip(rest, at, strict=True)])
        kept = [number(1, width) for _ in range(rows)]
        tokens = torch.randint(0, 256, (rows, width), generator=random)
        for row in range(rows):
            tokens[row, : kept[row]] = texts[row, at[row] : at[row] + kept[row]]
        for _ in range(1 + (number(0, 3) == 0)):  # the same again is as once
            if widths:
                with compiling():
                    logits, _ = target.forward(cache, tokens, start, SLOTS, spans=True)
                assert logits is not None
            else:
                logits = said(target, cache, tokens, start)
        for row in range(rows):
            if not rest[row]:
                end = at[row] + kept[row]
                error = max(error, gap(logits[row, : kept[row]], wanted[row, at[row] : end]))
                at[row] = end
    said(target, cache, texts[:, :1], torch.tensor(at))  # tells what stayed
    for row in range(rows):
        error = max(error, state_error(target, cache, row, texts[row, : at[row]]))
    return error


def said(
    target: Target,
    cache: RowCache,
    tokens: Tensor,
    start: Tensor,
    subset: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    logits, _ = target.forward(cache, tokens, start, int(start.max()), subset=subset, counts=counts)
    assert logits is not None
    return logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def state_error(target: Target, cache: RowCache, row: int, text: Tensor) -> float:
    """How far a row's states are from those of transformers over a text."""
    assert isinstance(cache, StateCache)
    out = target.model(input_ids=text[None], use_cache=True)
    theirs = getattr(out, "cache", None) or out.past_key_values
    errors = []
    for index, own in cache.states.items():
        layer = theirs.layers[index]
        assert int(own.base[row]) == len(text)
        errors.append(gap(own.state[row], layer.recurrent_states[0][0]))
        window = own.window[row].T
        errors.append(gap(window, layer.conv_states[0][0][:, -window.shape[1] :]))
    assert len(errors) == 6
    return max(errors)


FEW = [(kind, 4, 30 if kind == "olmo_hybrid" else 60) for kind in KINDS] + [("qwen3_5", 1, 60)]
MANY = [(k, n, 200) for k in KINDS if k != "olmo_hybrid" for n in (1, 4)] + [("olmo_hybrid", 1, 30)]


@pytest.mark.parametrize(
    ("kind", "rows", "rounds"),
    [*FEW, *[pytest.param(*more, marks=pytest.mark.slow) for more in MANY]],
)
def test_rows_rolled_back_are_as_if_their_text_had_been_read_at_once(targets, kind, rows, rounds):
    assert run(targets[kind], rows, rounds) < 1e-4


def test_a_layer_that_does_not_go_on_is_noticed(target, monkeypatch):
    skip_an_advance(monkeypatch)
    assert run(target, 4, 20) > 1e-2


def test_more_tokens_than_are_kept_need_counts(target):
    zero = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="say with counts"):
        target.forward(target.cache(1, 32, 3), torch.ones(1, 4, dtype=torch.long), zero, 0)


def test_features_are_hidden_states_of_transformers(target):
    tapped = twin(target)
    tapped.taps = (0, 1, 2, 3)
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        states = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    wanted = torch.cat([states.hidden_states[i] for i in tapped.taps], -1)
    cache, zero = tapped.cache(1, 64, 10), torch.zeros(1, dtype=torch.long)
    first = tapped.forward(cache, ids[:, :30], zero, 0, counts=zero + 30)[1]
    second = tapped.forward(cache, ids[:, 30:], zero + 30, 30)[1]
    torch.testing.assert_close(torch.cat([first, second], 1), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(tapped.read(ids)[0], wanted, atol=1e-4, rtol=0)


# Texts.

PROMPTS = ["hello there", "a", "the quick brown fox jumps over the dog", "count to ten"]
LONG = "the quick brown fox jumps over the dog " * 15
OPTIONS = {"max_new_tokens": 16, "seed": 5, "ignore_eos": True}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(targets, kind):
    target = twin(targets[kind])
    options = {"max_new_tokens": 12, "temperature": 0.0, "raw": True, "learn": None}
    engine = Engine(target, make_kind("dflash"))
    prompts = ["hello there", LONG, "a"]  # longer than what is read at once
    together = engine.generate(prompts, **options)
    for prompt, drafted in zip(prompts, together, strict=True):
        ids = torch.tensor([drafted.prompt_ids])
        config = GenerationConfig(max_new_tokens=12, pad_token_id=256, eos_token_id=258)
        model: Any = target.model
        wanted = model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
        assert plain(engine, prompt, **options).token_ids == wanted
        assert drafted.token_ids == wanted


# How a token is chosen, and what a drafter learns, no recurrent layer sees.
@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        *((kind, 0.7) for kind in ("dflash", "eagle3", "pard", "causal", "ngram", "parrot")),
        *((kind, 0.0) for kind in ("dflash", "ngram", "parrot")),
        *(
            pytest.param(kind, 0.0, marks=pytest.mark.slow)
            for kind in ("dflash2", "dspark", "eagle3", "pard", "causal")
        ),
        *(
            pytest.param(kind, 0.7, marks=pytest.mark.slow)
            for kind in ("jetspec", "dflash2", "domino", "dspark", "peagle", "mtp", "mtp-gated")
        ),
    ],
)
def test_every_learning_drafter_writes_what_plain_decoding_writes(target, kind, temperature):
    options = {**OPTIONS, "temperature": temperature}
    wanted = plain_texts(target, temperature)
    for weights in ("full", "lora") if kind == "dflash" else ("full",):
        learn = LearnConfig(stride=1, lr=3e-3, weights=weights)
        if kind == "parrot":
            engine = parrot(Engine(twin(target), None), wanted[0], wrong=4)
        else:
            engine = Engine(twin(target), Ngram() if kind == "ngram" else make_kind(kind))
        for prompts in (PROMPTS, PROMPTS[:1]):
            results = engine.generate(prompts, **options, learn=learn)
            texts = [r.token_ids for r in wanted][: len(prompts)]
            assert [r.token_ids for r in results] == texts
            if kind not in ("ngram", "parrot"):
                assert all(r.stats.updates for r in results)
    if kind == "parrot":
        assert results[0].stats.acceptance_length > 2


def plain_texts(target: Target, temperature: float, known: dict = {}):  # noqa: B006
    if temperature not in known:
        options = {**OPTIONS, "temperature": temperature, **PLAIN}
        known[temperature] = Engine(twin(target), None).generate(PROMPTS, **options)
    return known[temperature]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_texts_differ_where_a_layer_does_not_go_on(target, kind, temperature, monkeypatch):
    wanted = plain_texts(target, temperature)
    skip_an_advance(monkeypatch)
    engine = Engine(twin(target), make_kind(kind))
    results = engine.generate(PROMPTS, **OPTIONS, temperature=temperature)
    assert all(r.token_ids != w.token_ids for r, w in zip(results, wanted, strict=True))


# What a session comes back to.


@pytest.mark.parametrize("wrong", [0, 3], ids=["one round", "several rounds"])
def test_after_a_stop_text_a_session_goes_on(typist, wrong):
    whole = plain(typist, "hello", max_new_tokens=30, temperature=0.0)
    engine = parrot(typist, whole, length=8, wrong=wrong)
    text = whole.text[9:12]
    session = engine.session(max_new_tokens=30, context=300, temperature=0.0, stop=[text])
    result = session.send("hello")
    assert result.finish_reason == "stop"
    assert_is_fresh(typist, ["hello", result.text, "and now?"], session.send("and now?"))


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_after_a_cancelled_answer_a_session_goes_on(typist, chunks):
    session = typist.session(max_new_tokens=30, context=300, temperature=0.0)
    stream = session.stream("hello")
    shown = [token for _ in range(chunks) for token in next(stream).token_ids]
    stream.close()
    before = session.conversation.prompt_ids + shown
    assert_goes_on(typist, before, session.send("and now?"))


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 17])
def test_after_an_interrupt_between_two_layers_a_session_goes_on(typist, monkeypatch, calls):
    session = typist.session(max_new_tokens=12, context=400, temperature=0.0)
    first = session.send("hello")
    left, whole = [calls], StateCache.read

    def read(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(StateCache, "read", read)
    *_, result = finish(session.stream("and then?"))
    assert result.finish_reason == "cancelled"
    before = first.prompt_ids + first.token_ids
    if result.token_ids:
        before = before[:-1] + result.prompt_ids + result.token_ids
    assert_goes_on(typist, before, session.send("and now?"))


@pytest.mark.parametrize("back", [0, 1, 4, 9, 15])
def test_a_row_cut_back_by_many_rounds_reads_its_text_again(typist, back):
    session = typist.session(max_new_tokens=20, context=300, temperature=0.0)
    result = session.send("hello")
    talk, ids = session.conversation, result.prompt_ids + result.token_ids
    ids = ids[: len(ids) - back]
    talk.decoder.crop(0, len(ids) - 1, ids[-1])
    again = session.send("and now?")
    assert_is_fresh(typist, ["hello", result.text, "and now?"], again)
    if back > typist.drafter.length + 1:  # further than a round: all of it was read anew
        assert again.stats.reread_tokens == len(ids) - 1


# What else holds states, and what is refused.


def test_memory_counts_states_once_a_row(typist):
    told = memory(typist, 1, 1000), memory(typist, 3, 2000)
    assert told[0]["target_cache_per_1000_tokens"] == 2 * 2 * 16 * 1000 * 4
    width = round_widths(typist.drafter, DraftConfig(), batch_invariant=False)[-1]
    channels, size = 2 * 32 + 96, 4 * 16 * 24
    kept = width * (channels + 2 * 16 + 4 * 24 + 4)
    assert told[0]["target_state_per_row"] == 3 * (8 + 4 * (size + 3 * channels + kept))
    each = "target_state_per_row", "learning_per_row"
    caches = "target_cache_per_1000_tokens", "drafter_cache_per_1000_tokens"
    more = told[1]["total"] - told[0]["total"] - (told[1]["work"] - told[0]["work"])
    assert more == sum(2 * told[0][k] for k in each) + sum(5 * told[0][k] for k in caches)


def test_a_multimodal_folder_is_loaded_as_its_text_model(tmp_path):
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    text = {k: v for k, v in DENSE.items() if k != "dtype"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
        model = Qwen3_5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    target = load_target(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    assert (target.context, target.ends, target.windows) == (2048, (258,), (0, 0, 0, None))
    ids, zero = torch.arange(30)[None], torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    logits, _ = target.forward(target.cache(1, 64), ids, zero, 0, counts=zero + 30)
    torch.testing.assert_close(logits, wanted, atol=5e-4, rtol=0)


def test_a_copy_of_a_model_reads_its_own_weights(target):
    model = copy.deepcopy(target.model)
    with torch.no_grad():
        for layer in model.model.layers[:3]:
            layer.linear_attn.out_proj.weight.zero_()
    other = wrap_target(model, byte_tokenizer())
    ids, zero = torch.arange(10)[None], torch.zeros(1, dtype=torch.long)
    logits = said(other, other.cache(1, 32), ids, zero, None, zero + 10)
    torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert gap(logits, said(target, target.cache(1, 32), ids, zero, None, zero + 10)) > 0.1


def test_recurrent_layers_of_other_classes_are_refused_by_name(target):
    with pytest.raises(TargetError, match=r"linear_attention.*\n.*cannot be rolled back"):
        attention_windows(BambaConfig(), states=True)
    with pytest.raises(TargetError, match="linear_attention"):  # a draft model has no such cache
        attention_windows(target.model.config)
    model = copy.deepcopy(target.model)
    odd = type("OddDeltaNet", (type(model.model.layers[0].linear_attn),), {})
    model.model.layers[1].linear_attn.__class__ = odd
    with pytest.raises(TargetError, match=r"OddDeltaNet.*cannot be rolled back"):
        wrap_target(model, byte_tokenizer())
