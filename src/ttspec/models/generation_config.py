"""What a target's generation_config.json asks for: taken over, known to be neutral, or refused."""

from __future__ import annotations

from typing import Any

from ttspec.config import PENALTIES, GenerateConfig
from ttspec.errors import OptionError, TargetError

UNSUPPORTED = (
    "encoder_repetition_penalty",
    "sequence_bias",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
    "penalty_alpha",
    "num_beams",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "watermarking_config",
    "stop_strings",
    "encoder_no_repeat_ngram_size",
)
"""Entries that change the output and that we do not implement."""
ALWAYS = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens"),
    *("min_length", "suppress_tokens", "begin_suppress_tokens"),
)
"""Entries that hold for greedy decoding too, unlike temperature and filters."""
NEUTRAL = (None, False, 0, 0.0, 1, 1.0, [], {})


def sampling_defaults(generation: Any, vocabulary: int) -> dict[str, Any]:
    """How a target's tokens are chosen where nobody says otherwise.

    Returns:
        Every field of `SamplingConfig` that `GenerateConfig` leaves to the target, by name.

    Raises:
        TargetError: An entry is not implemented, or has a value that is not allowed.
    """
    for name in UNSUPPORTED:
        value = getattr(generation, name, None)
        if value not in NEUTRAL:
            raise TargetError(
                f"The target's generation_config.json sets {name} = {value!r}, which ttspec does "
                f"not implement.\nRemove it there, knowing that the output changes."
            )
    defaults: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if generation.do_sample:
        defaults["temperature"] = 1.0
        given = {name: getattr(generation, name, None) for name in defaults}
        defaults |= {name: value for name, value in given.items() if value is not None}
    given = {name: getattr(generation, name, None) for name in ALWAYS}
    try:
        sampling = GenerateConfig().sampling({n: v for n, v in given.items() if v is not None})
    except OptionError as error:
        first = str(error).splitlines()[0]
        raise TargetError(
            f"The target's generation_config.json cannot be followed: {first}\nMend it there."
        ) from error
    for name, tokens in sampling.tokens_named().items():
        if wrong := [token for token in tokens if token >= vocabulary]:
            raise TargetError(
                f"The target's generation_config.json names the token {wrong[0]} in {name}; there "
                f"are {vocabulary}, from 0.\nMend it there."
            )
    return defaults | {name: getattr(sampling, name) for name in PENALTIES}
