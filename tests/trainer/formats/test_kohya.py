"""kohya names and numbers, and a tiny pipeline of PEFT layers whose exports a fresh diffusers pipeline loads."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.adapters import Delta
from trainer.formats import FormatError, kohya, peft_names
from trainer.formats.export import export
from trainer.formats.metadata import Facts
from trainer.formats.single_file import CONFIGS

FACTS = Facts(base="tiny", rank=8, alpha=4.0)


def test_text_paths_with_and_without_text_model_are_one_layer():
    path = "encoder.layers.0.mlp.fc1"
    assert kohya.stem("sd1", "text_1", path) == kohya.stem("sd1", "text_1", "text_model." + path)
    assert peft_names.stem("sd1", "text_1", path) == peft_names.stem("sd1", "text_1", "text_model." + path)
    assert kohya.locate("sd1", "lora_te1_text_model_encoder_layers_0_mlp_fc1") == ("text_1", (path,))


def delta(path="conv_in", rank=2, scale=1.0, part="unet", shape=(6, 4)):
    generator = torch.Generator().manual_seed(len(path))
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
    return Delta(part, path, "lora", {"down": down, "up": up}, scale)


@pytest.mark.parametrize(
    ("scales", "alpha"),
    [
        ([(8, 0.5), (8, 0.5), (4, 1.4)], 4.0),  # most layers have scale * rank = 4
        ([(8, 4 / 8**0.5)], 8.0),  # 11.3: the nearest power of two in the logarithm is 8
        ([(8, 1 / 16)], 0.5),
        ([(1024, 128.0)], 4096.0),  # the largest that is written
        ([(8, 0.0), (8, -1.0)], 1.0),
    ],
)
def test_one_alpha_for_each_part_that_fp16_and_bf16_hold_exactly(scales, alpha):
    deltas = [delta(f"mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q", r, s) for i, (r, s) in enumerate(scales)]
    state = kohya.to_kohya("sd1", deltas)
    assert {float(state[k]) for k in state if k.endswith(".alpha")} == {alpha}
    assert all(state[k].shape == () and state[k].half() == state[k].bfloat16() for k in state if k.endswith(".alpha"))
    for back, d in zip(kohya.from_kohya("sd1", state), deltas, strict=True):
        want = d.scale * d.tensors["up"].double() @ d.tensors["down"].double()
        torch.testing.assert_close(back.scale * back.tensors["up"].double() @ back.tensors["down"].double(), want, rtol=1e-6, atol=1e-6)


def test_files_without_alpha_have_scale_one():
    state = {k: t for k, t in kohya.to_kohya("sd1", [delta(scale=0.25)]).items() if not k.endswith("alpha")}
    assert kohya.from_kohya("sd1", state)[0].scale == 1.0


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_conv_in.hada_w1_a", "plain LoRA"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "no layer of sd1"),
        ("lora_unet_conv_out.lora_down.weight", "has no lora_up.weight"),
    ],
)
def test_what_is_no_plain_lora_is_refused(key, said):
    with pytest.raises(FormatError, match=said):
        kohya.from_kohya("sd1", {key: torch.zeros(2, 2)})


def test_unknown_parts_and_kinds_are_refused():
    with pytest.raises(FormatError, match="parts of sd1: unet, text_1"):
        kohya.stem("sd1", "text_9", "a")
    other = Delta("unet", "conv_in", "loha", {}, 1.0)
    for write in (kohya.to_kohya, peft_names.to_peft):
        with pytest.raises(FormatError, match="'loha'"):
            write("sd1", [delta("conv_out"), other])


# A tiny SD1 pipeline with real LoRA layers, its exports loaded by a pipeline that never saw them.


@pytest.fixture(scope="module")
def make_pipeline():
    def make():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes))
        tokenizer = CLIPTokenizer.from_pretrained(CONFIGS / "sd1" / "tokenizer")
        pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, DDIMScheduler(), None, None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


RANKS = {"attn1.to_q": 4, "ff.net.0.proj": 16, "conv1": 3, "q_proj": 2, "fc1": 5}
UNET = (
    r".*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|time_emb_proj|conv_shortcut|samplers\.0\.conv)"
)


def attach(pipe, text_targets, rslora=True):
    """Real PEFT layers with mixed ranks and, by rsLoRA, mixed scales; every `up` drawn. Returns the deltas as the trainer has them."""
    deltas = []
    for part, model, targets in (("unet", pipe.unet, UNET), ("text_1", pipe.text_encoder, text_targets)):
        model.add_adapter(LoraConfig(r=8, lora_alpha=4, use_rslora=rslora, target_modules=targets, rank_pattern=RANKS))
        for path, m in model.named_modules():
            if isinstance(m, LoraLayer):
                up = m.lora_B["default"].weight
                torch.nn.init.normal_(up, std=0.02)
                down = m.lora_A["default"].weight.detach().clone()
                deltas.append(Delta(part, path, "lora", {"down": down, "up": up.detach().clone()}, m.scaling["default"]))
    return deltas


def change(d):
    """scale * up @ down in float64, in the weight's own shape."""
    down, up = d.tensors["down"].double(), d.tensors["up"].double()
    return d.scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def weights(pipe):
    parts = {"unet": pipe.unet, "text_1": pipe.text_encoder}
    return {
        (part, n.removesuffix(".weight")): p.detach().double()
        for part, m in parts.items()
        for n, p in m.named_parameters()
        if "weight" in n
    }


TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 6e-3}


@pytest.mark.parametrize(
    "text_targets", [r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)", r".*(q_proj|v_proj)"], ids=["text", "q and v alone"]
)
@pytest.mark.parametrize(("naming", "dtype"), [("kohya", "fp16"), ("kohya", "bf16"), ("kohya", "fp32"), ("peft", "fp16"), ("peft", "fp32")])
def test_a_fresh_pipeline_gets_the_trained_change(make_pipeline, tmp_path, naming, dtype, text_targets):
    trained = make_pipeline()
    layers = kohya.layers({"unet": trained.unet, "text_1": trained.text_encoder})
    deltas = attach(trained, text_targets)
    assert kohya.layers({"unet": trained.unet, "text_1": trained.text_encoder}) == layers  # the same with an adapter on it
    assert len({d.tensors["down"].shape[0] for d in deltas}) >= 4
    assert len({round(d.scale, 4) for d in deltas}) >= 4
    path = tmp_path / "tiny.safetensors"
    export(path, deltas, family="sd1", naming=naming, dtype=dtype, facts=FACTS, layers=layers)

    fresh = make_pipeline()
    before = {k: w.clone() for k, w in weights(fresh).items()}
    fresh.load_lora_weights(str(path))
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    after = weights(fresh)
    wanted = {(d.part, d.path): change(d) for d in deltas}
    for key, weight in before.items():
        got = after[key] - weight
        if key in wanted:
            # 1e-7: the fused float32 weight's own rounding
            error = ((got - wanted[key]).norm() - 1e-7 * weight.norm()).clamp(min=0) / wanted[key].norm()
            assert error < TOLERANCE[dtype], (key, float(error))
        else:
            assert got.abs().max() == 0, key
    assert len(wanted) == len(deltas)


def test_diffusers_own_file_is_read_with_its_scales(make_pipeline, tmp_path):
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open
    from safetensors.torch import load_file

    pipe = make_pipeline()
    deltas = attach(pipe, r".*(q_proj|k_proj|v_proj|out_proj)")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = {(d.part, d.path): d for d in peft_names.from_peft("sd1", load_file(path), metadata)}
    assert found.keys() == {(d.part, d.path) for d in deltas}
    for d in deltas:
        torch.testing.assert_close(change(found[d.part, d.path]), change(d), rtol=1e-5, atol=1e-9)
