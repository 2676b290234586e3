"""Architectures: each is verified as transformers reads it, or refused by name; never wrong."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ttspec import rowcache
from ttspec.cli import doctor, main
from ttspec.decoding.engine import Engine
from ttspec.diagnosis import targets
from ttspec.diagnosis.families import DYNAMIC, FAMILIES, LONGROPE, SHAPE, build
from ttspec.diagnosis.targets import FULL, Effort, TargetRow, check_family, check_targets
from ttspec.drafters.ngram import Ngram
from ttspec.errors import ResourceError, TargetError
from ttspec.models import loading as loading_module
from ttspec.models import target as target_module
from ttspec.models.attention import folded_attention
from ttspec.models.fixed_rotary import fix_rotary
from ttspec.models.target import wrap_target
from ttspec.models.unsupported import attention_windows

CPU = torch.device("cpu")
QUICK = Effort(rounds=24, tokens=40)
UNFIT = {
    "llama-4": "chunked_attention",
    "mamba-2": "linear_attention",
    "lfm2": "conv",
    "bamba": "linear_attention",
    "falcon-h1": "hybrid",
    "gpt-neo": "length of its cache",
    "bloom": "position_ids",
    "bert": "an encoder",
    "bart": "position_ids",
}
"""What will not be supported, and what the refusal names."""
HYBRIDS = ("qwen3.5", "qwen3.5-moe", "qwen3-next")
"""Refused until their state can be rolled back; then they have to pass."""


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_is_right_or_refused_by_name(name: str) -> None:
    row = check_family(name, CPU, QUICK)
    if name in UNFIT or (name in HYBRIDS and row.status == "refused"):
        assert row.status == "refused"
        assert row.reason
        assert UNFIT.get(name, "linear_attention") in row.reason
        assert len(row.reason.splitlines()) == 2
    else:
        assert row.status == "pass", row
        assert row.max_error is not None
        assert row.max_error <= targets.TOLERANCE
        assert row.compared_tokens == 2 * 3 * QUICK.tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - UNFIT.keys()))
def test_it_stays_right_over_hundreds_of_rounds(name: str) -> None:
    row = check_family(name, CPU, FULL)
    assert row.status == "pass" or (name in HYBRIDS and row.status == "refused"), row


@pytest.mark.slow
@pytest.mark.weights
def test_the_built_in_target_is_right(smollm2_dir) -> None:
    (row,) = check_targets(CPU, ["smollm2-135m"])
    assert row.status == "pass", row


# Rotary positions that transformers changes as a text grows.


def changing(kind: str, rope: dict[str, Any], context: int, **more: Any) -> Any:
    """A small model with random weights whose rotary positions are of such a kind."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **SHAPE | more | {"rope_parameters": rope, "max_position_embeddings": context}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for name, weight in model.named_parameters():  # so that positions matter
        weight.data *= 8 if "q" in name.rpartition("_proj")[0] else 1
    return model


@pytest.mark.parametrize(
    ("kind", "rope", "context", "lengths"),
    [
        ("phi3", LONGROPE, 512, (65, 200)),  # transformers, too, reads these by the long factors
        ("phi3", LONGROPE, 64, (5, 64)),
        ("llama", DYNAMIC, 64, (5, 64)),
        ("hunyuan_v1_dense", {**DYNAMIC, "alpha": 1000.0}, 64, (5, 64)),
    ],
    ids=["longrope", "longrope, short", "dynamic", "hunyuan"],
)
def test_fixed_positions_are_those_of_a_text_of_that_length(kind, rope, context, lengths) -> None:
    more = {"original_max_position_embeddings": 64} if kind == "phi3" else {}
    model, fixed = (changing(kind, rope, context, **more) for _ in range(2))
    long = torch.randint(200, (1, 300))
    with torch.no_grad():
        model(long)
        fixed(long)  # what was read before means nothing
        fix_rotary(fixed)
        for length in lengths:
            found, expected = (m(long[:, :length]).logits for m in (fixed, model))
            torch.testing.assert_close(found, expected)
        before = fixed(long[:, :40]).logits
        fixed(long)
        assert torch.equal(fixed(long[:, :40]).logits, before)


