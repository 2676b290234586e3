"""Targets from local folders and from hub ids."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import copy_of, refused

from ttspec import load
from ttspec.errors import OptionError, ResourceError
from ttspec.models import source
from ttspec.models.source import resolve


def test_a_folder_is_taken_as_it_is(toy_target_dir: Path) -> None:
    found = resolve(str(toy_target_dir))
    assert (found.path, found.origin) == (toy_target_dir.resolve(), "folder")


def test_python_takes_paths_and_refuses_what_is_none(toy_target_dir: Path, pair) -> None:
    engine = load(toy_target_dir, Path(pair[3]), device="cpu", dtype="float32")
    assert engine.drafter is not None
    with pytest.raises(OptionError, match=r"target is a LlamaForCausalLM; allowed are a name, "):
        load(engine.target.model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["./nowhere", "~/ttspec-nowhere", "/no/where", "a/b/c", "model.gguf", "x.bin", ""]
)
def test_a_path_to_nowhere_is_not_looked_up_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_from_hub", None)
    message = refused(name)
    assert "no such folder" in message
    assert "smollm2-135m" in message


def test_a_file_is_refused_with_the_advice_to_give_its_folder(toy_target_dir: Path) -> None:
    assert "is a file" in refused(str(toy_target_dir / "config.json"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(str(tmp_path))


def test_a_folder_of_gguf_files_is_refused_with_the_advice_to_give_one(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").touch()
    assert "the file itself: model-Q4_K_M.gguf" in refused(str(tmp_path))


def test_a_folder_without_weights_is_refused(toy_target_dir: Path, tmp_path: Path) -> None:
    model = copy_of(toy_target_dir, tmp_path)
    (model / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(str(model))


def test_a_folder_with_only_a_pickle_is_refused(toy_target_dir: Path, tmp_path: Path) -> None:
    model = copy_of(toy_target_dir, tmp_path)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    message = refused(str(model))
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_are_refused_by_name(
    toy_target_dir: Path, tmp_path: Path, share: float
) -> None:
    weights = copy_of(toy_target_dir, tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * share)])
    assert f"{weights} is damaged or incomplete" in refused(str(weights.parent))


def test_a_shard_that_the_index_names_must_be_there(toy_target_dir: Path, tmp_path: Path) -> None:
    model = copy_of(toy_target_dir, tmp_path)
    save_file({"x": torch.zeros(1)}, model / "model-00001-of-00002.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"y": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors is missing" in refused(str(model))
    index.write_text("[]")
    assert f"{index} is damaged" in refused(str(model))


def test_a_hub_model_is_fetched_without_pickles(
    toy_target_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def snapshot_download(name: str, **options: list[str]) -> str:
        asked.update(options, name=name)
        return str(toy_target_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = resolve("owner/name-0.6B")
    assert (found.origin, found.path, asked["name"]) == ("hub", toy_target_dir, "owner/name-0.6B")
    assert "*.bin" in asked["ignore_patterns"]
    assert "*.safetensors" in asked["allow_patterns"]


def test_a_hub_that_cannot_be_reached_is_a_two_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("It is not on the disk and traffic has\nbeen switched off. Much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refused("owner/name", ResourceError)
    assert ": It is not on the disk and traffic has been switched off.\n" in message


def test_a_long_reason_of_the_hub_ends_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("unreachable " * 50)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert "unreachable ....\n" in refused("owner/name", ResourceError)


def test_a_page_in_place_of_the_hub_s_answer_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def page(*_: object, **__: object) -> None:
        json.loads("<html>Log in to this network</html>")

    monkeypatch.setattr("huggingface_hub.snapshot_download", page)
    with pytest.raises(ResourceError, match=r"no JSON, as that of a login page.*\nTry again"):
        source.resolve("owner/name")


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    assert "'no such name'" in refused("no such name")
