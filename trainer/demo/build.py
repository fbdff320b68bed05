"""Train the demo base from nothing: draw the world, train a VAE, a text encoder and a UNet on it, measure, write assets/demo.

    python -m trainer.demo.build vae  --work .build --vae-seconds 270      # draws, trains the VAE and the classifier
    python -m trainer.demo.build unet --work .build --unet-seconds 270     # trains UNet + text encoder, writes the folder
    python -m trainer.demo.build data --out assets/demo                    # draws the demo data sets
    python -m trainer.demo.build measure --out assets/demo                 # measures what stands there
    python -m trainer.demo.build captioner                                 # trains the demo captioner on one CPU core
    python -m trainer.demo.build measure-captioner                         # ... and measures it
    python -m trainer.demo.build measure-prior --seeds 2                   # what prior preservation keeps (trainer/demo/prior.py)

The first two want a GPU (an H200 in the times above); all are plain functions of the seed up to the machine's own rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trainer.demo import captioner, measure, prior, world

SIZE = 128
VAE_CHANNELS = (32, 64, 96, 128)
SEED = 20261123


def _draw(seed: int) -> tuple[bytes, list[str], int]:
    rng = random.Random(seed)
    scene = world.random_scene(rng)
    captions = [world.caption(scene), world.caption(scene, rng), world.caption(scene, rng)]
    return world.draw(scene, SIZE, seed).tobytes(), captions, measure.CLASSES.index(scene.subject)


def _draw_held_out(seed: int) -> tuple[bytes, list[str], int]:
    rng = random.Random(seed)
    concept = rng.choice(list(world.HELD_OUT_SUBJECTS))
    scene = world.concept_scene(concept, rng)
    return world.draw(scene, SIZE, seed).tobytes(), [], measure.CLASSES.index(concept)


def _clutter(seed: int) -> tuple[bytes, list[str], int]:
    return world.clutter(seed, SIZE).tobytes(), [], 0


def render(function, count: int, seed: int) -> tuple[torch.Tensor, list[list[str]], torch.Tensor]:
    """Draw `count` pictures on all cores: (N, 3, 128, 128) uint8, their captions, their class indices."""
    with multiprocessing.Pool() as pool:
        rows = pool.map(function, range(seed * 10_000_000, seed * 10_000_000 + count), chunksize=256)
    pixels = torch.from_numpy(np.frombuffer(b"".join(r[0] for r in rows), np.uint8).reshape(count, SIZE, SIZE, 3).copy())
    return pixels.permute(0, 3, 1, 2).contiguous(), [r[1] for r in rows], torch.tensor([r[2] for r in rows])


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


class Schedule:
    """Cosine decay over a budget of seconds, with a short warm-up; the host clock is read only after a device sync."""

    def __init__(self, seconds: float, rate: float) -> None:
        self.seconds, self.rate, self.step, self.start = seconds, rate, 0, time.time()
        self.spent = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer) -> bool:
        if self.step % 10 == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.spent = min(1.0, (time.time() - self.start) / self.seconds)
        self.step += 1
        rate = self.rate * min(1, self.step / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * self.spent)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        return self.spent < 1.0


class Ema:
    """Exponential moving average of parameters; the early steps average over a shorter time."""

    def __init__(self, modules: list[torch.nn.Module], decay: float) -> None:
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.step = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        torch._foreach_copy_(self.live, self.mean)


def faster(module: torch.nn.Module, run) -> object:
    """`module` compiled if that pays: times five calls of `run(m)` both ways (forward and backward)."""

    def clock(m) -> float:
        for _ in range(2):
            run(m)
        torch.cuda.synchronize()
        start = time.time()
        for _ in range(5):
            run(m)
        torch.cuda.synchronize()
        return (time.time() - start) / 5

    if not torch.cuda.is_available():
        return module
    start = time.time()
    eager = clock(module)
    compiled = torch.compile(module)
    fast = clock(compiled)
    print(f"eager {eager * 1e3:.0f} ms, compiled {fast * 1e3:.0f} ms a step, chosen in {time.time() - start:.0f} s", flush=True)
    return compiled if fast < eager else module


class AutoencoderStep(torch.nn.Module):
    """The VAE's training loss as one module: L1 + 2 MSE + 0.5 edge-L1 + 5e-6 KL (per element of the picture)."""

    def __init__(self, vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        moments = self.vae.quant_conv(self.vae.encoder(x)).float()
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * noise
        y = self.vae.decoder(self.vae.post_quant_conv(z)).float()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / x[0].numel()
        edges = (x.diff(dim=2) - y.diff(dim=2)).abs().mean() + (x.diff(dim=3) - y.diff(dim=3)).abs().mean()
        return (x - y).abs().mean() + 2 * (x - y).pow(2).mean() + 0.5 * edges + 5e-6 * 1024 * kl


def train_vae(pixels: torch.Tensor, seconds: float, device: str) -> tuple[object, dict]:
    vae = make_vae().to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 3  # the posterior's sigma starts near 1 and would drown the latents
    step = AutoencoderStep(vae)
    batch = 192 if device == "cuda" else 16
    noise = torch.Generator(device).manual_seed(SEED)

    def loss_of(module, n: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(SEED + n)
        index = torch.randint(len(pixels), (batch,), generator=g)
        x = (pixels[index.to(pixels.device)].to(device).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        z = torch.randn(batch, 4, SIZE // 8, SIZE // 8, device=device, generator=noise)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return module(x, z)

    run = faster(step, lambda m: loss_of(m, 0).backward())
    vae.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema, schedule, running = Ema([vae], 0.998), Schedule(seconds, 2e-3), 0.0
    while schedule(optimizer):
        loss = loss_of(run, schedule.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if schedule.step % 200 == 0:
            running = float(loss.detach())
            print(f"vae {schedule.step} {schedule.spent:.2f} loss {running:.4f}", flush=True)
    ema.store()
    return vae.float().eval(), {"steps": schedule.step, "batch": batch, "seconds": seconds, "loss": round(running, 4)}


def train_classifier(vae, sets: list[tuple[torch.Tensor, torch.Tensor]], steps: int, device: str) -> tuple[object, dict]:
    """Train on drawn pictures and on their reconstructions, with noise and blur; the last 2,000 of each set are kept out."""
    torch.manual_seed(SEED)
    model = measure.SubjectClassifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    g = torch.Generator().manual_seed(SEED)

    def take(index_set: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([p[i.to(p.device)].to(device) for (p, _), i in zip(sets, index_set, strict=True)]).float() / 127.5 - 1
        return x, torch.cat([y[i] for (_, y), i in zip(sets, index_set, strict=True)]).to(device)

    def through_vae(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return vae.decode(vae.encode(x).latent_dist.mean).sample.float().clamp(-1, 1)

    for _ in range(steps):
        x, y = take([torch.randint(len(p) - 2000, (n,), generator=g) for (p, _), n in zip(sets, (232, 24), strict=True)])
        x[::2] = through_vae(x[::2])
        x[1::4] = F.avg_pool2d(x[1::4], 3, 1, 1)
        x = x + 0.06 * torch.randn_like(x) * torch.rand(len(x), 1, 1, 1, device=device)
        loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    right = {"drawn": 0, "reconstructed": 0}
    total = 0
    for k in range(0, 2000, 250):
        x, y = take([torch.arange(len(p) - 2000 + k, len(p) - 2000 + k + 250) for p, _ in sets])
        with torch.no_grad():
            right["drawn"] += int((model(x).argmax(1) == y).sum())
            right["reconstructed"] += int((model(through_vae(x)).argmax(1) == y).sum())
        total += len(y)
    return model, {"steps": steps, **{f"accuracy_{k}": round(v / total, 4) for k, v in right.items()}}


def make_tokenizer(captions: list[str], folder: Path):
    """A CLIPTokenizer with byte-level BPE learnt on the captions (any text can still be spelt out in bytes)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words = [w for c in captions for w in c.replace(",", " ,").split()]
    known = {w for s in (world.SUBJECTS, world.HELD_OUT_SUBJECTS) for n in s for w in n.split()}
    counts: dict[str, int] = {}
    for w in words:
        counts[w] = counts.get(w, 0) + 1
    common = [w for w, n in counts.items() if n > len(captions) * 0.002 and w not in world.HELD_OUT_SUBJECTS]
    trainer = trainers.BpeTrainer(vocab_size=1200, end_of_word_suffix="</w>", show_progress=False)
    raw.train_from_iterator([w for w in sorted(set(common) | (known - set(world.HELD_OUT_SUBJECTS))) for _ in range(2)], trainer)
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in json.loads(raw.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab: dict[str, int] = {}
    for token in [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    return tokenizer


def make_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=128,
            **ids,
        )
    )


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class DenoiseStep(torch.nn.Module):
    def __init__(self, unet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy, t, cond, noise, weight):
        prediction = self.unet(noisy, t, cond).sample.float()
        return ((prediction - noise).pow(2).mean((1, 2, 3)) * weight).mean()


def train_unet(latents: torch.Tensor, tokens: torch.Tensor, empty: torch.Tensor, text, seconds: float, device: str):
    """UNet and text encoder from nothing on cached latents; min-SNR 5, 10 % empty captions, EMA 0.9995."""
    from diffusers import DDIMScheduler

    unet = make_unet().to(device, memory_format=torch.channels_last)
    text.to(device)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    alphas = scheduler.alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    weights = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    batch = 512 if device == "cuda" else 32
    g = torch.Generator(device).manual_seed(SEED)
    step = DenoiseStep(unet)

    def loss_of(module) -> torch.Tensor:
        index = torch.randint(len(latents), (batch,), device=device, generator=g)
        variant = torch.randint(tokens.shape[1], (batch,), device=device, generator=g)
        ids = tokens[index, variant].long()
        ids = torch.where(torch.rand(batch, 1, device=device, generator=g) < 0.1, empty, ids)
        x = latents[index]
        noise = torch.randn(x.shape, device=device, generator=g)
        t = torch.randint(1000, (batch,), device=device, generator=g)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return module(noisy, t, text(ids).last_hidden_state, noise, weights[t])

    run = faster(step, lambda m: loss_of(m).backward())
    both = [*unet.parameters(), *text.parameters()]
    for p in both:
        p.grad = None
    optimizer = torch.optim.AdamW(both, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, schedule, total = Ema([unet, text], 0.9995), Schedule(seconds, 1.5e-3), torch.zeros((), device=device)
    last = 0.0
    while schedule(optimizer):
        loss = loss_of(run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        total += loss.detach()
        if schedule.step % 250 == 0:
            last = float(total) / 250
            total.zero_()
            print(f"unet {schedule.step} {schedule.spent:.2f} loss {last:.4f}", flush=True)
    ema.store()
    return (
        unet.float().eval(),
        text.float().eval(),
        scheduler,
        {"steps": schedule.step, "batch": batch, "seconds": seconds, "loss": round(last, 4)},
    )


@torch.no_grad()
def encode_all(vae, pixels: torch.Tensor, device: str) -> torch.Tensor:
    out = []
    for chunk in pixels.split(512 if device == "cuda" else 32):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out.append(vae.encode(chunk.to(device).float() / 127.5 - 1).latent_dist.mean.float())
    return torch.cat(out)


def save_base(folder: Path, vae, text, tokenizer_dir: Path, unet, scheduler) -> None:
    """Write the plain diffusers folder in fp16, with the text encoder's keys under `text_model.` as older readers expect."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTokenizer

    pipe = StableDiffusionPipeline(
        vae.half(),
        text.half(),
        CLIPTokenizer.from_pretrained(tokenizer_dir),
        unet.half(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((tokenizer_dir / name).read_bytes())
    # Loaded without a dtype, transformers takes the configuration's and diffusers float32: both must say float32 to go together.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    if not any(k.startswith("text_model.") for k in state):
        save_file({f"text_model.{k}": v for k, v in state.items()}, path, metadata={"format": "pt"})


def stage_vae(args: argparse.Namespace, device: str) -> None:
    start = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    pixels, captions, classes = render(_draw, args.pictures, 1)
    more, _, _ = render(_clutter, args.pictures // 4, 2)
    owls, _, owl_classes = render(_draw_held_out, 8000, 3)
    print(f"drew {len(pixels) + len(more) + len(owls)} pictures in {time.time() - start:.0f} s", flush=True)
    torch.save((pixels, captions), args.work / "world.pt")
    torch.manual_seed(SEED)
    vae, info = train_vae(torch.cat([pixels, more]).to(device), args.vae_seconds, device)
    vae.to(device)
    latents = encode_all(vae, pixels[:4096], device)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    classifier, rates = train_classifier(vae, [(pixels.to(device), classes), (owls.to(device), owl_classes)], args.classifier_steps, device)
    from safetensors.torch import save_file

    vae.cpu().save_pretrained(args.work / "vae")
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier.cpu().state_dict().items()}
    save_file(state, args.work / "classifier.safetensors")
    (args.work / "vae.json").write_text(json.dumps({"vae": info, "classifier": rates, "pictures": len(pixels), "clutter": len(more)}))
    print(info, rates, f"{time.time() - start:.0f} s", flush=True)


def stage_unet(args: argparse.Namespace, device: str) -> None:
    from diffusers import AutoencoderKL

    start = time.time()
    torch.manual_seed(SEED)
    pixels, captions = torch.load(args.work / "world.pt")
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(device).eval()
    latents = encode_all(vae, pixels, device) * vae.config.scaling_factor
    tokenizer = make_tokenizer([c for row in captions for c in row], args.work / "tokenizer")
    tokens = tokenizer(
        [c for row in captions for c in row], padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    tokens = tokens.view(len(captions), 3, 77).to(torch.int16).to(device)
    empty = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids.to(device)
    print(f"{len(tokenizer)} tokens, latents {tuple(latents.shape)}, prepared in {time.time() - start:.0f} s", flush=True)
    unet, text, scheduler, info = train_unet(latents, tokens, empty, make_text_encoder(tokenizer), args.unet_seconds, device)
    args.out.mkdir(parents=True, exist_ok=True)
    save_base(args.out / "base", vae.cpu(), text.cpu(), args.work / "tokenizer", unet.cpu(), scheduler)
    (args.out / "classifier.safetensors").write_bytes((args.work / "classifier.safetensors").read_bytes())
    training = json.loads((args.work / "vae.json").read_text()) | {
        "unet": info,
        "seed": SEED,
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    (args.out / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    print(info, f"{time.time() - start:.0f} s", flush=True)


def stage_data(args: argparse.Namespace, device: str) -> None:
    """Draw the held-out concepts: 14 training pictures and 24 held-out ones each, with captions."""
    for concept in (*world.HELD_OUT_SUBJECTS, world.HELD_OUT_STYLE):
        for kind, count in (("train", 14), ("held_out", 24)):
            folder = args.out / "data" / concept / kind
            folder.mkdir(parents=True, exist_ok=True)
            rng = random.Random(f"{SEED} {concept} {kind}")
            for k in range(count):
                scene = world.concept_scene(concept, rng)
                world.draw(scene, SIZE, k).save(folder / f"{k + 1:02d}.png", optimize=True)
                (folder / f"{k + 1:02d}.txt").write_text(world.caption(scene) + "\n", encoding="utf-8")


def stage_measure(args: argparse.Namespace, device: str) -> None:
    """Measure a finished base against its bars and write measured.json and samples.png beside it."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from PIL import Image

    pipe = StableDiffusionPipeline.from_pretrained(args.out / "base", safety_checker=None, torch_dtype=torch.float32).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    classifier = measure.load_classifier(args.out / "classifier.safetensors")
    scenes = measure.colour_prompts(args.prompts, SEED)
    images = []
    for k in range(0, len(scenes), 28):
        prompts = [world.caption(s) for s in scenes[k : k + 28]]
        seeds = [torch.Generator().manual_seed(SEED + k + j) for j in range(len(prompts))]
        images += pipe(prompts, num_inference_steps=20, guidance_scale=args.guidance, generator=seeds, height=SIZE, width=SIZE).images
    result = {"prompts": len(scenes), "steps": 20, "guidance": args.guidance, "generated": measure.score(images, scenes, classifier)}
    result["drawn"] = measure.score([world.draw(s) for s in scenes], scenes, classifier)
    result["psnr_db"] = {}
    for concept in (*world.HELD_OUT_SUBJECTS, world.HELD_OUT_STYLE):
        folder = args.out / "data" / concept
        x = measure.to_pixels([Image.open(p) for p in sorted(folder.glob("*/*.png"))])
        with torch.no_grad():
            result["psnr_db"][concept] = round(
                measure.psnr(x, pipe.vae.decode(pipe.vae.encode(x.to(device)).latent_dist.mean).sample.cpu()), 2
            )
    sheet = Image.new("RGB", (14 * SIZE, 6 * SIZE))
    for k, image in enumerate(images[:84]):
        sheet.paste(image, (k % 14 * SIZE, k // 14 * SIZE))
    sheet.save(args.out / "samples.png")
    (args.out / "measured.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def stage_captioner(args: argparse.Namespace, device: str) -> None:
    captioner.train(args.out / "captioner", measure.load_classifier(args.out / "classifier.safetensors"), args.captioner_steps)


def stage_measure_captioner(args: argparse.Namespace, device: str) -> None:
    result = captioner.measure_it(args.out / "captioner", args.captioned)
    (args.out / "captioner.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def stage_measure_prior(args: argparse.Namespace, device: str) -> None:
    rows = prior.compare_weights(args.work / "prior", args.seeds)
    (args.out / "prior.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(prior.table(rows))


STAGES = {
    "vae": stage_vae,
    "unet": stage_unet,
    "data": stage_data,
    "measure": stage_measure,
    "captioner": stage_captioner,
    "measure-captioner": stage_measure_captioner,
    "measure-prior": stage_measure_prior,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path(".build"), help="folder for what lies between the stages")
    parser.add_argument("--out", type=Path, default=Path("assets/demo"))
    parser.add_argument("--pictures", type=int, default=96_000)
    parser.add_argument("--vae-seconds", type=float, default=270)
    parser.add_argument("--unet-seconds", type=float, default=270)
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=112)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--captioner-steps", type=int, default=2000)
    parser.add_argument("--captioned", type=int, default=1000, help="pictures that measure-captioner draws")
    parser.add_argument("--seeds", type=int, default=2, help="trainings with each weight in measure-prior")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    STAGES[args.stage](args, device)


if __name__ == "__main__":
    main()
