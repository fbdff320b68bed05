"""Load the base of a run: by its family, with LoRAs merged in, and its prediction measured where the files don't say it."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch

from trainer import randomness
from trainer.adapters.merge import merge
from trainer.config import ModelConfig
from trainer.data.images import open_rgb
from trainer.families import Family, Models, prediction
from trainer.families.sources import DEMO
from trainer.lean import frozen

BESIDE = ("cuda",)  # where the weights may be read by a thread: the CPU would have to encode meanwhile


def load(
    source: Path,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    model: ModelConfig,
    attention: str = "sdpa",
    bits: int = 16,
    parked: bool = False,
    beside: Executor | None = None,
) -> Models:
    """The base at `source`, frozen, with `model.merge` merged into it; `models.notes` has sentences on what was done.

    `parked`: all models wait on the CPU until they are borrowed or fetched, as they always do with `bits` 8 or 4: then the large weights of
    the denoiser and of T5 are packed (trainer.lean.narrow) after the merging, one at a time on the device.
    `beside`: reads the denoiser's weights, where nothing is to be done with them here, until `Models.arrive`.
    Raises ValueError for settings that contradict the base, and for a LoRA that does not fit it.
    """
    from trainer.tools.inspect import read_lora

    parked = parked or bits < 16
    beside = None if parked or model.merge or device.type not in BESIDE else beside
    models = family.load(source, dtype, torch.device("cpu") if parked else device, model, attention, beside)
    for entry in model.merge:
        try:
            models.notes += merge(models.parts, read_lora(entry.file)[1], entry.strength)
        except ValueError as error:
            raise ValueError(f"model.merge names {entry.file}: {error}") from None
    if device.type == "cuda":  # a VAE's norms take longer than its convolutions there; elsewhere nothing is gained
        frozen.install(models.vae)
    if bits < 16:
        from trainer.lean import narrow

        for name in ("unet", *models.frozen):
            narrow.pack_layers(models.module(name), bits, device, home=torch.device("cpu"))
        models.bits = bits
    if parked:
        models.device = device
        if models.alphas_cumprod is not None:
            models.alphas_cumprod = models.alphas_cumprod.to(device)
        models.park(*models.parts, *models.frozen, "vae")
    return models


def measure(source: Path, family: Family, models: Models, latents: torch.Tensor | None = None) -> str:
    """Find out by forward passes on `latents` (B, C, h, w) whether the UNet predicts noise or v, and say so to `models`.

    Without latents those of some pictures of the example are taken. Returns a sentence. Raises ValueError where it does not show.
    """
    latents = _of_the_example(family, models) if latents is None else latents
    size = latents.shape[-1] * 8, latents.shape[-2] * 8
    cond = family.conditions(models, [""] * len(latents), size)
    generator = torch.Generator().manual_seed(randomness.key(0, 0, "prediction"))
    family.set_prediction(models, "unknown")
    with models.borrow("unet"), torch.no_grad():
        found = prediction.measure(lambda noisy, t: family.predict(models, noisy, t, cond), models.alphas_cumprod, latents, generator)
    if found.prediction == "unclear":
        raise ValueError(
            f"{source.name} does not say whether it predicts noise (epsilon) or v, and a test did not show it (errors {found.epsilon:.2f} and "
            f"{found.v:.2f}). Set model.prediction to epsilon, or to v_prediction where the model's page says v-pred."
        )
    family.set_prediction(models, found.prediction)
    what = {"epsilon": "noise (epsilon)", "v_prediction": "v"}[found.prediction]
    return f"{source.name} does not say what it predicts; a test shows that it is {what}: error {found.epsilon:.2f} as noise, {found.v:.2f} as v."


def _of_the_example(family: Family, models: Models) -> torch.Tensor:
    """Latents (4, C, 32, 32) of four of the built-in example's pictures, at 256 px."""
    paths = sorted((DEMO.parent / "data").glob("*/train/*.png"))[::7][:4]
    pictures = np.stack([np.asarray(open_rgb(path).resize((256, 256))) for path in paths])
    with models.borrow("vae"):
        return family.encode(models, (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).to(models.device))[0]
