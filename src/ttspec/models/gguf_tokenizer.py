"""A GGUF file's tokenizer, built from its metadata, and the tokens that end an answer.

Two kinds are built: byte-level BPE with its merges ("gpt2"), and sentencepiece's BPE ("llama"),
whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.errors import TargetError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": None,  # ByteLevel's own
    "smollm": None,
    "llama-bpe": _WORDS.replace("DIGITS", "{1,3}"),
    "qwen2": _WORDS.replace("DIGITS", ""),
    "deepseek-r1-qwen": _WORDS.replace("DIGITS", ""),
}
"""How text is cut before its tokens are merged, by tokenizer.ggml.pre: as the models publish it."""
NORMAL, UNKNOWN, CONTROL, OWN_WORD, BYTE = 1, 2, 3, 4, 6
"""Values of tokenizer.ggml.token_type: special tokens are 2 and 3, words that are never cut 4."""
SPACE = "▁"
"""How sentencepiece writes a space."""
_ANSWER = "ttspec asks how an answer ends"


def gguf_tokenizer(path: Path, meta: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, from a file's metadata or, where it cannot be told, from beside the file.

    Raises:
        TargetError: It cannot be told, and no tokenizer.json lies there.
    """
    get = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items()}.get
    tokens, model = get("tokens") or [], get("model")
    if model == "gpt2" and get("pre") in SPLITS and get("merges"):
        backend, begins = _byte_level(get), get("pre") == "llama-bpe"
    elif model == "llama" and get("scores") and not get("precompiled_charsmap"):
        backend, begins = _sentencepiece(path, get), True
    else:
        described = f"{model!r}, {get('pre') or 'no tokenizer.ggml.pre'!r}"
        return _tokenizer_beside(path, meta, tokens, described)
    roles = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    ids = {role: get(f"{name}_token_id") for name, role in roles.items()}
    outside = [i for i in ids.values() if i is not None and not 0 <= i < len(tokens)]
    if outside:
        raise TargetError(
            f"{path} gives a token the id {outside[0]}, and has {len(tokens)} tokens.\n"
            "Fetch the file again, or use the model's safetensors."
        )
    special = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    adds = {"bos": get("add_bos_token", begins), "eos": get("add_eos_token", False)}
    around = {
        r: special[f"{r}_token"] for r, add in adds.items() if add and f"{r}_token" in special
    }
    if around:
        single = [around.get("bos"), "$A", around.get("eos")]
        backend.post_processor = TemplateProcessing(
            single=[part for part in single if part],
            special_tokens=[(token, ids[role]) for role, token in around.items()],
        )
    template = meta.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, chat_template=template)


def end_tokens(meta: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those that are named, and that which the template writes.

    Files of fine-tuned models often name the base model's end token alone, while every answer
    ends with the template's.
    """
    named = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = {int(end) for end in named if end is not None}
    types = meta.get("tokenizer.ggml.token_type") or []
    tokens = meta.get("tokenizer.ggml.tokens") or []
    after = _after_answer(tokenizer)
    whole = [i for i, kind in enumerate(types) if kind in (CONTROL, OWN_WORD)]
    fits = [i for i in whole if tokens[i].strip() and after.startswith(tokens[i])]
    if fits:
        ends.add(max(fits, key=lambda i: len(tokens[i])))
    return sorted(ends)


def _after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an answer; nothing where it cannot be asked."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # templates raise whatever they like
        return ""
    return text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""


def _byte_level(get: Any) -> Tokenizer:
    tokens, pre = get("tokens"), get("pre")
    merges = [tuple(merge.split(" ")) for merge in get("merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _cuts(pre)
    if "qwen" in pre:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    types = list(zip(tokens, get("token_type") or [], strict=False))
    backend.add_special_tokens([token for token, kind in types if kind == CONTROL])
    words = [token for token, kind in types if kind == OWN_WORD]
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return backend


def _cuts(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    elif SPLITS[pre] is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    return pre_tokenizers.Sequence([first, last])


def _sentencepiece(path: Path, get: Any) -> Tokenizer:
    """As transformers builds a Llama's, or a Gemma's where no space is put before a text."""
    tokens, scores, types = get("tokens"), get("scores"), get("token_type") or []
    if not len(tokens) == len(scores) == len(types):
        raise TargetError(
            f"{path} has {len(tokens)} tokens, {len(scores)} scores and {len(types)} token types.\n"
            "Fetch the file again, or use the model's safetensors."
        )
    if get("remove_extra_whitespaces"):
        raise TargetError(
            f"{path} sets tokenizer.ggml.remove_extra_whitespaces, which ttspec does not build.\n"
            "Use the model's safetensors instead."
        )
    # Words of their own are looked for in the text as it is, so their spaces are spaces.
    own = {i: tokens[i].replace(SPACE, " ") for i, kind in enumerate(types) if kind == OWN_WORD}
    vocabulary = {own.get(i, token): i for i, token in enumerate(tokens)}
    special = [tokens[i] for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)]
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    model = BPE(
        vocabulary,
        _merges([(scores[i], i, tokens[i]) for i in normal]),
        unk_token=next((t for t, k in zip(tokens, types, strict=True) if k == UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    backend = Tokenizer(model)
    prefix = bool(get("add_space_prefix", True))
    # A file does not say whether text after a special token gets a space too; by default none does.
    scheme = "first" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    decoder = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoder + [decoders.Strip(" ", 1, 0)] * prefix)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(word, normalized=False) for word in own.values()])
    return backend


def _merges(pieces: list[tuple[float, int, str]]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first; pieces are (score, id, text).

    Sentencepiece merges the two neighbours whose union scores best. Its trainer gives ids in that
    order too, which decides where a converter left the scores out.
    """
    parts = {piece for _, _, piece in pieces}
    merges = []
    for _, _, piece in sorted(pieces, key=lambda given: (-given[0], given[1])):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [cut for cut in cuts if cut[0] in parts and cut[1] in parts]
    return merges


def _tokenizer_beside(
    path: Path, meta: dict[str, Any], tokens: list[str], described: str
) -> PreTrainedTokenizerBase:
    """The model's own, if it lies there and has the same tokens."""
    folder = path.parent
    if not (folder / "tokenizer.json").is_file():
        raise TargetError(
            f"{path} has a tokenizer ({described}) that ttspec does not build; it does llama "
            f"(sentencepiece) and gpt2 with {', '.join(SPLITS)}.\n"
            "Put the model's tokenizer.json and tokenizer_config.json beside it."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    theirs = tokenizer.get_vocab()
    odd = sum(i >= len(tokens) or tokens[i] != token for token, i in theirs.items())
    if odd > len(theirs) // 100:  # a file may spell its spare tokens otherwise
        raise TargetError(
            f"{folder / 'tokenizer.json'} gives {odd:,} of {len(theirs):,} tokens other ids than "
            f"{path.name}.\nPut the tokenizer of the same model there."
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = meta.get("tokenizer.chat_template")
    return tokenizer
