"""What is streamed is what the tokens decode to together, whatever the tokenizer."""

import random
from collections.abc import Callable

import pytest
from conftest import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from toys import new_text
from transformers import PreTrainedTokenizerFast

from ttspec.decoding.text import TextStream

SEQUENCES = 2000
WORDS = ["the", "sea", "is", "n", "'", "t", "s", "re", ".", ",", "!", "?", "é", "海", "do", "I"]
SPECIAL = ["<s>", "</s>", "<|user|>"]
MERGES = [("t", "h"), ("th", "e"), ("s", "e"), ("se", "a"), ("Ã", "©")]


def wrapped(backend: Tokenizer, **options) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_tokens(["<think>", "<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **options)


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *("".join(pair) for pair in MERGES)]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def said_to_be_cleaned() -> PreTrainedTokenizerFast:
    """As Llama 3's: transformers 5 leaves the spaces of BPE alone, whatever the entry says."""
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's, Mistral's and Phi-3's: bytes for what is unknown; one space is taken off."""
    pieces = ["▁", "▁▁", *(f"▁{w}" for w in WORDS), *WORDS, *(f"<0x{n:02X}>" for n in range(256))]
    vocabulary = {w: i for i, w in enumerate(["<unk>", *pieces])}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(backend)


def word_piece(cleans: bool = False) -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", *WORDS, *(f"##{w}" for w in WORDS)]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=not cleans)
    return wrapped(backend, clean_up_tokenization_spaces=cleans)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: Metaspace takes the space off the first token alone."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((f"▁{w}", -3.0) for w in WORDS)]
    pieces += [(w, -4.0) for w in WORDS]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrapped(backend)


def characters() -> PreTrainedTokenizerFast:
    letters = sorted(set("".join(WORDS)) | {" ", "\n", "\ufffd", "👍"})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return wrapped(backend)


def word_ends() -> PreTrainedTokenizerFast:
    """As the first GPT's: an end of a word is a space, unless nothing follows."""
    pieces = [*WORDS, *(f"{w}</w>" for w in WORDS)]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(pieces)}, []))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return wrapped(backend)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, said to be cleaned": said_to_be_cleaned,
    "sentencepiece with bytes": sentencepiece,
    "WordPiece": word_piece,
    "WordPiece, cleaned": lambda: word_piece(cleans=True),
    "Unigram": unigram,
    "characters": characters,
    "no decoder": lambda: undecoded(characters()),
    "ends of words": word_ends,
}


def undecoded(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Then tokens are joined by spaces."""
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text(kind: str) -> None:
    tokenizer, rng = KINDS[kind](), random.Random(kind)
    size = len(tokenizer)
    special = tokenizer.convert_tokens_to_ids(SPECIAL)
    for _ in range(SEQUENCES):
        ids = [
            rng.choice(special) if rng.random() < 0.15 else rng.randrange(size)
            for _ in range(rng.randrange(1, 14))
        ]
        stream, shown = TextStream(tokenizer, (), ()), ""
        for token in ids:
            stream.push(token)
            shown += new_text(stream)
        shown += new_text(stream, final=True)
        assert shown == stream.text == tokenizer.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_text_ends_the_text_wherever_the_answer_ends(kind: str) -> None:
    """Also one that stands in what is held back until it is known that no token follows."""
    tokenizer, rng, at_the_end = KINDS[kind](), random.Random(kind), 0
    for _ in range(SEQUENCES):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 14))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        begin = rng.randrange(len(whole) + 1)
        stop = whole[begin : begin + rng.randint(1, 5)] or "海"
        stream, shown = TextStream(tokenizer, (stop,), ()), ""
        for count, token in enumerate(ids, 1):
            if stream.push(token):
                whole = tokenizer.decode(ids[:count], skip_special_tokens=True)
                break
            shown += new_text(stream)
        else:
            at_the_end += stream.end()
        shown += new_text(stream, final=True)
        assert shown == stream.text == whole.partition(stop)[0], (ids, stop)
        assert stream.stopped == (stop in whole)
    holds_back = ("byte-level BPE", "sentencepiece with bytes", "WordPiece, cleaned")
    assert at_the_end or not kind.startswith(holds_back)


def test_an_answer_that_ends_with_a_stop_text_is_stopped(typist, monkeypatch) -> None:
    """Where the tokenizer cleans spaces, the last characters are known at the end alone."""
    for name in ("", "_for_bpe_even_though_it_will_corrupt_output"):
        monkeypatch.setattr(typist.tokenizer, f"clean_up_tokenization_spaces{name}", True)
    asked = {"max_new_tokens": 12, "learn": None}
    whole = typist.generate("hello", **asked)[0].text
    (result,) = typist.generate("hello", stop=(whole[-2:],), **asked)
    assert (result.text, result.finish_reason) == (whole.partition(whole[-2:])[0], "stop")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_a_long_text_costs_no_more_than_one_of_a_short(kind: str, monkeypatch) -> None:
    """All is decoded each time only where transformers cleans spaces of what came before."""
    tokenizer = KINDS[kind]()
    stream, decode, longest = TextStream(tokenizer, (), ()), tokenizer.decode, [0]

    def counted(ids: list[int], **options) -> str:
        longest.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    for token in tokenizer("the sea " * 50, add_special_tokens=False)["input_ids"]:
        stream.push(token)
    assert (max(longest) > 9) == (kind == "WordPiece, cleaned")


@pytest.mark.parametrize("kind", ["sentencepiece with bytes", "Unigram"])
def test_a_space_after_a_special_token_is_shown_at_once(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<|user|>", "▁sea", "▁is"])
    stream, shown = TextStream(tokenizer, (), ()), []
    for token in ids:
        stream.push(token)
        shown.append(new_text(stream))
    assert shown == ["the", "", " sea", " is"]


def test_one_space_is_taken_off_a_text_and_not_two() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["▁", "▁sea", "▁is"])
    stream = TextStream(tokenizer, (), ())
    for token in ids:
        stream.push(token)
    assert new_text(stream, final=True) == " sea is" == tokenizer.decode(ids)


def test_a_character_of_several_byte_tokens_waits_until_it_is_whole() -> None:
    tokenizer = sentencepiece()
    names = [f"<0x{byte:02X}>" for byte in "👍".encode()]
    stream, shown = TextStream(tokenizer, (), ()), []
    for token in tokenizer.convert_tokens_to_ids(["▁I", *names, "▁do"]):
        stream.push(token)
        shown.append(new_text(stream))
    assert shown == ["I", "", "", "", "", "👍 do"]


def test_long_texts_are_decoded_a_few_tokens_at_a_time() -> None:
    tokenizer, most = byte_tokenizer(), 0
    decode = tokenizer.decode

    def noted(ids, **options):
        nonlocal most
        most = max(most, len(ids))
        return decode(ids, **options)

    tokenizer.decode = noted
    stream = TextStream(tokenizer, (), ())
    for token in tokenizer("the sea is wide " * 40)["input_ids"]:
        stream.push(token)
    assert most <= 3
