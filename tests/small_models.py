"""Every family as a model of a few MB: the real configurations of assets/models with only widths and depth reduced, random weights.

`make_folder` writes a diffusers folder, `make_single` the same weights as one file in the layout in which people download them: LDM
names for UNet and VAE, open_clip's for SD2's and SDXL's text encoders, MMDiT's for SD3. The names are turned round here by hand, from
the original code's layout, so that the trainer's own conversions are checked against something else.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets" / "models"
FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
VARIANTS = ("sd1", "sd2", "sdxl", "sd3_medium", "sd35_medium", "sd35_large")
TENSORS = {"unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
State = dict[str, torch.Tensor]

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VAE = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4}
UNET = {"norm_num_groups": 8, "sample_size": 8}
MMDIT = {
    **{"attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 80},
    **{"pooled_projection_dim": 56, "pos_embed_max_size": 32, "sample_size": 8, "num_layers": 3},
}
SD3_TEXTS = {
    "text_encoder": TEXT,
    "text_encoder_2": TEXT | {"hidden_size": 24, "projection_dim": 24},
    "text_encoder_3": {"d_model": 80, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 400},
}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": UNET | {"block_out_channels": [16, 32, 32, 32], "attention_head_dim": 2, "cross_attention_dim": 32},
        "text_encoder": TEXT,
    },
    "sd2": {
        "unet": UNET | {"block_out_channels": [16, 32, 32, 32], "attention_head_dim": [2, 4, 4, 4], "cross_attention_dim": 32},
        "text_encoder": TEXT,
    },
    "sdxl": {
        "unet": UNET
        | {"block_out_channels": [16, 32, 32], "attention_head_dim": [2, 4, 4], "cross_attention_dim": 56}
        | {"transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72},
        "text_encoder": TEXT,
        "text_encoder_2": TEXT | {"hidden_size": 24, "projection_dim": 24},
    },
    "sd3_medium": {"transformer": MMDIT, **SD3_TEXTS},
    "sd35_medium": {"transformer": MMDIT | {"dual_attention_layers": [0, 1]}, **SD3_TEXTS},
    "sd35_large": {"transformer": MMDIT | {"num_layers": 4}, **SD3_TEXTS},
}
for _parts in SMALL.values():
    _parts["vae"] = VAE
    for _text in _parts.values():
        if "hidden_size" in _text and "projection_dim" not in _text:
            _text["projection_dim"] = _text["hidden_size"]


def variant_of(family: str) -> str:
    return "sd35_medium" if family == "sd3" else family


# Folders


def make_folder(
    root: Path,
    family: str,
    *,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    t5: bool = False,
    half: bool = False,
    seed: int = 0,
) -> Path:
    """Write a small model of `family` (or of one of VARIANTS; `sd3` is 3.5 medium) as a diffusers folder to `root`.

    Args:
        prediction: what the scheduler's configuration says; "" leaves it out; None: as in the real one.
        zero_snr: `rescale_betas_zero_snr` in the scheduler's configuration; None leaves it out.
        t5: SD3 with its third text encoder and a tokenizer of a few words for it.
        half: weights in fp16 under the names of the fp16 variant.
    """
    variant = variant_of(family)
    for name, config in configs(variant).items():
        if name == "text_encoder_3" and not t5:
            continue
        _write(root / name / "config.json", config)
        state = _state(name, json.dumps(config), seed)
        if half:
            state = {k: t.half() for k, t in state.items()}
        stem = TENSORS.get(name, "model") + (".fp16" if half else "")
        save_file(state, root / name / f"{stem}.safetensors", {"format": "pt"})
    index = _read(ASSETS / variant / "model_index.json")
    if "text_encoder_3" in index and not t5:
        index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    _write(root / "model_index.json", index)
    scheduler = _read(ASSETS / variant / "scheduler" / "scheduler_config.json")
    if prediction is not None:
        scheduler["prediction_type"] = prediction
    if prediction == "":
        del scheduler["prediction_type"]
    if zero_snr is not None:
        scheduler["rescale_betas_zero_snr"] = zero_snr
    _write(root / "scheduler" / "scheduler_config.json", scheduler)
    for name in ("tokenizer", "tokenizer_2"):
        if name in index:
            clip_tokenizer(root / name, "!" if variant == "sd2" or name == "tokenizer_2" else "<|endoftext|>")
    if t5 and variant.startswith("sd3"):
        _t5_tokenizer(root / "tokenizer_3")
    return root


def configs(variant: str) -> dict[str, dict[str, Any]]:
    """The real configurations of a variant's models, in small."""
    return {name: _read(ASSETS / variant / name / "config.json") | change for name, change in SMALL[variant].items()}