def test_a_long_prompt_goes_on_as_in_transformers() -> None:
    model = changing("phi3", LONGROPE, 512, original_max_position_embeddings=64)
    prompt = torch.randint(1, 200, (1, 70))  # 0 would be padding
    with torch.no_grad():
        whole = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    target = wrap_target(model, targets.number_tokenizer(200))
    (result,) = Engine(target, Ngram()).generate(
        prompt.tolist(), max_new_tokens=40, temperature=0.0, ignore_eos=True
    )
    assert result.token_ids == whole[0, 70:].tolist()


@pytest.mark.parametrize(
    "rope",
    [{**LONGROPE, "long_mscale": 1.2, "short_mscale": 1.1}, {"full_attention": LONGROPE}],
    ids=["scaled by length", "of a kind of layers"],
)
def test_positions_that_change_otherwise_are_refused(rope) -> None:
    config = SimpleNamespace(rope_parameters=rope, model_type="phi3")
    config.get_text_config = lambda: config
    with pytest.raises(TargetError, match="are longrope: their frequencies follow"):
        attention_windows(config, states=True)


def test_a_draft_model_s_positions_are_not_fixed() -> None:
    config = AutoConfig.for_model("llama", **SHAPE, rope_parameters=DYNAMIC)
    with pytest.raises(TargetError, match="are dynamic: their frequencies follow"):
        attention_windows(config)


# What the checks must notice.


def drop_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    load = loading_module.AutoModelForCausalLM.from_pretrained

    def plain(path, **given):
        config = AutoConfig.from_pretrained(path)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
        return load(path, config=config, **given)

    other = SimpleNamespace(from_pretrained=plain)
    monkeypatch.setattr(loading_module, "AutoModelForCausalLM", other)


def ignore_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "attention_windows", lambda config, states: (None,) * 2)


def write_one_late(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slots = rowcache.RowCache.set_slots

    def late(cache, slot, *rest) -> None:
        set_slots(cache, slot + (slot > 20), *rest)

    monkeypatch.setattr(rowcache.RowCache, "set_slots", late)


def see_rejected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = target_module.causal_mask
    monkeypatch.setattr(
        target_module, "causal_mask", lambda position, *rest: mask(position + 1, *rest)
    )


def forget_logit_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        target_module.Target, "compute_logits", lambda target, hidden: hidden @ target.head.T
    )


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (drop_scaling, "llama-3.1"),
        (ignore_windows, "mistral-window"),
        (ignore_windows, "gemma-3"),
        (write_one_late, "qwen3"),
        (see_rejected_tokens, "qwen3"),
        (forget_logit_scale, "granite"),
        (forget_logit_scale, "gemma-2"),
    ],
)
def test_a_planted_fault_fails(fault, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    row = check_family(name, CPU, replace(QUICK, tokens=24))
    assert row.status == "fail"
    assert row.reason


def test_an_error_is_told_in_standard_deviations() -> None:
    errors, right = targets.LargestError(), 100 * torch.randn(1000, generator=torch.Generator())
    errors.add(right + 0.01, right)
    assert errors.largest == pytest.approx(0.01 / float(right.std()), rel=0.05)
    errors.add(right * torch.nan, right)
    assert errors.largest > 1e30


def test_texts_that_part_at_a_near_tie_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = build("qwen3")
    target = wrap_target(build("qwen3"), targets.number_tokenizer(300))
    generate = type(reference).generate

    def other(self, *given, **options):
        ids = generate(self, *given, **options)
        ids[0, 20] = (ids[0, 20] + 1) % 300
        return ids

    monkeypatch.setattr(type(reference), "generate", other)
    ties, wrong = targets.texts(target, reference, 16)
    assert (ties, len(wrong)) == (0, 1)
    assert "parts at token 8" in wrong[0]
    monkeypatch.setattr(targets, "NEAR_TIE", 1e3)
    assert targets.texts(target, reference, 16) == (2, [])


# Refusals by name that no row of the table shows.


def test_distance_biased_attention_is_refused() -> None:
    with pytest.raises(TargetError, match="alibi"):
        attention_windows(AutoConfig.for_model("falcon", alibi=True))


def test_softcapped_attention_needs_eager_attention() -> None:
    model = build("gemma-2")
    wrap_target(model, targets.number_tokenizer(300))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(TargetError, match="attn_logit_softcapping") as caught:
        wrap_target(model, targets.number_tokenizer(300))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_folded_attention_leaves_nothing_out_in_silence(name: str) -> None:
    states = torch.randn(1, 2, 3, 8)
    with pytest.raises(TargetError, match=name):
        folded_attention(torch.nn.Module(), states, states, states, None, **{name: 1.0})


def test_folded_attention_takes_values_of_another_size() -> None:
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16)
    value, mask = torch.randn(2, 2, 5, 8), torch.ones(2, 1, 3, 5, dtype=torch.bool)
    out = folded_attention(torch.nn.Module(), query, key, value, mask)[0]
    assert out.shape == (2, 3, 4, 8)
    assert out.is_contiguous()


