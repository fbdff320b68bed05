"""Each kind of damage to a good file is found, and a good file is called good."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.adapters import Delta
from trainer.formats import export, kohya, self_check

TEXT = "encoder.layers.0."
LAYERS = {
    "unet": {
        "conv_in": (8, 4, 3, 3),
        "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 12),
        "down_blocks.0.resnets.0.time_emb_proj": (8, 32),
        "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    },
    "text_1": {TEXT + f"self_attn.{n}": (12, 12) for n in self_check.TEXT_ATTENTION} | {TEXT + "mlp.fc1": (20, 12)},
}


def deltas(paths=None):
    """One delta for each layer but conv_in (which sd-scripts leaves unread), or for `paths` alone."""
    torch.manual_seed(0)
    out = []
    for part, shapes in LAYERS.items():
        for i, (path, s) in enumerate(shapes.items()):
            if path in paths if paths is not None else path != "conv_in":
                up = torch.randn(s[0], 2 + i, *(1 for _ in s[2:]))
                out.append(Delta(part, path, "lora", {"down": torch.randn(2 + i, *s[1:]) / 8, "up": up}, 0.5))
    return out


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file({k: t.half() for k, t in kohya.to_kohya("sd1", deltas()).items()}, path)
    return path


def damage(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)
    return self_check.check(path, "sd1", deltas(), LAYERS)


K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PROJ = "lora_unet_down_blocks_0_attentions_0_proj_in"
Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def test_a_good_file_is_good(good):
    assert self_check.check(good, "sd1", deltas(), LAYERS) == []
    assert not self_check.is_empty(good)


def rename(state, old, new):
    for key in [k for k in state if k.startswith(old + ".") or (old.endswith("_") and k.startswith(old))]:
        state[new + key.removeprefix(old)] = state.pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s[f"{K}.lora_up.weight"].mul_(1.01), "attn2.to_k is off by 0.01"),
        (lambda s: s.pop(f"{K}.alpha"), "no alpha.*LyCORIS"),
        (lambda s: s[f"{K}.alpha"].mul_(2), "alphas 2, 4; diffusers takes one"),
        (lambda s: s[f"{K}.alpha"].zero_(), "must be positive"),
        (lambda s: s[f"{K}.lora_down.weight"][0].fill_(float("nan")), "not finite"),
        (lambda s: s[f"{K}.lora_up.weight"][0].fill_(float("inf")), "not finite"),
        (
            lambda s: rename(s, "lora_te_", "lora_te2_"),
            "^ComfyUI, Forge, AUTOMATIC1111, SD.Next, InvokeAI, diffusers, sd-scripts, LyCORIS .* 15 keys",
        ),
        (lambda s: rename(s, "lora_te_", "lora_te1_"), "^SD.Next, InvokeAI, sd-scripts, LyCORIS would leave 15 keys unread"),
        (lambda s: rename(s, K, "lora_unet_mid_block_attn2_to_k"), "mid_block.attn2.to_k is in the file but was not trained"),
        (lambda s: s.update({f"{PROJ}.{e}": s[f"{PROJ}.{e}"].flatten(1) for e in kohya.ENDINGS[:2]}), r"they must be \(\d+, 8, 1, 1\)"),
        (
            lambda s: s.update({f"{Q}.{e}": s[f"{K}.{e}"].clone() for e in kohya.ENDINGS}),
            r"self_attn.q_proj has down \(4, 12\) and up \(8, 4\)",
        ),
        (lambda s: [s.pop(f"{Q}.{e}") for e in kohya.ENDINGS], "q_proj was trained but is not in the file"),
        (lambda s: [s.pop(f"{Q}.{e}") for e in kohya.ENDINGS], "has only k_proj, out_proj, v_proj; diffusers and AUTOMATIC1111"),
        (lambda s: s.update({f"{K}.dora_scale": torch.ones(8, 1)}), "would leave 1 keys unread, the first is .*dora_scale"),
        (lambda s: s.pop(f"{K}.lora_up.weight"), "has no lora_up.weight"),
    ],
)
def test_damage_is_found(good, change, said):
    problems = damage(good, change)
    assert any(re.search(said, p) for p in problems), problems


def test_a_cut_off_file_is_found(good):
    good.write_bytes(good.read_bytes()[:-10])
    assert "cut off" in self_check.check(good, "sd1", deltas(), LAYERS)[0]


def test_what_sd_scripts_leaves_unread_is_told(tmp_path):
    path, some = tmp_path / "x.safetensors", deltas(paths={*LAYERS["unet"]})
    save_file(kohya.to_kohya("sd1", some), path)
    (problem,) = self_check.check(path, "sd1", some, LAYERS)
    assert problem == "sd-scripts would leave 3 keys unread, the first is lora_unet_conv_in.alpha."


def test_invokeai_needs_a_layer_that_shows_the_family(tmp_path):
    """A resnet's time_emb_proj in front makes InvokeAI take the file for SDXL."""
    path, some = tmp_path / "x.safetensors", deltas(paths={"down_blocks.0.resnets.0.time_emb_proj"})
    save_file(kohya.to_kohya("sd1", some), path)
    assert any("InvokeAI cannot tell" in p for p in self_check.check(path, "sd1", some, LAYERS))
    more, notes = export.complete(some, "sd1", LAYERS)
    save_file(kohya.to_kohya("sd1", more), path)
    assert self_check.check(path, "sd1", more, LAYERS) == [] and len(notes) == 1


def test_empty_files_are_told(tmp_path):
    path = tmp_path / "x.safetensors"
    zeros = [replace(d, tensors=d.tensors | {"up": torch.zeros_like(d.tensors["up"])}) for d in deltas()]
    save_file(kohya.to_kohya("sd1", zeros), path)
    assert self_check.is_empty(path)
    assert self_check.check(path, "sd1", zeros, LAYERS) == []


def test_relative_error_equals_the_one_of_whole_weights():
    a, b = deltas()[0], deltas()[-1]
    for one, other in ((a, replace(a, scale=0.7)), (b, replace(b, tensors=b.tensors | {"up": b.tensors["up"] + 0.1}))):
        whole = [d.scale * d.tensors["up"].double().flatten(1) @ d.tensors["down"].double().flatten(1) for d in (one, other)]
        expected = (whole[0] - whole[1]).norm() / whole[1].norm()
        assert self_check.relative_error(one, other) == pytest.approx(float(expected), rel=1e-6)
