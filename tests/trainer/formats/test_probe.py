"""Every kind of file and folder is told by its header, with real shapes."""

import json
import struct

import numpy as np
import pytest

from trainer.formats import FormatError
from trainer.formats.probe import identify, identify_header, native_resolution, prediction, weight_files

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
SD3 = {LDM + "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536), LDM + "x_embedder.proj.weight": (1536, 16, 2, 2)} | VAE
NORM = {LDM + "joint_blocks.0.x_block.attn.ln_q.weight": (64,)}
SD35_LARGE = {k: tuple({4608: 7296, 1536: 2432}.get(n, n) for n in s) for k, s in SD3.items()} | NORM
SD35_MEDIUM = SD3 | NORM | {LDM + "joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)}
FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "double_blocks.0.img_attn.qkv.weight": (9216, 3072)}

CASES = {
    "sd1": (SD1, {}, "sd1", "sd1"),
    "sd1 of another size": (SD1 | {CROSS.format(1): (32, 64), CLIP: (128, 64)}, {}, "sd1", "sd1"),
    "sd2": (SD2, {}, "sd2", "sd2"),
    "sdxl": (SDXL, {}, "sdxl", "sdxl"),
    "refiner": (REFINER, {}, "sdxl_refiner", "sdxl_refiner"),
    "sd3": (SD3, {}, "sd3", "sd3"),
    "sd3.5 medium": (SD35_MEDIUM, {}, "sd3", "sd3"),
    "sd3.5 large without prefix": ({k.removeprefix(LDM): s for k, s in SD35_LARGE.items()}, {}, "sd3", "sd3"),
    "sd3 of another size": ({LDM + "joint_blocks.0.x_block.attn.qkv.weight": (96, 32)} | VAE, {}, "sd3", "sd3"),
    "sd3 transformer alone": ({k: s for k, s in SD35_MEDIUM.items() if k not in VAE}, {}, "unet", "sd3"),
    "sd3 inpainting": (SD3 | {LDM + "x_embedder.proj.weight": (1536, 33, 2, 2)}, {}, "inpainting", "sd3"),
    "sd2 inpainting": (SD2 | {LDM + "input_blocks.0.0.weight": (320, 9, 3, 3)}, {}, "inpainting", "sd2"),
    "sd2 depth": (SD2 | {LDM + "input_blocks.0.0.weight": (320, 5, 3, 3)}, {}, "inpainting", "sd2"),
    "sdxl with one text encoder": ({k: s for k, s in SDXL.items() if "embedders.0" not in k}, {}, "unet", "sdxl"),
    "sdxl unet alone": ({k: s for k, s in SDXL.items() if k.startswith(LDM)}, {}, "unet", "sdxl"),
    "playground": (SDXL | {"edm_mean": (4,)}, {}, "unknown", None),
    "cosxl": (SDXL | {"edm_vpred.sigma_max": ()}, {}, "unknown", None),
    "nf4": (SDXL | {LDM + "out.2.weight.absmax": (4,)}, {}, "unknown", None),
    "flux with prefix": ({LDM + k: s for k, s in FLUX.items()}, {}, "flux", "flux"),
    "diffusers sd3 transformer": ({"transformer_blocks.0.attn.to_q.weight": (1536, 1536)}, {}, "unet", None),
    "sd3 text encoders": ({"text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": (768,)}, {}, "text_encoder", None),
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


def test_sd3s_sizes_are_told():
    expected = {"sd3": "medium", "sd3.5 medium": "3.5 medium", "sd3.5 large without prefix": "3.5 large", "sd3 of another size": "medium"}
    for case in expected:
        found = identify_header({k: ("BF16", s) for k, s in CASES[case][0].items()}, {})
        assert found.what == f"a checkpoint of Stable Diffusion {expected[case] if '3.5' in case else '3 medium'}"
        assert found.variant == {"3.5 medium": "sd35_medium", "3.5 large": "sd35_large"}.get(expected[case], "sd3_medium")
    alone = identify_header({k: ("BF16", s) for k, s in CASES["sd3 transformer alone"][0].items()}, {})
    assert alone.what == "a checkpoint of Stable Diffusion 3.5 medium without VAE; choose a checkpoint that has it"


@pytest.mark.parametrize(
    ("name", "part", "config", "kind", "what"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "unet", {"in_channels": 4, "cross_attention_dim": 1280}, "sdxl_refiner", "the SDXL refiner"),
        ("StableDiffusionXLInpaintPipeline", "unet", {"in_channels": 9, "cross_attention_dim": 2048}, "inpainting", "Stable Diffusion XL"),
        ("StableDiffusionXLPipeline", "unet", {"in_channels": 4, "cross_attention_dim": 2048}, "sdxl", "Stable Diffusion XL"),
        ("StableDiffusionPipeline", "unet", {"in_channels": 7, "cross_attention_dim": 1024}, "inpainting", "Stable Diffusion 2.x"),
        ("StableDiffusion3Pipeline", "transformer", {"in_channels": 16, "qk_norm": None}, "sd3", "Stable Diffusion 3 medium"),
        ("StableDiffusion3Pipeline", "transformer", {"in_channels": 16}, "sd3", "Stable Diffusion 3 medium"),
        ("StableDiffusion3Pipeline", "transformer", {"qk_norm": "rms_norm", "num_layers": 38}, "sd3", "Stable Diffusion 3.5 large"),
        (
            "StableDiffusion3Pipeline",
            "transformer",
            {"qk_norm": "rms_norm", "dual_attention_layers": [0]},
            "sd3",
            "Stable Diffusion 3.5 medium",
        ),
        ("StableDiffusion3InpaintPipeline", "transformer", {"in_channels": 33}, "inpainting", "Stable Diffusion 3 medium"),
        ("StableDiffusion3ControlNetPipeline", "transformer", {}, "controlnet", "a ControlNet pipeline"),
    ],
)
def test_folders_by_the_configuration_of_their_denoiser(tmp_path, name, part, config, kind, what):
    path = folder(tmp_path / "model", name)
    (path / part).mkdir()
    (path / part / "config.json").write_text(json.dumps(config))
    found = identify(path)
    assert found.kind == kind and what in found.what


def test_a_folder_of_another_schedule_is_told(tmp_path):
    path = folder(tmp_path / "model", "StableDiffusionXLPipeline")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler"}))
    assert identify(path).kind == "unknown" and "EDM" in identify(path).what


def write(path, shapes, metadata=None):
    from safetensors.numpy import save_file

    save_file({k: np.zeros(shape, np.int8) for k, shape in shapes.items()}, path, metadata)
    return path


SPEC = "modelspec."
V, EPSILON = "v_prediction", "epsilon"


@pytest.mark.parametrize(
    ("markers", "metadata", "said"),
    [
        ((), None, (None, None)),
        (("v_pred",), None, (V, None)),
        (("v_pred", "ztsnr"), None, (V, True)),
        (("ztsnr",), None, (V, True)),
        ((), {SPEC + "prediction_type": "v"}, (V, None)),
        ((), {SPEC + "prediction_type": "epsilon"}, (EPSILON, None)),
        ((), {SPEC + "predict_key": "v"}, (V, None)),
        ((), {SPEC + "predict_key": "epsilon", SPEC + "prediction_type": ""}, (EPSILON, None)),
        ((), {SPEC + "prediction_type": "of another kind"}, (None, None)),
        (("v_pred",), {SPEC + "prediction_type": "epsilon"}, (V, None)),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (V, True)),
        ((), {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, (EPSILON, False)),
        ((), {"ss_base_model_version": "sd_v2_v"}, (V, None)),
        ((), {"ss_base_model_version": "sd_v1"}, (None, None)),
        ((), {"ss_base_model_version": "sdxl_base_v1-0"}, (None, None)),
    ],
)
def test_what_a_single_file_says_of_its_prediction(tmp_path, markers, metadata, said):
    assert prediction(write(tmp_path / "m.safetensors", {"a": (1,)} | dict.fromkeys(markers, ()), metadata)) == said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, (None, None)),
        ({"prediction_type": "epsilon"}, (EPSILON, None)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, (V, True)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}, (V, False)),
        ({"prediction_type": "sample"}, (None, None)),
    ],
)
def test_what_a_folder_says_of_its_prediction(tmp_path, config, said):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert prediction(tmp_path) == said


