"""The lean step against PEFT's layers on diffusers' model in float64: outputs and the gradients of every trained tensor."""

from __future__ import annotations

import re

import pytest
import torch

from tests import small_models
from trainer import adapters, families, lean
from trainer.config import LoraConfig, ModelConfig
from trainer.lean import frozen, narrow

NARROW = (narrow.NarrowLinear, narrow.NarrowConv2d)
KINDS = ("attention", "feed_forward", "projections", "convolutions")


def cond(family, models, count, dtype):
    found = family.conditions(models, [f"a picture of a cat, number {k}" for k in range(count)], (64, 64))
    return families.Cond(*(None if x is None else x.to(dtype) for x in (found.hidden, found.pooled, found.size)))


def built(family, folder, dtype, device, kinds, bits=16, plain=False):
    """(models, adapter) with numbers in `up`, so that every gradient is large; `plain`: as PEFT makes them."""
    models = family.load(folder, dtype, torch.device(device), ModelConfig())
    if bits < 16:
        narrow.pack_layers(models.parts["unet"], bits, torch.device(device), torch.device(device))
    config = LoraConfig(rank=8, alpha=4, targets=kinds)
    targets = {"unet": family.targets(models, "unet", kinds)}
    install = lean.install
    if plain:
        lean.install = lambda *args: None
    try:
        adapter = adapters.build(config, models.parts, targets, 0)
    finally:
        lean.install = install
    for name, tensor in adapter.state().items():
        if name.endswith(".up"):
            draw = torch.Generator().manual_seed(len(name))
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
    return models, adapter


def gradients(family, models, adapter, dtype, device):
    """(prediction, {name: gradient}) of a fixed loss."""
    draw = torch.Generator().manual_seed(3)
    channels = models.vae.config.latent_channels
    noisy, wanted = (torch.randn(2, channels, 16, 8, generator=draw).to(device, dtype) for _ in range(2))
    t = torch.tensor([900, 20], device=device)
    told = cond(family, models, 2, dtype)
    if adapter.weights:
        adapter.weights.begin()
    predicted = family.predict(models, noisy, t, told)
    (predicted.to(wanted.dtype) - wanted).square().mean().backward()
    if adapter.weights:
        adapter.weights.collect()
    grads = {}
    for path, layer in adapter.layers["unet"].items():
        for kind, p in (("down", layer.lora_A["default"].weight), ("up", layer.lora_B["default"].weight)):
            grads[f"{path}.{kind}"] = (adapter.weights.grads[p] if adapter.weights else p.grad).detach().double().cpu()
    return predicted.detach().double().cpu(), grads


def exact(family, folder, kinds, packed=None):
    """The same by PEFT in float64, with the weights of `packed` layers (by their names in the base) as they came out of packing."""
    models, adapter = built(family, folder, torch.float64, "cpu", kinds, plain=True)
    own = {n.replace(".base_layer", ""): m for n, m in models.parts["unet"].named_modules() if not hasattr(m, "base_layer")}
    for name, m in (packed or {}).items():
        own[name].weight.data = m.weight.detach().double().cpu()
    for layer in adapter.layers["unet"].values():
        layer.double()
    predicted, grads = gradients(family, models, adapter, torch.float64, "cpu")
    return predicted, grads


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kinds", [("attention",), KINDS], ids=["attention", "all"])
@pytest.mark.parametrize("name", small_models.FAMILIES)
def test_gradients_are_those_of_peft_in_float64(name, kinds, tmp_path):
    family = families.get(name)
    folder = small_models.make_folder(tmp_path / name, name)
    kinds = kinds if name != "sd3" else kinds[:3]
    models, adapter = built(family, folder, torch.float32, "cpu", kinds)
    assert adapter.weights is not None, "no lean form was found"
    ours, theirs = gradients(family, models, adapter, torch.float32, "cpu"), exact(family, folder, kinds)
    assert apart(ours[0], theirs[0]) < 1e-5
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 20
    worst = max(apart(ours[1][k], theirs[1][k]) for k in theirs[1])
    assert worst < 2e-3, worst


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow), "sd3"])
def test_packed_weights_give_the_gradients_of_what_they_stand_for(name, bits, tmp_path):
    family = families.get(name)
    folder = small_models.make_folder(tmp_path / name, name)
    kinds = KINDS if name != "sd3" else KINDS[:3]
    models, adapter = built(family, folder, torch.float32, "cpu", kinds, bits=bits)
    packed = {n.replace(".base_layer", ""): m for n, m in models.parts["unet"].named_modules() if isinstance(m, NARROW)}
    assert len(packed) > 20
    ours, theirs = gradients(family, models, adapter, torch.float32, "cpu"), exact(family, folder, kinds, packed=packed)
    assert apart(ours[0], theirs[0]) < 1e-5
    assert max(apart(ours[1][k], theirs[1][k]) for k in theirs[1]) < 2e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_an_input_that_several_layers_keep_is_kept_once(name, tmp_path):
    """What tells the kernels for wide weights whether a layer may keep a wider copy of its input."""
    family = families.get(name)
    _, adapter = built(family, small_models.make_folder(tmp_path / name, name), torch.bfloat16, "cpu", KINDS)
    alone, seen = {}, set()
    for path, layer in adapter.layers["unet"].items():
        owner = getattr(layer.forward, "__self__", None)
        if isinstance(owner, lean.Group):
            alone[path] = owner.alone
        seen.add(path.rpartition(".")[2])
    assert {"to_q", "to_k", "0", "2"} <= seen

    def those(pattern):
        found = {kept for path, kept in alone.items() if re.search(pattern, path)}
        assert len(found) == 1, (pattern, found)
        return found.pop()

    assert those(r"ff\.net\.(0\.proj|2)$")
    assert not those(r"to_out\.0$")
    if name == "sdxl":
        assert {p.rpartition(".")[2] for p in alone if "attn1" in p} == {"0"}  # q, k and v are one product
        assert those(r"attn2\.to_q$")
    else:
        assert not those(r"(to_[qkv]|add_[qkv]_proj)$")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "images"), [("sdxl", 1), ("sd3", 2)])
def test_a_vae_encodes_and_decodes_as_diffusers_has_it(name, images, device, tmp_path):
    models = families.get(name).load(small_models.make_folder(tmp_path / name, name), torch.float32, torch.device("cpu"), ModelConfig())
    vae, draw = models.vae.double(), torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 3, 48, 64, generator=draw, dtype=torch.float64) * 2 - 1
    codes = torch.randn(images, vae.config.latent_channels, 6, 8, generator=draw, dtype=torch.float64)

    def both(dtype):
        with torch.no_grad():
            moments = vae.encode(pixels.to(vae.device, dtype)).latent_dist.parameters
            return moments.double().cpu(), vae.decode(codes.to(vae.device, dtype)).sample.double().cpu()

    theirs = both(torch.float64)
    forwards = {n: m.forward for n, m in vae.named_modules()}
    frozen.install(vae.to(device, torch.float32))
    changed = {type(m).__name__ for n, m in vae.named_modules() if m.forward != forwards[n]}
    assert changed == {"Conv2d", "GroupNorm", "ResnetBlock2D"}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = both(torch.float32)
    assert max(apart(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
