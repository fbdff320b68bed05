"""Every kind of file and folder is told by its header, with real shapes."""

import json
import struct

import pytest

from trainer.formats import FormatError
from trainer.formats.probe import identify, identify_header

LDM = "model.diffusion_model."
UNET = {LDM + "input_blocks.0.0.weight": (320, 4, 3, 3), LDM + "out.2.weight": (4, 320, 3, 3)}
CROSS = LDM + "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
VAE = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
CLIP = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
OPEN_CLIP = "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight"
SD1 = UNET | VAE | {CROSS.format(1): (320, 768), CLIP: (3072, 768)}
SD2 = UNET | VAE | {CROSS.format(1): (320, 1024), OPEN_CLIP: (4096, 1024)}
SDXL = (
    UNET
    | VAE
    | {
        CROSS.format(4): (640, 2048),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
    }
)
REFINER = UNET | VAE | {CROSS.format(4): (768, 1280), "conditioner.embedders.0.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280)}
SD3 = {LDM + "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)} | VAE
FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "double_blocks.0.img_attn.qkv.weight": (9216, 3072)}

CASES = {
    "sd1": (SD1, {}, "sd1", "sd1"),
    "sd1 of another size": (SD1 | {CROSS.format(1): (32, 64), CLIP: (128, 64)}, {}, "sd1", "sd1"),
    "sd2": (SD2, {}, "sd2", "sd2"),
    "sdxl": (SDXL, {}, "sdxl", "sdxl"),
    "refiner": (REFINER, {}, "sdxl_refiner", "sdxl_refiner"),
    "sd3": (SD3, {}, "sd3", "sd3"),
    "flux": (FLUX, {}, "flux", "flux"),
    "inpainting": (SD1 | {LDM + "input_blocks.0.0.weight": (320, 9, 3, 3)}, {}, "inpainting", "sd1"),
    "sdxl inpainting": (SDXL | {LDM + "input_blocks.0.0.weight": (320, 9, 3, 3)}, {}, "inpainting", "sdxl"),
    "sd1 unet alone": (UNET | {CROSS.format(1): (320, 768)}, {}, "unet", "sd1"),
    "sd1 without vae": ({k: s for k, s in SD1.items() if k not in VAE}, {}, "unet", "sd1"),
    "diffusers unet": ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, {}, "unet", None),
    "vae": ({"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, {}, "vae", None),
    "clip": ({"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)}, {}, "text_encoder", None),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}, {}, "text_encoder", None),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, {}, "controlnet", None),
    "embedding": ({"emb_params": (4, 768)}, {}, "embedding", None),
    "nothing known": ({"a": (1,)}, {}, "unknown", None),
    "empty": ({}, {}, "unknown", None),
    "lora sd1": ({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 768)}, {}, "lora", "sd1"),
    "lora sd1 text": ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (8, 768)}, {}, "lora", "sd1"),
    "lora sd1 peft": ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (8, 768)}, {}, "lora", "sd1"),
    "lora sd2": ({"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.lora_down.weight": (8, 1024)}, {}, "lora", "sd2"),
    "lora sdxl": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (8, 640)}, {}, "lora", "sdxl"),
    "lora sdxl text": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 1280)}, {}, "lora", "sdxl"),
    "lora sd3": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (8, 1536)}, {}, "lora", "sd3"),
    "lora sd3 peft": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (8, 1536)}, {}, "lora", "sd3"),
    "lora flux": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (8, 3072)}, {}, "lora", "flux"),
    "lora by metadata": ({"lora_unet_conv_in.lora_down.weight": (8, 4, 3, 3)}, {"ss_base_model_version": "sd_v1"}, "lora", "sd1"),
    "lora of no known base": ({"lora_unet_conv_in.lora_down.weight": (8, 4, 3, 3)}, {}, "lora", None),
    "loha": ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (8, 4)}, {}, "lora", None),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds_by_header(case):
    shapes, metadata, kind, family = CASES[case]
    found = identify_header({k: ("F16", s) for k, s in shapes.items()}, metadata)
    assert (found.kind, found.family) == (kind, family)
    assert len(found.what) > 5


def test_the_sentences_name_what_is_wrong():
    said = {c: identify_header({k: ("F16", s) for k, s in CASES[c][0].items()}, {}).what for c in CASES}
    assert (
        said["inpainting"]
        == "an inpainting or editing model of Stable Diffusion 1.x (9 input channels instead of 4); choose the ordinary model of that family"
    )
    assert "without VAE;" in said["sd1 without vae"]
    assert "without VAE and text encoder;" in said["sd1 unet alone"]


def test_a_file_is_told_by_its_header_alone(tmp_path):
    """A whole SD1.5 header in front of a hole of 4 GB of zeros that take no room on the disk."""
    header, end = {}, 0
    for key, shape in SD1.items():
        size = 2
        for side in shape:
            size *= side
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header["big"] = {"dtype": "U8", "shape": [1 << 32], "data_offsets": [end, end + (1 << 32)]}
    raw = json.dumps(header).encode()
    path = tmp_path / "sd15.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end + (1 << 32))
    assert identify(path).kind == "sd1"


def folder(path, name, unet=None):
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    if unet is not None:
        (path / "unet").mkdir()
        (path / "unet" / "config.json").write_text(json.dumps(unet))
    return path


@pytest.mark.parametrize(
    ("name", "unet", "kind"),
    [
        ("StableDiffusionPipeline", {"in_channels": 4, "cross_attention_dim": 768}, "sd1"),
        ("StableDiffusionPipeline", {"in_channels": 4, "cross_attention_dim": 96}, "sd1"),
        ("StableDiffusionPipeline", {"in_channels": 4, "cross_attention_dim": 1024, "use_linear_projection": True}, "sd2"),
        ("StableDiffusionInpaintPipeline", {"in_channels": 9, "cross_attention_dim": 768}, "inpainting"),
        ("StableDiffusionControlNetPipeline", {"in_channels": 4, "cross_attention_dim": 768}, "controlnet"),
        ("StableDiffusionXLPipeline", None, "sdxl"),
        ("StableDiffusion3Pipeline", None, "sd3"),
        ("FluxPipeline", None, "flux"),
        ("KandinskyPipeline", None, "unknown"),
    ],
)
def test_folders(tmp_path, name, unet, kind):
    assert identify(folder(tmp_path / "model", name, unet)).kind == kind


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(FormatError, match=r"has no model_index\.json"):
        identify(tmp_path)
    with pytest.raises(FormatError, match=r"config\.json is missing or cannot be read"):
        identify(folder(tmp_path / "half", "StableDiffusionPipeline"))
    broken = folder(tmp_path / "broken", "x")
    (broken / "model_index.json").write_text("{")
    with pytest.raises(FormatError, match="missing or cannot be read"):
        identify(broken)
