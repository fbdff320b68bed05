"""Pictures from a base with or without a LoRA, by diffusers' own pipeline and LoRA loader: what other tools will show."""

from __future__ import annotations

import sys
from pathlib import Path


def generate(
    base: str,
    prompts: list[str],
    *,
    lora: Path | None = None,
    strength: float = 1.0,
    seed: int = 1,
    steps: int = 20,
    guidance: float = 7.0,
    negative: str = "",
    size: tuple[int | None, int | None] = (None, None),
    out: Path | None = None,
    device: str = "auto",
) -> list[Path]:
    """Sample each prompt from its own seed (`seed`, `seed` + 1, ...) and save `out`/SEED-NUMBER.png; returns the paths.

    Raises ValueError for a base or LoRA that cannot be used.
    """
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from trainer import families
    from trainer.families import sources
    from trainer.formats.probe import identify
    from trainer.hardware import choose

    hardware = choose(device)
    path = sources.resolve(base, lambda text: print(text, file=sys.stderr))  # stdout has the pictures' paths alone
    family = families.get(sources.family_of(path, "auto"))
    if lora is not None:
        found = identify(lora)
        if found.kind != "lora":
            raise ValueError(f"--lora is {lora}, which is {found.what}. Give a LoRA file.")
        if found.family not in (None, family.name):
            raise ValueError(f"--lora is {lora}, which is {found.what}; the base is {family.name}. Give a LoRA that was trained for it.")
    folder = out or Path("pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {folder}, which cannot be made ({error.strerror}). Give another folder.") from None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[hardware.dtype]
    models = family.load(path, dtype, torch.device(hardware.device), "auto", "sdpa")
    native = family.native_resolution(path)
    width, height = (s or native for s in size)
    if lora is not None:
        pipe = StableDiffusionPipeline(
            models.vae,
            models.parts["text_1"],
            models.tokenizer,
            models.parts["unet"],
            DPMSolverMultistepScheduler.from_config(models.scheduler),
            None,
            None,
            requires_safety_checker=False,
        )
        try:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="lora")
            pipe.set_adapters(["lora"], [strength])
        except (RuntimeError, ValueError):  # layers of other sizes, or none that the base has
            raise ValueError(f"--lora is {lora}, whose layers do not fit the base {path}. Give the base that it was trained on.") from None
    images = family.sample(
        models,
        prompts,
        [seed + k for k in range(len(prompts))],
        negative=negative,
        steps=steps,
        guidance=guidance,
        size=(width, height),
    )
    paths = []
    for k, image in enumerate(images):
        target, n = folder / f"{seed + k}-{k + 1}.png", 1
        while target.exists():
            target, n = folder / f"{seed + k}-{k + 1}-{n + 1}.png", n + 1
        image.save(target)
        paths.append(target)
    return paths
