"""A single-file checkpoint of the original (LDM) layout loads offline, tensor by tensor."""

import json
import re
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.formats import FormatError
from trainer.formats.single_file import CONFIGS, load_sd1

# The LDM names of diffusers' UNet modules, written down from the original model's layout (b = block, j = index in it).
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
EDGES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet(name):
    stem, _, leaf = name.rpartition(".")
    if stem in EDGES:
        return f"model.diffusion_model.{EDGES[stem]}.{leaf}"
    m = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    side, b, group, j, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
    if group == "downsamplers":
        return f"model.diffusion_model.input_blocks.{3 * b + 3}.0.op.{leaf}"
    if group == "upsamplers":
        return f"model.diffusion_model.output_blocks.{3 * b + 2}.{1 if b == 0 else 2}.conv.{leaf}"
    if group == "resnets":
        inner, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[inner]}.{leaf}"
    place = 0 if group == "resnets" else 1
    where = {
        "down": f"input_blocks.{3 * b + j + 1}.{place}",
        "mid": f"middle_block.{2 * j if group == 'resnets' else 1}",
        "up": f"output_blocks.{3 * b + j}.{place}",
    }[side]
    return f"model.diffusion_model.{where}.{rest}"


def ldm_vae(name, blocks=4):
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    return "first_stage_model." + name


def tiny(config_dir):
    """SD1.5 with narrow layers, and its configuration folder."""
    shutil.copytree(CONFIGS, config_dir)
    changes = {
        "unet": {
            "block_out_channels": [8, 16, 32, 32],
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
            "sample_size": 8,
        },
        "vae": {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 2, "sample_size": 64},
        "text_encoder": {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    for name, change in changes.items():
        file = config_dir / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    torch.manual_seed(0)
    models = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_dir / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(config_dir / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(config_dir / "text_encoder")),
    }
    for model in models.values():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05)  # also the biases and norms that start as 0 and 1
    return models


def checkpoint(models):
    state = {ldm_unet(k): t for k, t in models["unet"].state_dict().items()}
    for k, t in models["vae"].state_dict().items():
        attention = "attentions" in k and "group_norm" not in k and k.endswith("weight")
        state[ldm_vae(k)] = t[:, :, None, None] if attention else t  # the original has 1x1 convolutions there
    text = models["text_encoder"].state_dict()
    state |= {f"cond_stage_model.transformer.text_model.{k}": t for k, t in text.items()}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.ones(1000)  # what such files carry beside the models
    assert len(state) == sum(len(m.state_dict()) for m in models.values()) + 2
    return {k: t.contiguous() for k, t in state.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("single")
    models = tiny(base / "configs")
    save_file(checkpoint(models), base / "tiny.safetensors")
    return models, base / "tiny.safetensors", base / "configs"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something looked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_tensor_is_the_same(made):
    models, path, configs = made
    loaded = load_sd1(path, torch.float32, configs)
    assert loaded.keys() == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    for name, model in models.items():
        want, got = model.state_dict(), loaded[name].state_dict()
        assert want.keys() == got.keys() and len(want) > 30
        for key, tensor in want.items():
            assert torch.equal(got[key], tensor), (name, key)
        assert not loaded[name].training
    ids = loaded["tokenizer"]("a photo of a cat", padding="max_length", return_tensors="pt").input_ids
    for m in models.values():
        m.eval()
    with torch.no_grad():
        hidden = models["text_encoder"](ids).last_hidden_state
        assert torch.equal(loaded["text_encoder"](ids).last_hidden_state, hidden)
        noisy = torch.randn(1, 4, 8, 8)
        assert torch.equal(loaded["unet"](noisy, 10, hidden).sample, models["unet"](noisy, 10, hidden).sample)
    assert loaded["scheduler"].config.prediction_type == "epsilon"
    assert loaded["scheduler"].alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)  # SD1.x's last


def test_half_precision_leaves_the_vae_alone(made):
    _, path, configs = made
    loaded = load_sd1(path, torch.bfloat16, configs)
    assert [loaded[n].dtype for n in ("unet", "text_encoder", "vae")] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_text_encoders_without_the_text_model_level(made, tmp_path):
    models, path, configs = made
    old = {k.replace("transformer.text_model.", "transformer."): t for k, t in load_file(path).items()}
    save_file(old, tmp_path / "old.safetensors")
    loaded = load_sd1(tmp_path / "old.safetensors", torch.float32, configs)["text_encoder"].state_dict()
    assert all(torch.equal(loaded[k], t) for k, t in models["text_encoder"].state_dict().items())


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("model.diffusion_model.out.2.", r"part\.safetensors: the UNet lacks 2 tensors, the first is conv_out\.weight"),
        ("model.diffusion_model.input_blocks.1.1.proj_in.", "the UNet lacks 2 tensors"),
        ("first_stage_model.decoder.conv_out.", "the VAE lacks 2 tensors|lacks a tensor: 'decoder.conv_out"),
        ("first_stage_model.encoder.down.1.block.0.", "the VAE lacks"),
        ("cond_stage_model.transformer.text_model.final", "the text encoder lacks 2 tensors"),
    ],
)
def test_missing_tensors_are_told(made, tmp_path, prefix, said):
    _, path, configs = made
    save_file({k: t for k, t in load_file(path).items() if not k.startswith(prefix)}, tmp_path / "part.safetensors")
    with pytest.raises(FormatError, match=said):
        load_sd1(tmp_path / "part.safetensors", torch.float32, configs)


def test_other_sizes_are_told(made):
    with pytest.raises(
        FormatError, match=r"the UNet is of another size: .* has the shape \(8, 4, 3, 3\), Stable Diffusion 1\.x has \(320, 4, 3, 3\)"
    ):
        load_sd1(made[1], torch.float32)


def test_other_kinds_are_told(tmp_path):
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(FormatError, match=r"is a VAE.*Needed here: a complete Stable Diffusion 1\.x"):
        load_sd1(tmp_path / "vae.safetensors", torch.float32)


def test_shipped_tokenizer_is_clips():
    tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer", local_files_only=True)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("A  PHOTO of\na cat", padding="max_length", truncation=True).input_ids
    assert padded == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert tokenizer.model_max_length == len(tokenizer("cat " * 200, truncation=True).input_ids) == 77


def test_shipped_configurations_are_sd15s():
    """Parameter counts of Stable Diffusion 1.5's three models."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"))
    assert [sum(p.numel() for p in m.parameters()) for m in (unet, vae, text)] == [859_520_964, 83_653_863, 123_060_480]
