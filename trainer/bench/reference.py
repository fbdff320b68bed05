"""The plain reference: a LoRA loop of diffusers, PEFT and accelerate, written the way diffusers' example scripts are.

DataLoader, frozen weights in half precision, LoRA parameters in fp32 (cast_training_params), accelerator.prepare with autocast,
accumulate, clipping, torch.optim.AdamW as it comes, a scheduler's step, the loss read in each step for the progress bar.

What differs from the scripts, so that both sides do the same work:
  - Latents are cached (the scripts that can do it call it --cache_latents), and so are the states of frozen text encoders; the VAE and
    those encoders are freed after that. The VAE is in fp32. A posterior is drawn in each step.
  - Draws are made as trainer.step makes them, by one generator that is seeded for each step, in fp32; `down` starts with the same numbers.
    So the losses of both sides agree to rounding, which shows that they compute the same thing.
  - SD3: its plain flow-matching loss, without the script's preconditioning, whose loss is another one; without T5.
"""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from trainer import randomness
from trainer.bench.meter import Meter

TARGETS = {
    "unet": {
        "attention": ["to_k", "to_q", "to_v", "to_out.0"],
        "feed_forward": ["ff.net.0.proj", "ff.net.2"],
        "projections": ["proj_in", "proj_out"],
        "convolutions": ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
    },
    "transformer": {
        "attention": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
        "feed_forward": ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"],
        "projections": ["norm1.linear", "norm1_context.linear"],
    },
    "text": {"attention": ["q_proj", "k_proj", "v_proj", "out_proj"], "feed_forward": ["fc1", "fc2"]},
}
TEXTS = ("text_encoder", "text_encoder_2")
CPU_ATTENTION = {  # which torch's counter leaves out; arguments are shapes
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}


class CachedDataset(Dataset):
    """The rows of all steps, one after the other."""

    def __init__(self, rows: list[tuple[str, str]], latents: dict[str, Any], texts: dict[str, Any]) -> None:
        self.rows, self.latents, self.texts = rows, latents, texts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        image, caption = self.rows[k]
        return {**self.latents[image], **self.texts[caption]}