def build(name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model of diffusers or transformers, by its configuration alone."""
    import diffusers
    import transformers

    if "_class_name" in config:
        cls = getattr(diffusers, config["_class_name"])
        return cls.from_config(dict(config))
    cls = getattr(transformers, config["architectures"][0])
    return cls(cls.config_class(**config))


@functools.cache
def _state(name: str, config: str, seed: int) -> State:
    """Random weights under the names that the files on the hub have: text encoders with the level `text_model`.

    Biases and norms, which begin as 0 and 1, are moved as well, so that no two tensors are equal.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, json.loads(config))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
    state = {k: t.detach().contiguous() for k, t in model.state_dict().items()}
    if type(model).__name__ == "CLIPTextModel":
        state = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in state.items()}
    if type(model).__name__ == "T5EncoderModel":
        del state["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    return state


def clip_tokenizer(folder: Path, pad: str) -> None:
    shutil.copytree(ASSETS / "sd1" / "tokenizer", folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _write(folder / name, _read(folder / name) | {"pad_token": pad})


def _t5_tokenizer(folder: Path) -> None:
    """A SentencePiece-like tokenizer of letters and a few words."""
    from transformers import T5Tokenizer

    words = ["\u2581", *"abcdefghijklmnopqrstuvwxyz,.", "\u2581a", "\u2581the", "\u2581zorp", "\u2581red", "\u2581cat", "\u2581photo"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -2.0 - len(words) / (len(w) * 10)) for w in words)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


# Single files


def make_single(
    folder: Path,
    path: Path,
    *,
    encoders: bool = True,
    vae: bool = True,
    prefix: str = "model.diffusion_model.",
    markers: Sequence[str] = (),
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the weights of a folder made by `make_folder` as one file in the original layout.

    Args:
        encoders, vae: whether the file holds them; SD3's files often lack the encoders.
        prefix: of the denoiser's keys.
        markers: keys of empty tensors, such as `v_pred` and `ztsnr`.
        dtype: what all weights are cast to; None keeps them.
    """
    kind = "sd3" if (folder / "transformer").is_dir() else "sdxl" if (folder / "text_encoder_2").is_dir() else _kind(folder)
    state: State = {}
    if kind == "sd3":
        state |= {prefix + k: t for k, t in mmdit(weights(folder, "transformer")).items()}
    else:
        state |= {prefix + ldm_unet(k, kind): t for k, t in weights(folder, "unet").items()}
        state["alphas_cumprod"] = torch.ones(1000)  # what such files carry beside the models
    if vae:
        state |= {f"first_stage_model.{k}": t for k, t in ldm_vae(weights(folder, "vae")).items()}
    if encoders:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (folder / name).is_dir():
                state |= _text(kind, name, weights(folder, name))
    if dtype is not None:
        state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    state |= {k: torch.zeros(()) for k in markers}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.clone() for k, t in state.items()}, path, metadata)
    return path


def make_encoders(folder: Path, target: Path) -> Path:
    """Write an SD3 folder's text encoders as files of their own, as ComfyUI names them, with T5's tokenizer where there is one."""
    target.mkdir(parents=True, exist_ok=True)
    for name, file in {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl_fp16"}.items():
        if (folder / name).is_dir():
            save_file(weights(folder, name), target / f"{file}.safetensors")
    if (folder / "tokenizer_3").is_dir():
        shutil.copy(folder / "tokenizer_3" / "tokenizer.json", target)
    return target


def use_configs(monkeypatch: Any, folder: Path) -> None:
    """Have single files of this family read as small as `folder` is."""
    from trainer.formats import probe, single_file

    found = probe.identify(folder)
    root = folder.parent / f"{folder.name}-configs"
    if not root.exists():
        shutil.copytree(folder, root / (found.variant or found.kind), ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
        texts = {n: c for n, c in configs(found.variant or found.kind).items() if not (folder / n).is_dir()}
        for name, config in texts.items():  # T5, which the folder may lack while a file has it
            _write(root / (found.variant or found.kind) / name / "config.json", config)
    monkeypatch.setattr(single_file, "CONFIGS", root)


def weights(folder: Path, name: str) -> State:
    """The tensors of one component of a folder."""
    (path,) = (folder / name).glob("*.safetensors")
    return load_file(path)


def _kind(folder: Path) -> str:
    return "sd2" if _read(folder / "unet" / "config.json").get("use_linear_projection") else "sd1"


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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet(name: str, kind: str = "sd1") -> str:
    """The original name of a diffusers UNet's tensor (b = block, j = index in it)."""
    stem, _, leaf = name.rpartition(".")
    if stem in EDGES:
        return f"{EDGES[stem]}.{leaf}"
    m = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    side, b, group, j, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
    if group == "downsamplers":
        return f"input_blocks.{3 * b + 3}.0.op.{leaf}"
    if group == "upsamplers":  # behind the attention, which SD1's and SD2's first up block lacks
        return f"output_blocks.{3 * b + 2}.{1 if b == 0 and kind != 'sdxl' else 2}.conv.{leaf}"
    if group == "resnets":
        inner, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[inner]}.{leaf}"
    place = 0 if group == "resnets" else 1
    where = {
        "down": f"input_blocks.{3 * b + j + 1}.{place}",
        "mid": f"middle_block.{2 * j if group == 'resnets' else 1}",
        "up": f"output_blocks.{3 * b + j}.{place}",
    }[side]
    return f"{where}.{rest}"


def ldm_vae(state: State, blocks: int = 4) -> State:
    """A VAE in the original layout, where attention is made of 1x1 convolutions."""

    def rename(name: str) -> str:
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            name = name.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
        return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)

    layers = r"attentions\.0\.to_(q|k|v|out\.0)\.weight$"
    return {rename(k): t[:, :, None, None] if re.search(layers, k) else t for k, t in state.items()}


