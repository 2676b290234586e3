#!/bin/sh
# transformers 5.24.0: prompt lookup drafts the picture: a chat prompt with one stops with "Image features and image tokens do not match".
#
# Chat formats end a prompt with the same newline that stands behind "user" at its beginning, and there the picture follows: a few hundred placeholders.
# `PromptLookupCandidateGenerator` copies what followed the last token before, so its first draft is made of placeholders. The first round reads prompt,
# drafts and the picture together, and the model counts more placeholders than the picture has parts. The message names neither drafts nor lookup.
# Whether it comes depends on the text: with the question before the picture the copy is a piece of the question, and all is well.
# `suppress_tokens` with the placeholder's id ends copies before it, and cures it, since lookup asks processors what is forbidden.
# Expected: the greedy text of the model without drafts. A placeholder can be no draft: the model never writes one.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, tiny models with random weights, 6 prompts, greedy, 12 tokens, 3 drafts a round), texts equal to those without
# drafts, and prompts that stop with the error; picture first, question first, picture first with the placeholder suppressed:
#     qwen2_5_vl: 0 equal, 6 stop; 6 equal, 0 stop; 6 equal, 0 stop
#     qwen3_vl: 0 equal, 6 stop; 6 equal, 0 stop; 6 equal, 0 stop
#     gemma3: 0 equal, 6 stop; 6 equal, 0 stop; 6 equal, 0 stop
#     glm4v: 0 equal, 6 stop; 6 equal, 0 stop; 6 equal, 0 stop
# Fails when prompts with the picture first are answered.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PICTURE, BEGIN, END, VIDEO = 90, 91, 92, 93
NEWLINE, USER, ASSISTANT, START, STOP = 70, 71, 72, 73, 74
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TEXT.update(vocab_size=100, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None)
AXES = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0})
EYES = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
EYES.update(out_hidden_size=64, in_channels=3)
IDS = dict(image_token_id=PICTURE, video_token_id=VIDEO)
GRID = torch.tensor([[1, 6, 8]])  # patches of time, height and width, four of which make a placeholder


def configs():
    ends = dict(vision_start_token_id=BEGIN, vision_end_token_id=END)
    own = dict(window_size=16, fullatt_block_indexes=[1])
    yield "qwen2_5_vl", dict(vision_config=EYES | own, text_config=TEXT | AXES, **IDS, **ends)
    own = dict(deepstack_visual_indexes=[0], num_position_embeddings=64)
    yield "qwen3_vl", dict(vision_config=EYES | own, text_config=TEXT | AXES, **IDS, **ends)
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    eyes |= dict(model_type="siglip_vision_model", vision_use_head=False)
    ends = dict(boi_token_index=BEGIN, eoi_token_index=END, mm_tokens_per_image=4)
    yield "gemma3", dict(vision_config=eyes, text_config=TEXT, image_token_index=PICTURE, image_token_id=PICTURE, **ends)
    ends = dict(image_start_token_id=BEGIN, image_end_token_id=END)
    yield "glm4v", dict(vision_config=EYES | dict(image_size=32), text_config=TEXT | AXES, **IDS, **ends)


def inputs(kind, seed, picture_first):
    """User, newline, a picture and a question, assistant, newline: as chat templates lay them out."""
    torch.manual_seed(seed)
    picture = [BEGIN] + [PICTURE] * (4 if kind == "gemma3" else 12) + [END]
    question = torch.randint(5, 60, (6,)).tolist()
    parts = picture + question if picture_first else question + picture
    ids = torch.tensor([[START, USER, NEWLINE, *parts, STOP, NEWLINE, START, ASSISTANT, NEWLINE]])
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if kind == "gemma3":
        return given | dict(token_type_ids=(ids == PICTURE).long(), pixel_values=torch.randn(1, 3, 16, 16))
    return given | dict(mm_token_type_ids=(ids == PICTURE).long(), image_grid_thw=GRID, pixel_values=torch.randn(48, 96))


def text(model, given, **options):
    try:
        return model.generate(**given, max_new_tokens=12, do_sample=False, **options).tolist()
    except ValueError as error:
        assert "do not match" in str(error), error
        return None


held = []
for kind, config in configs():
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config)).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            weight.data *= 2.5  # far from uniform
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    said = []
    for picture_first, more in ((True, {}), (False, {}), (True, dict(suppress_tokens=[PICTURE]))):
        given = [inputs(kind, seed, picture_first) for seed in range(6)]
        plain = [text(model, one, **more) for one in given]
        drafted = [text(model, one, prompt_lookup_num_tokens=3, **more) for one in given]
        assert None not in plain
        held.append((sum(one == other for one, other in zip(plain, drafted)), drafted.count(None)))
        said.append("{} equal, {} stop".format(*held[-1]))
    print(f"{kind}: {'; '.join(said)}")
sys.exit(held != [(0, 6), (6, 0), (6, 0)] * 4)
PYTHON
