"""`demo`, `doctor` and `check` as a user meets them."""

import json

import pytest
import torch
from toys import DRAFTER, complaint, make_drafter

from ttspec.bench.results import first_difference
from ttspec.cli import main
from ttspec.cli.check import ComparedAnswer, tie_margin, verdict
from ttspec.cli.train import _ways_to_more_steps
from ttspec.drafters.dflash import DFlash
from ttspec.records import Result
from ttspec.training.config import TrainConfig


def test_demo_runs_four_arms_on_the_same_session(pair, capsys, tmp_path) -> None:
    out = tmp_path / "run"
    assert main(["demo", *pair, "--tokens", "60", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("plain decoding", "static drafter", "with copies", "default"):
        assert text in printed
    assert "tokens copied" in printed
    assert printed.count("as plain") == 3
    assert (out / "report" / "index.html").is_file()
    assert (out / "report" / "acceptance.png").is_file()
    turns = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    texts = {
        arm: [t["text"] for t in turns if t["arm"] == arm] for arm in {t["arm"] for t in turns}
    }
    assert set(texts) == {"plain", "static", "static-copy", "default"}
    assert len(set(map(tuple, texts.values()))) == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert len(manifest["drafter"]["sha256"]) == 64


def test_demo_without_a_drafter_says_what_it_needs(toy_target_dir, capsys, tmp_path) -> None:
    options = ["--target", str(toy_target_dir), "--drafter", "none", "--out", str(tmp_path)]
    assert main(["demo", *options]) == 2
    assert len(complaint(capsys)) == 2


def test_doctor_says_where_the_weights_are_and_what_they_need(pair, capsys) -> None:
    _, target, _, drafter, *_ = pair
    assert main(["doctor", target, drafter, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == target
    assert told["fits"] is True
    assert told["target"]["vocabulary"] == 260
    cache = 2 * 4 * 2 * 16 * 1000 * 4  # keys and values, layers, heads, head size, tokens, bytes
    dtype_size = {"float32": 4, "bfloat16": 2}[told["target"]["dtype"]]
    assert told["memory"]["target_cache_per_1000_tokens"] == cache * dtype_size // 4
    drafter_model = DFlash(DRAFTER, {})
    shapes = drafter_model.shapes()
    drafter_model.weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    learnable = sum(drafter_model.weights[n].numel() for n in drafter_model.learnable("full"))
    assert told["memory"]["learning_per_row"] == learnable * (16 + 2 * dtype_size)
    assert main(["doctor", target, drafter]) == 0
    assert "fits" in capsys.readouterr().out


def test_doctor_fails_with_the_reason_when_a_drafter_does_not_fit(
    toy_target_dir, tmp_path, capsys
) -> None:
    folder = make_drafter(tmp_path / "d", vocab_size=300)
    assert main(["doctor", str(toy_target_dir), str(folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert "vocabulary" in told["reason"]
    assert main(["doctor", str(toy_target_dir), "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is None


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_check_finds_no_difference_in_float32(pair, capsys, temperature) -> None:
    options = ["--max-new-tokens", "40", "--temperature", temperature]
    assert main(["check", "hello", "a b c", *pair, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("identical") for line in lines[:4])
    assert "4 identical" in lines[4]


def test_check_asks_the_target_where_answers_part(pair, capsys, monkeypatch) -> None:
    from ttspec.decoding.engine import Engine

    honest = Engine.generate

    def lying(self: Engine, *prompts: object, **options: object) -> list[Result]:
        results = honest(self, *prompts, **options)  # type: ignore[arg-type]
        if options["learn"] is not None:
            results[0].token_ids[5] ^= 1
        return results

    monkeypatch.setattr(Engine, "generate", lying)
    options = ["--max-new-tokens", "20", "--temperature", "0.7"]
    assert main(["check", "hello", *pair, *options, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    static, learning = told["findings"]
    assert not told["ok"]
    assert static["verdict"] == "identical"
    assert (learning["verdict"], learning["position"]) == ("different", 5)
    assert learning["margin"] > tie_margin("float32")


def test_near_ties_are_forgiven_but_not_many_of_them() -> None:
    def findings(ties: int, tokens: int, kind: str = "near-tie") -> list[ComparedAnswer]:
        return [
            ComparedAnswer(prompt="p", arm="static", tokens=tokens, verdict=kind)
            for _ in range(ties)  # type: ignore[arg-type]
        ]

    assert verdict(findings(1, 100), "float32") == 0
    assert verdict(findings(2, 100), "float32") == 1
    assert verdict(findings(2, 10_000), "float32") == 0
    assert verdict(findings(9, 100), "bfloat16") == 0
    assert verdict(findings(1, 100, "different"), "bfloat16") == 1
    assert verdict(findings(1, 100), "bfloat16", strict=True) == 1
    assert tie_margin("bfloat16") == 0.5


def test_the_first_difference_counts_a_missing_end() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_training_that_is_interrupted_says_how_to_go_on(pair, capsys, monkeypatch, tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ttspec.training.train.train", interrupted)
    out, prompts = str(tmp_path / "out"), tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    assert main(["train", *pair[:2], "--prompts", str(prompts), "--out", out]) == 130
    assert f"{out} has the answers so far" in (said := capsys.readouterr().err)
    assert "--resume" in said


def test_training_looks_at_its_prompts_before_it_loads_a_model(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("ttspec.load", None)
    arguments = ["--prompts", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["train", *arguments]) == 2
    assert "none.jsonl cannot be read" in complaint(capsys)[0]


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({}, ["--epochs", "--prompts", "--batch"]),
        ({"batch": 1, "kind": "causal"}, ["--epochs", "--prompts"]),
        ({"minutes": 1.0}, ["--minutes", "--batch", "--anchors"]),
        ({"minutes": 1.0, "batch": 1, "kind": "pard"}, ["--minutes"]),
    ],
)
def test_few_steps_of_training_are_told_with_what_gives_more(options, ways, tmp_path) -> None:
    config = TrainConfig(prompts=tmp_path / "p", out=tmp_path / "o", **options)
    assert [way.split()[-1] for way in _ways_to_more_steps(config)] == ways
