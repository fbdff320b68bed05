"""Every family from a diffusers folder and from a single file, small: the same tensors, offline, and what diffusers itself makes of them."""

import json
import re
import shutil
import socket
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import small_models as small
import torch
from safetensors.torch import load_file, save_file

from trainer import staging
from trainer.formats import FormatError, int8, single_file
from trainer.formats.probe import identify
from trainer.formats.single_file import blank, load_any

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat!", ""]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something looked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def root(tmp_path_factory, one_thread):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def made(root, monkeypatch):
    """made(variant): (folder, single file) of a small model, T5 included, with single files read as small."""

    def make(variant, t5=True):
        folder, path = root / variant / f"m{t5:d}", root / variant / f"m{t5:d}.safetensors"
        if not path.exists():
            small.make_single(small.make_folder(folder, variant, t5=t5), path)
        small.use_configs(monkeypatch, folder)
        return folder, path

    return make


def same_as_files(models, folder):
    """Every tensor of the folder's files is in the loaded models, and nothing else is."""
    for name in small.SMALL[identify(folder).variant or identify(folder).kind]:
        if not (folder / name).is_dir():
            continue
        want = {k.removeprefix("text_model."): t for k, t in small.weights(folder, name).items()}
        got = {k.removeprefix("text_model."): t for k, t in models[name].state_dict().items()}
        if name == "text_encoder_3":
            assert torch.equal(got.pop("encoder.embed_tokens.weight"), want["shared.weight"])
            assert models[name].encoder.embed_tokens.weight is models[name].shared.weight
        assert want.keys() == got.keys() and len(want) > 20
        assert all(torch.equal(got[k], t) for k, t in want.items()), name


# Folders and single files


@pytest.mark.parametrize("variant", small.VARIANTS)
def test_folder_and_single_file_are_the_same(made, variant):
    folder, path = made(variant)
    first, second = load_any(folder, torch.float32), load_any(path, torch.float32, text_encoders=folder)
    assert first.keys() == second.keys() and first["notes"] == second["notes"] == []
    for models in (first, second):
        same_as_files(models, folder)
        assert models["scheduler"] == json.loads((small.ASSETS / variant / "scheduler" / "scheduler_config.json").read_text())
        for module in (m for m in models.values() if isinstance(m, torch.nn.Module)):
            assert not module.training
            assert {t.device for t in (*module.parameters(), *module.buffers())} == {CPU}
    for name in (n for n in first if n.startswith("tokenizer")):
        ids = [m[name](PROMPTS, padding="max_length", max_length=20).input_ids for m in (first, second)]
        assert ids[0] == ids[1] and len(ids[0][0]) == 20


@pytest.mark.parametrize("variant", ["sd1", "sdxl", "sd35_medium"])
def test_the_vae_alone_is_the_same(made, variant):
    for source in made(variant):
        alone, whole = single_file.load_vae(source), load_any(source, torch.float32)["vae"]
        assert alone.config == whole.config and not any(p.requires_grad for p in alone.parameters())
        assert all(torch.equal(t, whole.state_dict()[k]) for k, t in alone.state_dict().items()) and len(alone.state_dict()) > 20


