"""Each kind of damage to a good file is found, and a good file is called good."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.adapters import Delta
from trainer.formats import export, kohya, readers, self_check
from trainer.formats.factors import norm, relative_error

TEXT = "encoder.layers.0."
LAYERS = {
    "unet": {
        "conv_in": (8, 4, 3, 3),
        "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 12),
        "down_blocks.0.resnets.0.time_emb_proj": (8, 32),
        "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    },
    "text_1": {TEXT + f"self_attn.{n}": (12, 12) for n in readers.TEXT_ATTENTION} | {TEXT + "mlp.fc1": (20, 12)},
}
ALL = list(readers.READERS)


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
    verdict = self_check.judge(good, "sd1", LAYERS)
    assert list(verdict.vouched) == ALL and verdict.sentences() == []
    assert not self_check.is_empty(good)


def rename(state, old, new):
    for key in [k for k in state if k.startswith(old + ".") or (old.endswith("_") and k.startswith(old))]:
        state[new + key.removeprefix(old)] = state.pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s[f"{K}.lora_up.weight"].mul_(1.01), "attn2.to_k is off by 0.01"),
        (lambda s: s[f"{K}.alpha"].zero_(), "attn2.to_k is off by 1 of"),
        (lambda s: s[f"{K}.lora_down.weight"][0].fill_(float("nan")), "not finite"),
        (lambda s: s[f"{K}.lora_up.weight"][0].fill_(float("inf")), "not finite"),
        (lambda s: rename(s, "lora_te_", "lora_te2_"), "No tool would read 15 of its keys"),
        (lambda s: rename(s, K, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"), "is in the file but was not trained"),
        (lambda s: s.update({f"{PROJ}.{e}": s[f"{PROJ}.{e}"].flatten(1) for e in kohya.ENDINGS[:2]}), r"they must be \(\d+, 8, 1, 1\)"),
        (
            lambda s: s.update({f"{Q}.{e}": s[f"{K}.{e}"].clone() for e in kohya.ENDINGS}),
            r"self_attn.q_proj has down \(4, 12\) and up \(8, 4\)",
        ),
        (lambda s: [s.pop(f"{Q}.{e}") for e in kohya.ENDINGS], "q_proj was trained but is not in the file"),
        (lambda s: s.update({f"{K}.dora_scale": torch.ones(8, 1)}), "dora_scale does not belong to a plain LoRA"),
        (lambda s: s.pop(f"{K}.lora_up.weight"), "has no lora_up.weight"),
    ],
)
def test_damage_is_found(good, change, said):
    problems = damage(good, change)
    assert any(re.search(said, p) for p in problems), problems


def test_a_cut_off_file_is_found(good):
    good.write_bytes(good.read_bytes()[:-10])
    assert "cut off" in self_check.check(good, "sd1", deltas(), LAYERS)[0]


def test_a_trained_layer_that_the_base_lacks_is_found(good):
    without = LAYERS | {"unet": {p: s for p, s in LAYERS["unet"].items() if "conv1" not in p}}
    assert any("conv1 is no layer of the base" in p for p in self_check.check(good, "sd1", deltas(), without))


def test_invokeai_needs_a_layer_that_shows_the_family(tmp_path):
    """A resnet's time_emb_proj in front makes InvokeAI take the file for SDXL."""
    path, some = tmp_path / "x.safetensors", deltas(paths={"down_blocks.0.resnets.0.time_emb_proj"})
    save_file(kohya.to_kohya("sd1", some), path)
    assert any("InvokeAI cannot tell" in p for p in self_check.judge(path, "sd1", LAYERS).sentences())
    more, notes = export.complete(some, "sd1", LAYERS)
    save_file(kohya.to_kohya("sd1", more), path)
    assert self_check.judge(path, "sd1", LAYERS).sentences() == [] and len(notes) == 1


def test_empty_files_are_told(tmp_path):
    path = tmp_path / "x.safetensors"
    zeros = [replace(d, tensors=d.tensors | {"up": torch.zeros_like(d.tensors["up"])}) for d in deltas()]
    save_file(kohya.to_kohya("sd1", zeros), path)
    assert self_check.is_empty(path)
    assert self_check.check(path, "sd1", zeros, LAYERS) == []


def test_norm_and_relative_error_equal_those_of_whole_weights():
    a, b = deltas()[0], deltas()[-1]
    for one, other in ((a, replace(a, scale=0.7)), (b, replace(b, tensors=b.tensors | {"up": b.tensors["up"] + 0.1}))):
        whole = [d.scale * d.tensors["up"].double().flatten(1) @ d.tensors["down"].double().flatten(1) for d in (one, other)]
        expected = (whole[0] - whole[1]).norm() / whole[1].norm()
        assert relative_error(one, other) == pytest.approx(float(expected), rel=1e-6)
        assert norm(one) == pytest.approx(float(whole[0].norm()), rel=1e-6)
