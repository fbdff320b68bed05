"""The names of whole published models, from their configurations on the meta device: counts and shapes that the tools' own loaders have."""

import functools
import math
import re

import pytest

from trainer.families import get
from trainer.families.common import TEXT_TARGETS
from trainer.formats import comfy_names, kohya, layouts, ldm_names, peft_names, sd3_names
from trainer.formats.single_file import CONFIGS, blank

FOLDERS = {
    "sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd3_medium": "sd3_medium", "sd3.5_medium": "sd35_medium", "sd3.5_large": "sd35_large",
}  # fmt: skip


def family_of(name):
    return name[:3] if name.startswith("sd3") else name


@functools.cache
def real(name):
    """{part: {path: shape}} of a published model, without memory for its weights."""
    return kohya.layers(blank(CONFIGS / FOLDERS[name], get(family_of(name)).parts))


def chosen(name, part, kinds):
    table = get(family_of(name)).unet_targets if part == "unet" else TEXT_TARGETS
    patterns = [re.compile(rf"(.*\.)?{table[k]}") for k in kinds if k in table]
    return {p: s for p, s in real(name)[part].items() if any(r.fullmatch(p) for r in patterns)}


def per_rank(shapes):
    return sum(s[0] + math.prod(s[1:]) for s in shapes.values())


@pytest.mark.parametrize("name", layouts.NAMES)
def test_the_short_lists_are_the_models_own_modules(name):
    own = {part: {kohya.canonical(part, p): s for p, s in paths.items()} for part, paths in real(name).items()}
    assert layouts.layers(name) == own