def outputs(models, seed=0):
    """What the models make of one noisy latent and two prompts."""
    generator = torch.Generator().manual_seed(seed)
    channels = models["vae"].config.latent_channels
    noisy, pixels = torch.randn(2, channels, 8, 8, generator=generator), torch.rand(1, 3, 32, 32, generator=generator)
    out = {"vae": models["vae"].encode(pixels).latent_dist.mean, "decoded": models["vae"].decode(noisy[:1]).sample}
    for n in ("", "_2", "_3"):
        if models.get(f"text_encoder{n}") is not None:
            ids = torch.arange(20).repeat(2, 1) + 5
            found = models[f"text_encoder{n}"](ids, output_hidden_states=True)
            out[f"hidden{n}"] = found.hidden_states[-2]
            if "text_embeds" in found:
                out[f"pooled{n}"] = found.text_embeds
    t = torch.tensor([700, 30])
    if "transformer" in models:
        width = models["transformer"].config.joint_attention_dim
        both = torch.cat([out["hidden"], out["hidden_2"]], -1)
        both = torch.cat([torch.nn.functional.pad(both, (0, width - both.shape[-1])), out["hidden_3"]], 1)
        out["noise"] = models["transformer"](noisy, both, torch.cat([out["pooled"], out["pooled_2"]], -1), t).sample
    elif "text_encoder_2" in models:
        added = {"text_embeds": out["pooled_2"], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        out["noise"] = models["unet"](noisy, t, torch.cat([out["hidden"], out["hidden_2"]], -1), added_cond_kwargs=added).sample
    else:
        out["noise"] = models["unet"](noisy, t, out["hidden"]).sample
    return out


@pytest.mark.parametrize("variant", small.VARIANTS)
@torch.no_grad()
def test_the_outputs_are_those_of_diffusers_own_pipeline(made, variant):
    from diffusers import DiffusionPipeline

    folder, path = made(variant)
    more = {} if variant.startswith("sd3") or variant == "sdxl" else {"safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **more)
    want = outputs(pipe.components)
    assert len(want) >= 4 and all(t.isfinite().all() and t.std() > 0 for t in want.values())
    for models in (load_any(folder, torch.float32), load_any(path, torch.float32, text_encoders=folder)):
        got = outputs(models)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert torch.equal(got[key], tensor), key
        for name in (n for n in models if n.startswith("tokenizer")):
            ids = [t("a photo of a cat", padding="max_length", max_length=20).input_ids for t in (models[name], pipe.components[name])]
            assert ids[0] == ids[1]


@pytest.mark.parametrize("variant", ["sd1", "sd2", "sdxl", "sd35_medium"])
def test_diffusers_reads_the_same_from_the_single_file(made, variant):
    """Its own loader of single files, with all it does to tell the layout, finds the tensors that are found here."""
    import diffusers

    folder, path = made(variant)
    for name in ("transformer" if variant.startswith("sd3") else "unet", "vae"):
        cls = getattr(diffusers, json.loads((folder / name / "config.json").read_text())["_class_name"])
        theirs = cls.from_single_file(path, config=str(folder), subfolder=name, local_files_only=True).state_dict()
        ours = load_any(path, torch.float32, text_encoders=folder)[name].state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(ours[k], t) for k, t in theirs.items())


def test_single_files_have_the_names_of_the_real_ones():
    """Keys of the released checkpoints, and how many the denoisers have."""
    counts = {"sd1": 686, "sd2": 686, "sdxl": 1680}
    known = {
        "sd1": ["output_blocks.11.0.skip_connection.weight", "output_blocks.2.1.conv.weight", "middle_block.1.proj_in.weight"],
        "sd2": ["input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", "output_blocks.8.2.conv.bias", "out.2.bias"],
        "sdxl": ["label_emb.0.2.bias", "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight", "output_blocks.2.2.conv.weight"],
    }
    for family, count in counts.items():
        config = json.loads((small.ASSETS / family / "unet" / "config.json").read_text())
        with torch.device("meta"):
            names = {small.ldm_unet(k, family) for k in small.build("unet", config).state_dict()}
        assert len(names) == count and set(known[family]) <= names
    config = json.loads((small.ASSETS / "sd35_medium" / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        names = small.mmdit(small.build("transformer", config).state_dict())
    assert (
        names["joint_blocks.12.x_block.attn2.qkv.weight"].shape == (4608, 1536) and "joint_blocks.13.x_block.attn2.qkv.weight" not in names
    )
    assert names["joint_blocks.0.x_block.adaLN_modulation.1.weight"].shape == (9 * 1536, 1536)
    assert names["joint_blocks.23.context_block.adaLN_modulation.1.weight"].shape == (2 * 1536, 1536)
    assert names["pos_embed"].shape == (1, 384 * 384, 1536) and names["final_layer.linear.weight"].shape == (64, 1536)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_format_is_read_and_the_vae_stays_float32(made, tmp_path, stored, dtype):
    folder, _ = made("sdxl")
    half = small.make_single(folder, tmp_path / "half.safetensors", dtype=stored)
    models = load_any(half, dtype)
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        as_loaded = torch.float32 if name == "vae" else dtype
        want = {k.removeprefix("text_model."): t.to(stored).to(as_loaded) for k, t in small.weights(folder, name).items()}
        got = {k.removeprefix("text_model."): t for k, t in models[name].state_dict().items()}
        assert all(torch.equal(got[k], t) and got[k].dtype == as_loaded for k, t in want.items())
    assert torch.float32 == load_any(folder, dtype)["vae"].dtype


def test_the_file_is_not_needed_any_more(made, tmp_path):
    folder, path = made("sd1")
    copy = tmp_path / "gone.safetensors"
    shutil.copy(path, copy)
    moved = shutil.copytree(folder, tmp_path / "gone")
    models = [load_any(copy, torch.float32), load_any(moved, torch.float32)]
    copy.write_bytes(b"")
    for file in moved.rglob("*.safetensors"):
        file.write_bytes(b"")
    for found in models:
        same_as_files(found, folder)


@pytest.mark.slow
def test_folders_of_other_kinds_of_files(made, tmp_path):
    """The fp16 variant, weights in pieces, and the names that VAEs had in old folders."""
    folder, _ = made("sd1", t5=False)
    half = small.make_folder(tmp_path / "half", "sd1", half=True)
    assert not list(half.rglob("*model.safetensors"))
    models = load_any(half, torch.float32)
    assert all(torch.equal(models["unet"].state_dict()[k], t.half().float()) for k, t in small.weights(folder, "unet").items())

    both = shutil.copytree(folder, tmp_path / "both")
    for file in half.rglob("*.fp16.safetensors"):
        shutil.copy(file, both / file.parent.name)
    unet = load_any(both, torch.float32)["unet"].state_dict()
    plain = load_file(both / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(unet[k], t) for k, t in plain.items())  # where there are both, the plain one

    for variant, stem in (("", "diffusion_pytorch_model-0000{}-of-00003"), (".fp16", "diffusion_pytorch_model.fp16-0000{}-of-00003")):
        pieces = shutil.copytree(folder, tmp_path / f"pieces{variant}")
        state = load_file(pieces / "unet" / "diffusion_pytorch_model.safetensors")
        (pieces / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        for n in range(3):
            save_file({k: state[k] for k in sorted(state)[n::3]}, pieces / "unet" / f"{stem.format(n + 1)}.safetensors")
        unet = load_any(pieces, torch.float32)["unet"].state_dict()
        assert all(torch.equal(unet[k], t) for k, t in state.items())

    old = shutil.copytree(folder, tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(old / "vae" / "diffusion_pytorch_model.safetensors")
    renamed = {re.sub(r"(attentions\.0)\.(to_q|to_k|to_v|to_out\.0)\.", lambda m: f"{m[1]}.{names[m[2]]}.", k): t for k, t in state.items()}
    assert len(renamed.keys() - state.keys()) == 16
    save_file(renamed, old / "vae" / "diffusion_pytorch_model.safetensors")
    same_as_files({**load_any(folder, torch.float32), "vae": load_any(old, torch.float32)["vae"]}, folder)


def test_text_encoders_without_the_text_model_level(made, tmp_path):
    folder, path = made("sd1")
    old = {k.replace("transformer.text_model.", "transformer."): t for k, t in load_file(path).items()}
    save_file(old, tmp_path / "old.safetensors")
    same_as_files(load_any(tmp_path / "old.safetensors", torch.float32), folder)


# SD3's text encoders


def test_sd3_takes_its_text_encoders_from_a_folder(made, tmp_path):
    folder, _ = made("sd35_medium")
    bare = small.make_single(folder, tmp_path / "bare.safetensors", encoders=False)
    encoders = small.make_encoders(folder, tmp_path / "encoders")
    for where in (encoders, folder):
        models = load_any(bare, torch.float32, text_encoders=where)
        assert models["notes"] == []
        same_as_files(models, folder)
        assert models["tokenizer_3"]("a red cat").input_ids == load_any(folder, torch.float32)["tokenizer_3"]("a red cat").input_ids
    with pytest.raises(
        FormatError, match=r"bare\.safetensors has no clip_l text encoder\. Set model\.text_encoders to a folder with clip_l\.safe"
    ):
        load_any(bare, torch.float32)
    (encoders / "clip_g.safetensors").unlink()
    with pytest.raises(FormatError, match="has no clip_g text encoder"):
        load_any(bare, torch.float32, text_encoders=encoders)


def test_a_transformer_without_prefix(made, tmp_path):
    folder, _ = made("sd35_large")
    same_as_files(
        load_any(small.make_single(folder, tmp_path / "bare.safetensors", prefix=""), torch.float32, text_encoders=folder), folder
    )


def test_clip_l_without_a_projection_gets_the_identity(made, tmp_path):
    """ComfyUI's clip_l.safetensors has none: 246 MB instead of 247."""
    folder, _ = made("sd3_medium")
    bare = small.make_single(folder, tmp_path / "bare.safetensors", encoders=False)
    encoders = small.make_encoders(folder, tmp_path / "encoders")
    state = load_file(encoders / "clip_l.safetensors")
    del state["text_projection.weight"]
    save_file(state, encoders / "clip_l.safetensors")
    weight = load_any(bare, torch.bfloat16, text_encoders=encoders)["text_encoder"].text_projection.weight
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, torch.eye(32, dtype=torch.bfloat16))


def test_when_t5_is_left_out_it_is_said(made, tmp_path):
    folder, path = made("sd35_medium")
    models = load_any(folder, torch.float32, t5="skip")
    assert "text_encoder_3" not in models and "tokenizer_3" not in models
    assert models["notes"] == ["T5 is left out, as model.t5 says."]

    (note,) = load_any(path, torch.float32)["notes"]  # has T5, and no tokenizer for it
    assert "its tokenizer is not there" in note and "tokenizer.json" in note and "model.text_encoders" in note

    without, alone = made("sd35_medium", t5=False)
    for source in (without, alone):
        models = load_any(source, torch.float32)
        assert "text_encoder_3" not in models and "has no weights of it" in models["notes"][0]
    words = tmp_path / "words"
    shutil.copytree(folder / "tokenizer_3", words)
    made("sd35_medium")
    assert load_any(path, torch.float32, text_encoders=words)["notes"] == []


@torch.no_grad()
def test_t5_in_8_bits(made):
    folder, path = made("sd35_medium")
    exact = load_any(folder, torch.float32)["text_encoder_3"]
    ids = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    want = exact(ids).last_hidden_state
    for source, dtype in ((folder, torch.float32), (path, torch.float32), (folder, torch.bfloat16)):
        t5 = load_any(source, dtype, text_encoders=folder, t5="8bit")["text_encoder_3"]
        small_ones = [m for m in t5.modules() if isinstance(m, int8.Int8Linear)]
        assert len(small_ones) == 14 and all(m.weight.dtype == torch.int8 for m in small_ones)
        assert t5.dtype == dtype
        got = t5(ids).last_hidden_state.float()
        assert got.shape == want.shape
        near = (got - want).square().mean() / want.square().mean()
        assert 0 < near < 1e-3, near
    assert not any(isinstance(m, torch.nn.Linear) for m in t5.modules())


def test_int8_keeps_the_largest_of_each_row():
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 50, 0, 7])[:, None]
    small_one, scale = int8.quantise(weight)
    assert small_one.dtype == torch.int8 and scale.shape == (5, 1)
    assert small_one.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((small_one * scale - weight).abs() <= scale / 2 * 1.0001).all()
    layer = torch.nn.Sequential(torch.nn.Linear(9, 5))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
    bias = layer[0].bias.detach()
    assert int8.replace_linears(layer) == {"0"}
    layer.load_state_dict({"0.weight": small_one, "0.scale": scale, "0.bias": bias})
    x = torch.randn(3, 9)
    assert torch.allclose(layer(x), x @ (small_one * scale).T + bias, atol=1e-4)


def test_scaled_fp8_is_multiplied(made, tmp_path):
    """ComfyUI's t5xxl_fp8_e4m3fn_scaled holds weights up to fp8's largest number and what to multiply them by."""
    folder, _ = made("sd3_medium")
    bare = small.make_single(folder, tmp_path / "bare.safetensors", encoders=False)
    encoders = small.make_encoders(folder, tmp_path / "encoders")
    state = load_file(encoders / "t5xxl_fp16.safetensors")
    (encoders / "t5xxl_fp16.safetensors").unlink()
    want = {}
    for key in [k for k in state if ".SelfAttention.q.weight" in k or ".wo.weight" in k]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        state[key.replace(".weight", ".scale_weight")] = scale
        want[key] = state[key].float() * scale
    state["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(state, encoders / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    got = load_any(bare, torch.float32, text_encoders=encoders)["text_encoder_3"].state_dict()
    assert len(want) == 4 and all(torch.equal(got[k], t) for k, t in want.items())


def test_t5_in_fp16_keeps_the_layers_that_overflow(made):
    folder, _ = made("sd3_medium")
    t5 = load_any(folder, torch.float16)["text_encoder_3"]
    kinds = {n: p.dtype for n, p in t5.named_parameters()}
    assert {d for n, d in kinds.items() if ".wo." in n} == {torch.float32}
    assert {d for n, d in kinds.items() if ".wo." not in n} == {torch.float16}


# What does not load


CUT = [
    ("sd1", "model.diffusion_model.out.2.", r"part\.safetensors: the UNet lacks 2 tensors, the first is conv_out\.weight"),
    ("sdxl", "model.diffusion_model.label_emb.0.0.", "the UNet"),
    ("sd2", "model.diffusion_model.input_blocks.1.1.proj_in.", "the UNet lacks 2 tensors"),
    ("sd1", "first_stage_model.decoder.conv_out.", "the VAE"),
    ("sd1", "first_stage_model.encoder.down.1.block.0.", "the VAE lacks"),
    ("sd1", "cond_stage_model.transformer.text_model.final", "the text encoder lacks 2 tensors"),
    ("sd2", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias", "the text encoder lacks 3 tensors"),
    ("sdxl", "conditioner.embedders.1.model.text_projection", "the second text encoder lacks the tensor text_projection"),
    ("sd35_medium", "model.diffusion_model.joint_blocks.1.x_block.attn2.qkv.bias", "the transformer is damaged or lacks a tensor"),
    ("sd35_medium", "model.diffusion_model.pos_embed", "the transformer"),
    ("sd35_medium", "text_encoders.t5xxl.transformer.encoder.final_layer_norm", "the T5 text encoder lacks the tensor encoder"),
]


@pytest.mark.parametrize(("variant", "prefix", "said"), CUT, ids=[f"{v}-{p}" for v, p, _ in CUT])
def test_missing_tensors_are_told(made, tmp_path, variant, prefix, said):
    folder, path = made(variant)
    state = load_file(path)
    left = {k: t for k, t in state.items() if not k.startswith(prefix)}
    assert len(left) < len(state)
    save_file(left, tmp_path / "part.safetensors")
    with pytest.raises(FormatError, match=said) as told:
        load_any(tmp_path / "part.safetensors", torch.float32, text_encoders=folder)
    assert "part.safetensors" in str(told.value) and str(told.value).endswith("Download it again or choose another.")


def test_a_folder_with_a_missing_tensor_is_told(made, tmp_path):
    folder, _ = made("sdxl")
    cut = shutil.copytree(folder, tmp_path / "cut")
    file = cut / "text_encoder_2" / "model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if k != "text_projection.weight"}, file)
    with pytest.raises(FormatError, match=r"cut: the second text encoder lacks the tensor text_projection\.weight\. "):
        load_any(cut, torch.float32)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match="was cut off or damaged"):
        load_any(cut, torch.float32)
    file.unlink()
    with pytest.raises(FormatError, match="cut has no weights of the second text encoder"):
        load_any(cut, torch.float32)


def test_other_sizes_are_told(made, monkeypatch):
    _, path = made("sd1")
    monkeypatch.undo()
    said = r"the UNet is of another size: .* has the shape \(16, 4, 3, 3\), Stable Diffusion 1\.x has \(320, 4, 3, 3\)"
    with pytest.raises(FormatError, match=said):
        load_any(path, torch.float32)


def test_other_kinds_are_told(tmp_path):
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    for call in (lambda p: load_any(p, torch.float32), lambda p: blank(p, ["unet"])):
        with pytest.raises(FormatError, match=r"vae\.safetensors is a VAE.*Needed here: a complete model of Stable Diffusion"):
            call(tmp_path / "vae.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02pickle")
    with pytest.raises(FormatError, match="is a pickle"):
        load_any(tmp_path / "model.ckpt", torch.float32)


# Without weights


@pytest.mark.parametrize("variant", small.VARIANTS)
def test_blank_models_are_the_loaded_ones_without_weights(made, variant):
    folder, path = made(variant)
    loaded = load_any(folder, torch.float32)
    names = {"unet": "transformer" if variant.startswith("sd3") else "unet", "text_1": "text_encoder", "text_2": "text_encoder_2"}
    parts = [p for p, n in names.items() if n in loaded]
    for source in (folder, path):
        found = blank(source, parts)
        assert list(found) == parts
        for part, model in found.items():
            assert type(model) is type(loaded[names[part]])
            assert {k: t.shape for k, t in model.state_dict().items()} == {k: t.shape for k, t in loaded[names[part]].state_dict().items()}
            assert all(p.is_meta for p in model.parameters())


COUNTS = {  # parameters of the released models: UNet or transformer, VAE, text encoders
    "sd1": [859_520_964, 83_653_863, 123_060_480],
    "sd2": [865_910_724, 83_653_863, 340_387_840],
    "sdxl": [2_567_463_684, 83_653_863, 123_060_480, 694_659_840],
    "sd3_medium": [2_028_328_000, 83_819_683, 123_650_304, 694_659_840, 4_762_310_656],
    "sd35_medium": [2_243_171_520, 83_819_683, 123_650_304, 694_659_840, 4_762_310_656],
    "sd35_large": [8_056_627_520, 83_819_683, 123_650_304, 694_659_840, 4_762_310_656],
}


@pytest.mark.parametrize("variant", COUNTS)
def test_shipped_configurations_are_the_released_models(variant):
    family = "sd3" if variant.startswith("sd3") else variant
    index = json.loads((small.ASSETS / variant / "model_index.json").read_text())
    found = []
    for name, cls in single_file.COMPONENTS[family].items():
        model = single_file._model(cls, small.ASSETS / variant / name)
        found.append(sum(p.numel() for p in model.parameters()))
        assert index[name][1] == type(model).__name__
    assert found == COUNTS[variant]
    assert identify(small.ASSETS / variant).kind == family
    assert identify(small.ASSETS / variant).variant == (variant if family == "sd3" else None)


# Tokenizers


def test_clips_tokenizer_and_open_clips(made):
    sdxl = load_any(made("sdxl")[1], torch.float32)
    sd2 = load_any(made("sd2")[0], torch.float32)
    first, second = sdxl["tokenizer"], sdxl["tokenizer_2"]
    cat = [49406, 320, 1125, 539, 320, 2368]
    assert first("A  PHOTO of\na cat", padding="max_length", truncation=True).input_ids == [*cat, *[49407] * 71]
    for open_clip in (second, sd2["tokenizer"]):
        assert open_clip("a photo of a cat", padding="max_length").input_ids == [*cat, 49407, *[0] * 70]
        assert open_clip.pad_token_id == 0 and open_clip.model_max_length == 77
        # open_clip's own: "!" is the token of a word's end, not the padding that looks like it
        assert open_clip("a cat!").input_ids == first("a cat!").input_ids == [49406, 320, 2368, 256, 49407]
    assert first.model_max_length == len(first("cat " * 200, truncation=True).input_ids) == 77


def test_a_vocabulary_of_its_own_is_kept(tmp_path):
    from trainer.families.sources import DEMO

    assert load_any(DEMO, torch.float32)["tokenizer"].get_vocab() == json.loads((DEMO / "tokenizer" / "vocab.json").read_text())


def test_convolutions_are_laid_out_while_they_are_cast(made):
    for source in made("sd1"):
        models = load_any(source, torch.bfloat16, layout=torch.channels_last)
        want = load_any(source, torch.bfloat16)["unet"].to(memory_format=torch.channels_last).state_dict()
        for key, tensor in models["unet"].state_dict().items():
            assert torch.equal(tensor, want[key]) and tensor.stride() == want[key].stride(), key
        assert models["vae"].encoder.conv_in.weight.is_contiguous()


def test_a_full_device_is_no_damaged_file(made, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(single_file.Place, "_state", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_any(made("sd1")[0], torch.float32)


class Later:
    """An executor that waits to be told."""

    def submit(self, *call):
        self.call, self.future = call, Future()
        return self.future

    def go(self):
        try:
            self.future.set_result(self.call[0](*self.call[1:]))
        except Exception as error:
            self.future.set_exception(error)


@pytest.mark.parametrize(("variant", "denoiser"), [("sd1", "unet"), ("sd35_medium", "transformer")])
def test_a_denoiser_that_is_read_beside_all_else_is_the_same_one(made, variant, denoiser):
    for source in made(variant):
        later = Later()
        models = load_any(source, torch.bfloat16, made(variant)[0], layout=torch.channels_last, beside=later)
        arriving, want = models.pop("arriving"), load_any(source, torch.bfloat16, made(variant)[0], layout=torch.channels_last)
        assert models.keys() == want.keys() and not arriving.done()
        assert {n for n, m in models.items() if isinstance(m, torch.nn.Module) and any(t.is_meta for t in m.state_dict().values())} == {
            denoiser
        }
        later.go()
        arriving.result()
        for key, tensor in want[denoiser].state_dict().items():
            got = models[denoiser].state_dict()[key]
            assert torch.equal(got, tensor) and got.stride() == tensor.stride(), key
        assert not models[denoiser].training


def test_a_damaged_denoiser_that_is_read_beside_all_else_is_named(made, tmp_path):
    path = tmp_path / "bare.safetensors"
    tensors = load_file(made("sd1")[1])
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, path)
    later = Later()
    arriving = load_any(path, torch.float32, beside=later)["arriving"]
    later.go()
    with pytest.raises(FormatError, match=r"bare.safetensors: the UNet .*conv_out.bias"):
        arriving.result()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", small.VARIANTS)
def test_weights_that_go_straight_to_the_gpu_are_those_that_come_by_way_of_the_cpu(made, variant, monkeypatch):
    folder, path = made(variant)
    monkeypatch.setattr(staging.Stage, "SMALL", 100)
    monkeypatch.setattr(staging.Stage, "SIZE", 1000)  # small weights, too, go as a whole or in pieces
    for source in (folder, path):
        for t5 in ("auto", "8bit"):
            with ThreadPoolExecutor(1) as pool:
                ours = load_any(source, torch.float16, folder, t5, torch.device("cuda"), torch.channels_last, pool)
                ours["arriving"].result()
            want = load_any(source, torch.float16, text_encoders=folder, t5=t5)
            for name, model in want.items():
                if isinstance(model, torch.nn.Module):
                    got = ours[name].state_dict()
                    assert name == "text_encoder_3" or all(t.is_cuda for t in got.values())
                    assert all(torch.equal(got[k].cpu(), t) for k, t in model.state_dict().items()), name


@pytest.mark.gpu
def test_a_module_goes_to_the_gpu_and_back_as_it_was(monkeypatch):
    monkeypatch.setattr(staging.Stage, "SMALL", 100)
    monkeypatch.setattr(staging.Stage, "SIZE", 1000)
    device = torch.device("cuda")
    module = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3), torch.nn.Conv2d(16, 8, 1), torch.nn.Linear(40, 30).half(), torch.nn.BatchNorm1d(7)
    )
    module = module.to(memory_format=torch.channels_last).requires_grad_(False)
    module[2].weight = torch.nn.Parameter(torch.randn(30, 50)[:, :40], requires_grad=False)  # a view with gaps
    module.register_buffer("ids", torch.arange(5).expand(1, -1))
    before = {k: (t.clone(), t.stride()) for k, t in module.state_dict().items()}
    parameters = list(module.parameters())
    for where in (device, "cpu", device):
        staging.move(module, where)
        assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
        for key, tensor in module.state_dict().items():
            assert tensor.device.type == torch.device(where).type
            assert torch.equal(tensor.cpu(), before[key][0]), key
            assert tensor.stride() == before[key][1] or key == "2.weight", key
    big = torch.randn(3_000_001, device=device)
    stage = staging.Stage(device)
    assert all(torch.equal(stage.up(stage.down(big)), big) for _ in range(20))
