"""Every family at its real size with random weights, one after the other: from folder and file to a LoRA that diffusers applies."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import ASSETS, build, clip_tokenizer, make_single

from trainer import adapters, events, families, run
from trainer.config import ModelConfig
from trainer.config.load import validate
from trainer.families import sources
from trainer.kernels import widened

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]
CPU = torch.device("cpu")
# of SD3.5 medium 24 layers and both CLIPs are 7.1 GB in bf16
VARIANTS = ("sd1", "sd2", "sdxl", "sd35_medium")
PARTS = {"text_encoder": "te1", "text_encoder_2": "te2", "unet": "unet", "transformer": "unet"}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"the trainer tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder: Path, variant: str) -> Path:
    """The public configurations with random weights in bf16, of a size at which activations stay finite; one model in memory at a time."""
    shutil.copytree(ASSETS / variant, folder)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 24, generator=draw).bfloat16().repeat(16)  # weights are cut from these: drawing all of them takes a minute
    index = json.loads((folder / "model_index.json").read_text())
    for name in [n for n in PARTS if (folder / n).is_dir()] + ["vae"]:
        config = json.loads((folder / name / "config.json").read_text())
        with torch.device("meta"):
            layout = {k: tuple(t.shape) for k, t in build(name, config).state_dict().items()}
        state = {}
        for key, shape in layout.items():
            if len(shape) > 1:
                begin = int(torch.randint(1 << 24, (1,), generator=draw))
                state[key] = numbers[begin : begin + math.prod(shape)].view(shape) * (0.5 * math.prod(shape[1:]) ** -0.5)
            else:
                state[key] = torch.full(shape, float("norm" in key and key.endswith("weight")), dtype=torch.bfloat16)
        if config.get("architectures") == ["CLIPTextModel"]:
            state = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in state.items()}
        save_file(
            state, folder / name / ("model.safetensors" if "text" in name else "diffusion_pytorch_model.safetensors"), {"format": "pt"}
        )
        del state
    for name in ("tokenizer", "tokenizer_2"):
        if name in index and not (folder / name).is_dir():
            clip_tokenizer(folder / name, "!" if variant == "sd2" or name == "tokenizer_2" else "<|endoftext|>")
    shutil.rmtree(folder / "text_encoder_3", ignore_errors=True)
    if "text_encoder_3" in index:
        index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def digests(models) -> dict[str, str]:
    """A checksum of every weight of the loaded parts and the VAE."""
    modules = {**models.parts, "vae": models.vae}
    out = {}
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            raw = tensor.reshape(-1).clone().view(torch.uint8).numpy()
            out[f"{name} {key}"] = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return out


@torch.no_grad()
def prediction(family, models) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    noisy = torch.randn((1, models.vae.config.latent_channels, 16, 16), generator=draw)
    t = family.spread(models, [0.6])
    with widened.where_needed(CPU, "bf16"):
        return family.predict(models, noisy, t, family.conditions(models, ["ohwx, a fractal"], (128, 128)))


@pytest.fixture
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_family_at_its_real_size(variant, all_cores, tmp_path):
    name = "sd3" if variant.startswith("sd3") else variant
    family = families.get(name)
    folder = write(tmp_path / "base", variant)
    images = tmp_path / "images"
    images.mkdir()
    for k, size in enumerate([(160, 160), (150, 140)]):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20 + k).convert("RGB").save(images / f"{k}.png")
        (images / f"{k}.txt").write_text(f"a fractal number {k}")

    # from the folder: two steps, previews, the file
    texts = [p for p in family.parts if p != "unet"]
    config = validate(
        {
            "model": {"source": str(folder)},
            "data": [{"folder": str(images), "trigger": "ohwx"}],
            "dataset": {"resolution": 128},
            "adapter": {"rank": 4, "alpha": 4, "targets": ["attention", "feed_forward", "projections"]},
            "part": {p: {"train": True, "learning_rate": 1e-2} for p in ("unet", *texts)},
            "train": {"visits": 1, "batch_size": 1, "device": "cpu", "dtype": "bf16"},
            "preview": {"steps": 2, "prompts": ["ohwx, a fractal"], "every": 0},
            "validation": {"enabled": False},
            "output": {"name": "fractal", "dtype": "fp32", "checkpoint_every": 0},
        }
    )
    outcome, _ = run.train(config, tmp_path / "run")
    gc.collect()
    log = list(events.read(tmp_path / "run" / "events.jsonl"))
    last = {e["type"]: e for e in log}
    assert outcome == "finished" and last["finished"]["step"] == 2 and last["started"]["family"] == name
    assert last["started"]["dtype"] == "bf16"
    shown = [e for e in log if e["type"] == "preview"]
    assert [e["step"] for e in shown] == [0, 2]
    assert Image.open(tmp_path / "run" / "previews" / shown[-1]["images"][0]).size == (128, 128)

    # the live adapter, from the checkpoint
    models = family.load(folder, torch.bfloat16, CPU, ModelConfig())
    seen = digests(models)
    alone = prediction(family, models)
    targets = {p: family.targets(models, p, config.adapter.targets) for p in family.parts}
    adapter = adapters.build(config.adapter, models.parts, targets, 0)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    adapter.load({k.removeprefix("adapter/"): t for k, t in load_file(checkpoint).items() if k.startswith("adapter/")})
    adapter.train(False)
    live = prediction(family, models)
    del models, adapter
    gc.collect()

    # the file in diffusers: every key used, the same prediction
    exported = last["exported"]
    file = next((f for f in exported["also"] if f.endswith("_diffusers.safetensors")), exported["file"])
    models = family.load(folder, torch.bfloat16, CPU, ModelConfig())
    pipe = family.pipeline(models)
    assert isinstance(pipe, DiffusionPipeline)
    pipe.load_lora_weights(tmp_path / "run", weight_name=file)
    state = load_file(tmp_path / "run" / file)
    downs = [k for k in state if k.endswith(("lora_down.weight", "lora_A.weight"))]
    worn = {
        part: [m for m in getattr(pipe, part).modules() if isinstance(m, LoraLayer)]
        for part in PARTS
        if getattr(pipe, part, None) is not None
    }
    assert sum(map(len, worn.values())) == len(downs) >= sum(exported["modules"].values())
    for layers in worn.values():
        assert layers
    applied = prediction(family, models)
    change = (live - alone).norm()
    assert change > 0.01 * alone.norm() and (applied - live).norm() < 0.05 * change, (change, (applied - live).norm(), alone.norm())
    del models, pipe, worn, state
    gc.collect()

    # from a single file: the same weights
    single = make_single(folder, tmp_path / "single.safetensors", markers=() if name == "sd3" else ("v_pred",))
    gc.collect()
    assert sources.family_of(single, "auto") == name
    models = family.load(single, torch.bfloat16, CPU, ModelConfig())
    assert models.prediction == ("flow" if name == "sd3" else "v_prediction")
    assert digests(models) == seen
    assert torch.equal(prediction(family, models), alone)