COUNTS = {  # standard layers and parameters per rank of: UNet, text encoders, convolutions (without 1x1 ones of attention)
    "sd1": ((192, 423_936), {"text_1": (72, 165_888)}, (86, 626_880)),
    "sd2": ((192, 432_128), {"text_1": (138, 423_936)}, (86, 626_880)),
    "sdxl": ((722, 2_659_840), {"text_1": (72, 165_888), "text_2": (192, 737_280)}, (66, 414_400)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_parameters(name):
    standard, texts, convolutions = COUNTS[name]
    kinds = ("attention", "feed_forward", "projections")
    unet = chosen(name, "unet", kinds)
    assert (len(unet), per_rank(unet)) == standard
    assert {p: (len(c), per_rank(c)) for p in texts for c in [chosen(name, p, kinds)]} == texts
    blocks = chosen(name, "unet", ("convolutions",))
    assert (len(blocks), per_rank(blocks)) == convolutions
    keys = 3 * (len(unet) + sum(n for n, _ in texts.values())), 3 * len(unet)
    assert keys == {"sd1": (792, 576), "sd2": (990, 576), "sdxl": (2958, 2166)}[name]


@pytest.mark.parametrize(("name", "fused", "plain"), [("sd3_medium", 245, 341), ("sd3.5_medium", 271, 393), ("sd3.5_large", 385, 537)])
def test_sd3_layers_in_both_namings(name, fused, plain):
    unet = real(name)["unet"]
    stems = {kohya.stem("sd3", "unet", p) for p in unet}
    assert (len(stems), len(unet)) == (fused, plain)
    assert len([s for s in stems if "joint_blocks" in s]) == fused - 8
    assert {peft_names.stem("sd3", "unet", p) for p in unet} == {f"transformer.{p}" for p in unet}
    assert sum("attn2_qkv" in s for s in stems) == (13 if name == "sd3.5_medium" else 0)
    assert sd3_names.variant(unet) == name
    assert sd3_names.variant(dict.fromkeys(stems, ())) == name  # a file's keys show it too
    rows = {
        "sd3_medium": (9216, 9216, 3072),
        "sd3.5_medium": (13824, 9216, 3072),
        "sd3.5_large": (14592, 14592, 4864),
    }[name]
    last = len({p.split(".")[1] for p in unet if p.startswith("transformer_blocks")}) - 1
    assert unet["transformer_blocks.0.norm1.linear"][0] == rows[0]
    assert unet[f"transformer_blocks.{last}.norm1.linear"][0] == rows[1]
    assert unet[f"transformer_blocks.{last}.norm1_context.linear"][0] == rows[2]
    assert f"transformer_blocks.{last}.attn.to_add_out" not in unet


EXPECTED = {
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
        "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (640, 768),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (1280, 768),
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0": (320, 320),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (2560, 320),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2": (320, 1280),
        "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
        "lora_unet_up_blocks_1_attentions_0_proj_out": (1280, 1280, 1, 1),
        "lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_time_emb_proj": (320, 1280),
        "lora_unet_mid_block_resnets_1_conv2": (1280, 1280, 3, 3),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut": (640, 320, 1, 1),
        "lora_unet_down_blocks_0_downsamplers_0_conv": (320, 320, 3, 3),
        "lora_unet_up_blocks_0_upsamplers_0_conv": (1280, 1280, 3, 3),
        "lora_unet_conv_in": (320, 4, 3, 3),
        "lora_unet_conv_out": (4, 320, 3, 3),
        "lora_unet_time_embedding_linear_1": (1280, 320),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_te_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
    },
    "sd2": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320),
        "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (640, 1024),
        "lora_te_text_model_encoder_layers_22_mlp_fc2": (1024, 4096),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640),
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k": (1280, 2048),
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v": (1280, 2048),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn1_to_out_0": (640, 640),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj": (5120, 640),
        "lora_unet_input_blocks_4_1_proj_in": (640, 640),
        "lora_unet_output_blocks_0_1_proj_out": (1280, 1280),
        "lora_unet_input_blocks_1_0_in_layers_2": (320, 320, 3, 3),
        "lora_unet_input_blocks_1_0_emb_layers_1": (320, 1280),
        "lora_unet_middle_block_2_out_layers_3": (1280, 1280, 3, 3),
        "lora_unet_input_blocks_4_0_skip_connection": (640, 320, 1, 1),
        "lora_unet_input_blocks_3_0_op": (320, 320, 3, 3),
        "lora_unet_output_blocks_2_2_conv": (1280, 1280, 3, 3),
        "lora_unet_input_blocks_0_0": (320, 4, 3, 3),
        "lora_unet_out_2": (4, 320, 3, 3),
        "lora_unet_time_embed_0": (1280, 320),
        "lora_unet_label_emb_0_0": (1280, 2816),
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": (3072, 768),
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (1280, 1280),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280),
        "lora_te2_text_projection": (1280, 1280),
    },
    "sd3.5_medium": {
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1": (13824, 1536),
        "lora_unet_joint_blocks_12_x_block_attn2_proj": (1536, 1536),
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": (3072, 1536),
        "lora_unet_joint_blocks_5_context_block_mlp_fc1": (6144, 1536),
        "lora_unet_x_embedder_proj": (1536, 16, 2, 2),
        "lora_unet_final_layer_adaLN_modulation_1": (3072, 1536),
        "lora_unet_t_embedder_mlp_2": (1536, 1536),
        "lora_te2_text_model_encoder_layers_31_mlp_fc2": (1280, 5120),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_names_and_shapes(name):
    every = {kohya.stem(family_of(name), part, p): shape for part, paths in real(name).items() for p, shape in paths.items()}
    assert {stem: every.get(stem) for stem in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", layouts.NAMES)
def test_every_stem_leads_back_to_its_path(name):
    family = family_of(name)
    for part, paths in real(name).items():
        for path in paths:
            bare = kohya.canonical(part, path)
            found, own = kohya.locate(family, kohya.stem(family, part, path))
            assert found == part and bare in own
            assert peft_names.stem(family, part, path) == peft_names.stem(family, part, bare)
            there, original = comfy_names.locate(family, comfy_names.stem(family, part, path))
            back = (
                (original,)
                if part != "unet"
                else sd3_names.to_diffusers(original)
                if family == "sd3"
                else (ldm_names.to_diffusers(original),)
            )
            assert there == part and bare in back
            if part == "unet":  # the names that other tools write
                assert kohya.locate(
                    family, kohya.plain_stem(family, part, path) if family != "sd3" else f"lora_transformer_{path.replace('.', '_')}"
                ) == (part, (path,))


def test_no_two_layers_share_a_name():
    for name in ("sd1", "sd2", "sdxl"):
        unet = real(name)["unet"]
        assert len({ldm_names.to_ldm(p, attention_first=name == "sdxl") for p in unet}) == len(unet)