def test_native_resolutions(tmp_path):
    for case, side in {"sd1": 512, "sd2": 768, "sdxl": 1024, "sd3": 1024, "sd3.5 medium": 1024}.items():
        path = write(
            tmp_path / "m.safetensors",
            {k: (1, 4, 1, 1) if k.endswith("0.0.weight") else (1, 16) + (1,) * (len(s) - 2) for k, s in CASES[case][0].items()},
        )
        assert native_resolution(path) == side and native_resolution(path, 640) == 640
    from trainer.formats.single_file import CONFIGS

    released = {"sd1": 512, "sd2": 768, "sdxl": 1024, "sd3_medium": 1024, "sd35_medium": 1024, "sd35_large": 1024}
    assert {n: native_resolution(CONFIGS / n, 333) for n in released} == released


def test_the_weights_of_a_folder():
    whole, half = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    pieces = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = [f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    old = [f"model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]
    other = ["config.json", "model.bin", "diffusion_pytorch_model.non_ema.safetensors", "model.safetensors.index.json"]
    assert weight_files([half, whole, *other]) == [whole]
    assert weight_files([half, *other]) == [half]
    assert weight_files([*halves, *pieces[::-1], *other]) == pieces
    assert weight_files([*halves, *other]) == halves and weight_files([*old, *other]) == old
    assert weight_files(other) == []