def test_a_window_that_the_models_code_ignores_is_refused() -> None:
    config = AutoConfig.for_model("llama", **SHAPE)
    config.sliding_window = 8
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TargetError, match="sliding_window = 8"):
        wrap_target(model, targets.number_tokenizer(300))


def test_state_that_the_config_does_not_tell_of_is_refused(monkeypatch) -> None:
    model = build("qwen3")
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.raises(TargetError, match="keeps state"):
        wrap_target(model, targets.number_tokenizer(300))


# What the command says.

ROWS = [
    TargetRow(name="a", status="pass", max_error=1e-6, feature_error=2e-6, compared_tokens=3072),
    TargetRow(name="b", status="refused", reason="It has\nno sense."),
]
BAD = TargetRow(name="c", status="fail", reason="logits differ")


@pytest.mark.parametrize("bad", [False, True])
def test_the_command_lists_rows_and_says_if_one_fails(bad: bool, monkeypatch, capsys) -> None:
    rows = [*ROWS, BAD] if bad else ROWS
    monkeypatch.setattr(targets, "check_targets", lambda *_, **__: iter(rows))
    assert main(["doctor", "--targets", "--json"]) == int(bad)
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told] == [row.name for row in rows]
    assert set(told[0]) >= {"name", "status", "max_error", "feature_error", "near_ties"}
    assert main(["doctor", "--targets"]) == int(bad)
    out = capsys.readouterr().out
    assert re.search(r"a +pass +1\.0e-06 +2\.0e-06 +3072", out)
    assert "It has no sense." in out
    assert f"1 pass, {int(bad)} fail, 1 refused" in out
    assert all(len(line) <= doctor.WIDTH for line in out.splitlines())


@pytest.mark.parametrize(
    "given", [["llama"], ["--probe"], ["--dtype", "bfloat16"], ["--context", "9"]]
)
def test_the_table_is_about_no_pair(given: list[str], capsys) -> None:
    assert main(["doctor", *given, "--targets"]) == 2
    assert "--targets was given together with" in capsys.readouterr().err


def test_what_cannot_be_fetched_has_no_row(monkeypatch) -> None:
    def unreachable(*_):
        raise ResourceError("no network\nat all")

    monkeypatch.setattr(targets, "resolve", unreachable)
    notes: list[str] = []
    assert list(check_targets(CPU, ["smollm2-135m"], notify=notes.append)) == []
    assert notes == ["smollm2-135m is left out: no network"]