def load(folder: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A component of a diffusers folder, frozen."""
    config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    library, kind = (diffusers, config["_class_name"]) if "_class_name" in config else (transformers, config["architectures"][0])
    return getattr(library, kind).from_pretrained(folder / name, torch_dtype=dtype).requires_grad_(False)


def encode_prompt(encoders: list[Any], ids: list[torch.Tensor], width: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(states (B, T, D), pooled (B, P)) as the pipelines of SD1 and SD2, SDXL, and SD3 make them; `width`: SD3's, of T5's states."""
    if len(encoders) == 1:
        return encoders[0](ids[0])[0], None
    told = [encoder(tokens, output_hidden_states=True) for encoder, tokens in zip(encoders, ids, strict=True)]
    states = torch.cat([t.hidden_states[-2] for t in told], dim=-1)
    if width is None:
        return states, told[1][0]
    states = F.pad(states, (0, width - states.shape[-1]))
    return torch.cat([states, torch.zeros_like(states)], dim=1), torch.cat([t[0] for t in told], dim=-1)


def add_lora(model: Any, part: str, targets: list[str], rank: int, seed: int) -> None:
    """LoRA layers whose `down` starts as in trainer.adapters.lora: drawn for each layer by its name."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(model, dtype=torch.float32)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            down = layer.lora_A["default"].weight
            bound = 1 / math.sqrt(down[0].numel())
            draw = torch.Generator().manual_seed(randomness.key(seed, 0, f"adapter {part} {name}"))
            down.data.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=draw))


def main(job: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """Train until the meter has what it wants.

    Of `job`: `folder`, the base; `order`, the (file, caption) of each step's rows; `size`, `batch`, `rank`, `targets`, `te`,
    `checkpointing`, `seed`, `device`, `dtype`. Returns, beside the meter's findings, `losses` of the steps and the `flops` of one.
    """
    folder, batch_size, seed = Path(job["folder"]), job["batch"], job["seed"]
    if job["device"].startswith("cuda"):
        torch.cuda.set_device(torch.device(job["device"]).index or 0)
    precision = {"fp32": "no"}.get(job["dtype"], job["dtype"])
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision=precision, cpu=job["device"] == "cpu")
    device = accelerator.device
    weight_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job["dtype"]]

    # the base
    meter.mark("load")
    kind = "transformer" if (folder / "transformer").is_dir() else "unet"
    denoiser = load(folder, kind, weight_dtype).to(device)
    names = [name for name in TEXTS if (folder / name).is_dir()]
    text_encoders = [load(folder, name, weight_dtype).to(device) for name in names]
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer")) for name in names]
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).requires_grad_(False).to(device)
    flow = kind == "transformer"
    if flow:
        shift = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["shift"]
    else:
        noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    width = denoiser.config.joint_attention_dim if flow else None

    # latents and text
    meter.mark("encode")
    rows = [(image, caption) for step in job["order"] for image, caption in step]
    images, captions = (list(dict.fromkeys(values)) for values in zip(*rows, strict=True))
    latents_of, texts_of = {}, {}
    with torch.no_grad():
        for at in range(0, len(images), batch_size):
            chunk = images[at : at + batch_size]
            pixels = np.stack([np.array(Image.open(path).convert("RGB")) for path in chunk])
            pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device, torch.float32) / 127.5 - 1
            posterior = vae.encode(pixels).latent_dist
            for path, mean, std in zip(chunk, posterior.mean.cpu(), posterior.std.cpu(), strict=True):
                latents_of[path] = {"mean": mean, "std": std}
        for caption in captions:
            ids = [
                t(caption, padding="max_length", max_length=t.model_max_length, truncation=True, return_tensors="pt").input_ids
                for t in tokenizers
            ]
            if job["te"]:
                texts_of[caption] = {f"ids_{k}": tokens[0] for k, tokens in enumerate(ids)}
                continue
            states, pooled = encode_prompt(text_encoders, [tokens.to(device) for tokens in ids], width)
            texts_of[caption] = {"states": states[0].cpu()} | ({} if pooled is None else {"pooled": pooled[0].cpu()})
    scale, latent_shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    del vae
    if not job["te"]:
        text_encoders = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    # what is trained
    meter.mark("attach")
    wanted = [(denoiser, "unet", kind), *((encoder, f"text_{k}", "text") for k, encoder in enumerate(text_encoders, 1))]
    for model, part, table in wanted:
        targets = [t for target in job["targets"] for t in TARGETS[table].get(target, [])]
        add_lora(model, part, targets, job["rank"], seed)
    if job["checkpointing"]:
        denoiser.enable_gradient_checkpointing()
        for encoder in text_encoders:
            encoder.gradient_checkpointing_enable()
    params = [p for model, *_ in wanted for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    loader = DataLoader(CachedDataset(rows, latents_of, texts_of), batch_size=batch_size, shuffle=False, num_workers=0)
    lr_scheduler = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=len(job["order"]))
    denoiser, optimizer, loader, lr_scheduler = accelerator.prepare(denoiser, optimizer, loader, lr_scheduler)
    text_encoders = [accelerator.prepare(encoder) for encoder in text_encoders]
    trained = [denoiser, *text_encoders]
    generator = torch.Generator(device)
    progress = tqdm(total=len(job["order"]), desc="Steps")

    def train_step(n: int, batch: dict[str, torch.Tensor]) -> float:
        with accelerator.accumulate(*trained):
            generator.manual_seed(randomness.key(seed, n, "device"))
            shape = batch["mean"].shape
            posterior = torch.randn(shape, generator=generator, device=device)
            latents = (batch["mean"] + batch["std"] * posterior - latent_shift) * scale
            noise = torch.randn(shape, generator=generator, device=device)

            if flow:
                u = torch.randn(shape[0], generator=generator, device=device).sigmoid()
                sigmas = (shift * u / (1 + (shift - 1) * u)).view(-1, 1, 1, 1)
                timesteps = sigmas.flatten() * 1000
                noisy, target = (1 - sigmas) * latents + sigmas * noise, noise - latents
            else:
                timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, shape[:1], generator=generator, device=device)
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                v = noise_scheduler.config.prediction_type == "v_prediction"
                target = noise_scheduler.get_velocity(latents, noise, timesteps) if v else noise

            if text_encoders:
                states, pooled = encode_prompt(text_encoders, [batch[f"ids_{k}"] for k in range(len(names))], width)
            else:
                states, pooled = batch["states"], batch.get("pooled")

            told: dict[str, Any] = {"encoder_hidden_states": states}
            if flow:
                told["pooled_projections"] = pooled
            elif pooled is not None:
                sizes = torch.tensor([[job["size"], job["size"], 0, 0, job["size"], job["size"]]], device=device, dtype=weight_dtype)
                told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), -1)}
            model_pred = denoiser(noisy.to(weight_dtype), timestep=timesteps, **told, return_dict=False)[0]
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")

            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(params, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            progress.update(1)
        value = loss.detach().item()
        progress.set_postfix(step_loss=value, lr=lr_scheduler.get_last_lr()[0])
        return value

    # the loop
    for model in trained:
        model.train()
    ups = [p for model, *_ in wanted for name, p in model.named_parameters() if "lora_B" in name]
    meter.norm = lambda: sum(float(p.detach().square().sum()) for p in ups) ** 0.5
    meter.ready()
    losses: list[float] = []
    for n, batch in enumerate(loader):
        if meter.tick():
            break
        losses.append(train_step(n, batch))
    found = {**meter.result(), "losses": losses, "parameters": sum(p.numel() for p in params)}

    # the arithmetic of a step, without what checkpointing computes twice
    if job["checkpointing"]:
        accelerator.unwrap_model(denoiser).disable_gradient_checkpointing()
        for encoder in text_encoders:
            accelerator.unwrap_model(encoder).gradient_checkpointing_disable()
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    try:
        with counter:
            train_step(len(losses), batch)
        found["flops"] = counter.get_total_flops()
    except torch.OutOfMemoryError:
        found["flops"] = None
    return found
