"""Log-probabilities of an answer's tokens, in the two forms that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ttspec.records import TokenLogprobs

BytesOf = Callable[[int], bytes]


def of_chat(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], bytes_of: BytesOf
) -> dict[str, Any]:
    """What chat completions have for some tokens."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = bytes_of(token)
        return {"token": _text(text), "logprob": logprob, "bytes": list(text)}

    content = [
        {**entry(token, of_token.logprob), "top_logprobs": [entry(*pair) for pair in of_token.top]}
        for token, of_token in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def of_completion(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], bytes_of: BytesOf, offset: int
) -> dict[str, Any]:
    """What completions have for some tokens, before which an answer has `offset` characters."""
    texts, offsets = [_text(bytes_of(token)) for token in tokens], []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    likely = [
        # What came is among them, as OpenAI has it.
        {_text(bytes_of(t)): value for t, value in (*of_token.top, (token, of_token.logprob))}
        for token, of_token in zip(tokens, logprobs, strict=True)
    ]
    return {
        "tokens": texts,
        "token_logprobs": [of_token.logprob for of_token in logprobs],
        "top_logprobs": likely,
        "text_offset": offsets,
    }


def _text(data: bytes) -> str:
    """Half a character has no text of its own; its bytes are told beside, or it is escaped."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
