"""Toy models that behave like real ones in seconds, and the real built-in target.

The process that hands out the tests reads this file before the others start, and runs none:
what loads torch is imported where it is used.
"""

from __future__ import annotations

import os
import string
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ttspec.config import DraftConfig
from ttspec.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx
    from transformers import PreTrainedTokenizerFast

    from ttspec.decoding.engine import Engine

VARIANTS = (
    *("eagle3-normed-residual", "eagle3.1", "eagle3-norm-before-fc", "eagle3-qk-norm"),
    *("pard-qwen3", "causal-qwen2", "dflash-sliding", "dflash-unusual", "eagle3-unusual"),
    *("mtp-gated", "mtp-experts", "eagle3-layers", "dspark-gated", "dspark-rnn"),
    *("dflash2-sliding", "jetspec", "domino-shifted", "peagle-sliding"),
)
"""Differ from another kind inside a layer only, which tests of drafts and gradients show."""
OF_ROUNDS = (
    "test_a_text_is_that_of_plain_decoding",
    "test_a_context_read_in_parts_is_one_read_at_once",
    "test_after_a_stop_in_a_block_or_a_cancel_the_next_turn_is_what_plain_decoding_says",
    "test_a_captured_round_does_what_the_round_does",
    "test_rows_of_a_batch_write_and_accept_what_each_does_alone",
    "test_a_row_that_rested_while_another_went_on_continues_as_alone",
    "test_an_export_of_an_export_and_back_has_the_same_tensors",
)
"""Look at what lies around a layer: for variants they are slow tests."""
ONE_CASE = (
    "test_a_batch_is_gone_before_the_next_one_is_made",
    "test_a_padded_prompt_is_read_as_any",
    "test_a_replay_does_round_for_round_what_the_run_did",
    "test_a_row_of_a_batch_writes_what_it_writes_alone",
    "test_a_shared_drafter_learns_its_requests_by_heart",
    "test_a_table_of_positions_is_enough_to_the_last_token",
    "test_a_text_is_the_same_however_often_lengths_change",
    "test_a_timed_replay_does_round_for_round_what_the_run_did",
    "test_a_timed_replay_writes_a_text_that_the_target_would_not",
    "test_acceptance_follows_the_schedule",
    "test_captured_rounds_of_changing_lengths_do_what_the_rounds_do",
    "test_compiled_rounds_of_hybrids_say_the_same",
    "test_compiled_rounds_say_the_same_and_layers_share_their_code",
    "test_compiled_rows_rolled_back_are_as_if_read_at_once",
    "test_conversations_that_begin_alike_keep_a_row_each",
    "test_drafts_after_copies_are_those_of_who_never_copied",
    "test_drafts_after_going_back_are_those_of_a_fresh_request",
    "test_drafts_judged_by_a_q_that_did_not_draft_them_are_found",
    "test_every_learning_drafter_writes_what_plain_decoding_writes",
    "test_every_tensor_is_where_its_layer_is",
    "test_greedy_tokens_are_those_of_transformers",
    "test_init_goes_on_with_a_drafter_of_the_same_kind",
    "test_it_goes_on_learning_while_the_drafter_pauses",
    "test_learning_goes_on_from_the_bits_that_were_kept",
    "test_many_requests_leave_memory_where_few_left_it",
    "test_nothing_that_one_tenant_taught_reaches_the_next_one",
    "test_sampled_answers_follow_the_law",
    "test_sixteen_prompts_are_answered_as_plainly",
    "test_static_and_learning_drafters_write_what_plain_decoding_writes",
    "test_texts_follow_the_targets_law_while_the_drafter_learns",
    "test_the_commands_save_a_change_and_go_on_from_it",
    "test_the_loss_falls_and_the_drafter_is_better_than_an_untrained_one",
    "test_the_more_was_learned_the_less_time_goes_into_it",
    "test_the_row_holds_what_the_template_writes_and_the_text_is_a_fresh_requests",
    "test_the_text_is_that_of_plain_decoding",
    "test_two_turns_of_a_session_are_the_same_for_every_drafter",
    "test_what_one_tenant_asks_changes_no_draft_of_another",
    "test_what_rounds_take_is_near_the_forecast",
    "test_what_the_target_says_is_the_same_to_the_last_bit",
)
"""Costly tests of what all drafters share: the first case runs, the others are slow tests."""
MANY_CASES = (
    "test_a_bad_tensor_is_refused_with_its_file_and_name",
    "test_a_prompt_read_in_parts_gives_the_same_logits",
    "test_a_small_model_of_the_same_configuration_drafts_and_changes_no_text",
    "test_after_any_verdict_the_context_is_that_of_the_committed_tokens",
    "test_an_architecture_is_right_or_refused_by_name",
    "test_an_export_drafts_what_its_source_drafts",
)
"""Dozens of cases that are much alike: of every four the first runs, the others are slow tests."""
FOUR_KINDS = (
    "test_a_captured_round_does_what_the_round_does",
    "test_after_a_stop_in_a_block_or_a_cancel_the_next_turn_is_what_plain_decoding_says",
    "test_rows_of_a_batch_write_and_accept_what_each_does_alone",
)
OTHERS = ("none", "ngram", "pard2", "mtp", "dspark", "dflash2", "domino", "peagle")
"""Kinds whose rounds are like another kind's: in `FOUR_KINDS` they are slow tests."""
ALWAYS = ("mtp", "dspark", "dflash2", "jetspec", "eagle3-layers")
"""Of the newest kinds what a drafter must do is never a slow test."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    from ttspec.bench.runner import measure_all

    measure_all.__kwdefaults__["warm_up"] = 4  # tests measure little more than that
    torch.set_num_threads(1)  # two threads on a busy machine are slower than one
    seen, counts = set[tuple[Path, str]](), Counter[str]()
    for item in items:
        name, _, variant = item.name.partition("[")
        again = name in ONE_CASE and (item.path, name) in seen
        if item.get_closest_marker("slow") is None:
            seen.add((item.path, name))
        of_rounds = name in OF_ROUNDS and variant.startswith(VARIANTS)
        counts[name] += 1
        again = again or (name in MANY_CASES and counts[name] % 4 != 1)
        which = getattr(item, "callspec", None) and item.callspec.params.get("which")
        if which in ALWAYS and item.path.name in ("test_conformance.py", "test_export.py"):
            continue
        if again or of_rounds or (name in FOUR_KINDS and variant.startswith(OTHERS)):
            item.add_marker(pytest.mark.slow)


DraftConfig.__init__.__kwdefaults__["adaptive"] = False  # no busy machine's clock decides in a test

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # at 0.02 a random model says one token for ever
    "tie_word_embeddings": False,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "dtype": "float32",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def toy_target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with a byte tokenizer; the same weights every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("toy-llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Qwen3, which normalises queries and keys."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("toy-qwen3")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The built-in target, from the user's own cache; fetched on first use."""
    from ttspec.models.source import resolve

    try:
        return resolve("smollm2-135m").path
    except ResourceError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(f"the built-in target cannot be fetched: {error}")


@pytest.fixture(scope="module")
def engine(toy_target_dir) -> Engine:
    from toys import toy_engine

    return toy_engine(toy_target_dir)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    """A client of a server of the toy pair."""
    from servers import running

    with running(engine) as (client, _):
        yield client


@pytest.fixture(scope="module")
def typist(toy_target_dir) -> Engine:
    """A target that writes printable ASCII: other tokens have a logit of 0."""
    import torch
    from toys import repack_head, toy_engine

    engine = toy_engine(toy_target_dir)
    symbols = string.ascii_letters + string.digits + ".,;!?"
    kept = torch.tensor(engine.tokenizer.convert_tokens_to_ids(list(symbols)))
    with torch.no_grad():
        head = engine.target.model.lm_head.weight
        rows = head[kept].clone()
        head.zero_()
        head[kept] = rows
    repack_head(engine.target)
    return engine


@pytest.fixture(scope="session")
def pair(toy_target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name the toy target and a random drafter for it."""
    from toys import make_drafter

    drafter = make_drafter(tmp_path_factory.mktemp("toy-drafter") / "dflash")
    return ["--target", str(toy_target_dir), "--drafter", str(drafter), "--dtype", "float32"]