def _text(kind: str, name: str, state: State) -> State:
    """A text encoder as single files hold it."""
    if kind == "sd3":
        stem = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}[name]
        out = {f"text_encoders.{stem}.transformer.{k}": t for k, t in state.items()}
        if stem != "t5xxl":
            out[f"text_encoders.{stem}.logit_scale"] = torch.ones(())
        return out
    if kind == "sd2":
        return {f"cond_stage_model.model.{k}": t for k, t in open_clip(state, more=1).items()}
    if name == "text_encoder_2":
        return {f"conditioner.embedders.1.model.{k}": t for k, t in open_clip(state).items()}
    start = "cond_stage_model.transformer." if kind == "sd1" else "conditioner.embedders.0.transformer."
    ids = {f"{start}text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {start + k: t for k, t in state.items()} | ids


OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_EDGES = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def open_clip(state: State, more: int = 0) -> State:
    """A CLIP text encoder under open_clip's names: q, k and v stacked, the projection turned.

    `more`: layers behind those of `state`, which SD2's checkpoints hold and which SD2 does not use.
    """
    out: State = {"logit_scale": torch.ones(())}
    for key, tensor in state.items():
        if key == "text_projection.weight":
            out["text_projection"] = tensor.T.contiguous()
        elif key in OPEN_CLIP_EDGES:
            out[OPEN_CLIP_EDGES[key]] = tensor
        else:
            m = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
            layer, stem, leaf = f"transformer.resblocks.{m[1]}", m[2], m[3]
            if stem in OPEN_CLIP:
                out[f"{layer}.{OPEN_CLIP[stem]}.{leaf}"] = tensor
            elif stem == "self_attn.q_proj":
                others = (state[key.replace("q_proj", n)] for n in ("k_proj", "v_proj"))
                out[f"{layer}.attn.in_proj_{leaf}"] = torch.cat([tensor, *others])
    count = 1 + max(int(m[1]) for k in out if (m := re.match(r"transformer\.resblocks\.(\d+)\.", k)))
    last = f"transformer.resblocks.{count - 1}."
    for n in range(more):
        out |= {k.replace(last, f"transformer.resblocks.{count + n}."): t + 1 for k, t in list(out.items()) if k.startswith(last)}
    if more:
        width = out["positional_embedding"].shape[1]
        out["text_projection"] = torch.eye(width)
    return out


MMDIT_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
MMDIT_EDGES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
STACKED = {
    "attn.to_q": ("x_block.attn", "attn.to_k", "attn.to_v"),
    "attn.add_q_proj": ("context_block.attn", "attn.add_k_proj", "attn.add_v_proj"),
    "attn2.to_q": ("x_block.attn2", "attn2.to_k", "attn2.to_v"),
}


def mmdit(state: State) -> State:
    """SD3's transformer under the original names. Its last modulations hold shift before scale, diffusers' scale before shift."""
    last = max(int(m[1]) for k in state if (m := re.match(r"transformer_blocks\.(\d+)\.", k)))
    turned = {"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"}
    out: State = {}
    for key, tensor in state.items():
        stem, _, leaf = key.rpartition(".")
        if stem in turned:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if key == "pos_embed.pos_embed":
            out["pos_embed"] = tensor
        elif stem in MMDIT_EDGES:
            out[f"{MMDIT_EDGES[stem]}.{leaf}"] = tensor
        else:
            _, n, path = stem.split(".", 2)
            if path in MMDIT_BLOCK:
                out[f"joint_blocks.{n}.{MMDIT_BLOCK[path]}.{leaf}"] = tensor
            elif path in STACKED:
                where, *others = STACKED[path]
                parts = [tensor, *(state[f"transformer_blocks.{n}.{o}.{leaf}"] for o in others)]
                out[f"joint_blocks.{n}.{where}.qkv.{leaf}"] = torch.cat(parts)
    return out
