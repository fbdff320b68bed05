"""What all families do alike: layers by kind, text through CLIP, pixels through the VAE and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trainer import imports
from trainer.config import LoraConfig, ModelConfig
from trainer.data.buckets import Placement
from trainer.families import Cond, Models, States, clip
from trainer.formats import single_file
from trainer.sampler import Sampler

TEXT_TARGETS = {
    "attention": r".*self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "feed_forward": r".*mlp\.fc[12]",
}
TEXT_ROWS = 32  # captions that pass through a text encoder at once


def targets(model: torch.nn.Module, table: Mapping[str, str], kinds: Sequence[str]) -> list[str]:
    """Paths of the Linear and Conv2d modules of `model` that `kinds` stand for in `table`, in the model's own order."""
    patterns = [re.compile(rf"(.*\.)?{table[k]}") for k in kinds if k in table]
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return [n for n, m in model.named_modules() if isinstance(m, layers) and any(p.fullmatch(n) for p in patterns)]


class Common:
    """The shared half of a family; a family's own class says the rest.

    Attributes:
        denoiser: the denoiser's name among diffusers' components.
        attentions: what may compute its attention.
        unet_targets: kind of layer -> pattern of the denoiser's module paths.
        skip: for each text encoder, which of its layers is read, counted from the end (1: the last).
        final_norm: whether the encoder's last layer norm follows.
    """

    name: str
    parts: tuple[str, ...]
    denoiser = "unet"
    attentions: tuple[str, ...] = ("sdpa", "xformers")
    unet_targets: dict[str, str]
    skip: dict[str, int]
    final_norm = True

    def native_resolution(self, source: Path, prediction: str = "auto") -> int:
        """Side in pixels of the square that the base was made for, read from its files."""
        from trainer.formats.probe import native_resolution

        return native_resolution(source)

    def load(
        self,
        source: Path,
        dtype: torch.dtype,
        device: torch.device,
        model: ModelConfig | None = None,
        attention: str = "sdpa",
        beside: Executor | None = None,
    ) -> Models:
        """Load a diffusers folder or a single `.safetensors` file, frozen, the denoiser and text encoders cast to `dtype`.

        The VAE stays float32: it runs once for each image, and SDXL's overflows in fp16. What the files don't say of the
        prediction is `unknown` after this: `set_prediction` says it later. `beside`: reads the denoiser's weights until `Models.arrive`.
        Raises ValueError for settings that contradict the files, and for an attention that the denoiser does not take.
        """
        if attention not in self.attentions:
            raise ValueError(f"train.attention is {attention}, which the {self.denoiser} of {self.name} does not take. Set it to sdpa.")
        model = model or ModelConfig()
        imports.light()
        from transformers.utils import logging

        logging.disable_progress_bar()  # it lasts for milliseconds and would break into the run's own bar
        found = single_file.load_any(source, dtype, model.text_encoders, model.t5, device, torch.channels_last, beside)
        text = {f"text_{k}": f"encoder{'' if k == 1 else f'_{k}'}" for k in (1, 2, 3)}
        encoders = {part: found[f"text_{n}"] for part, n in text.items() if found.get(f"text_{n}") is not None}
        tokenizers = {part: found[f"{text[part].replace('encoder', 'tokenizer')}"] for part in encoders}
        frozen = {part: m for part, m in encoders.items() if part not in self.parts}
        parts = {"unet": found[self.denoiser]} | {p: m for p, m in encoders.items() if p in self.parts}
        for module in (*parts.values(), *frozen.values(), found["vae"]):
            module.requires_grad_(False).eval()
            if module is not parts["unet"] or "arriving" not in found:
                module.to(device)
        models = Models(parts, found["vae"], tokenizers, dict(found["scheduler"]), "unknown", None, device, frozen)
        models.arriving = found.get("arriving")
        models.clip_skip = model.clip_skip
        models.notes = list(found.get("notes", ()))
        if attention == "xformers":
            parts["unet"].enable_xformers_memory_efficient_attention()
        self.schedule(models, source, model)
        return models

    def schedule(self, models: Models, source: Path, model: ModelConfig) -> None:
        """Say how the denoiser at `source` was trained: what it predicts, on which noise schedule."""
        raise NotImplementedError

    def targets(self, models: Models, part: str, kinds: Sequence[str]) -> list[str]:
        """Module paths of `part` that `kinds` stand for, in the model's own order."""
        return targets(models.parts[part], self.unet_targets if part == "unet" else TEXT_TARGETS, kinds)

    def count(self, source: Path, adapter: LoraConfig) -> dict[str, tuple[int, int]]:
        """(layers, adapter parameters) for each part, from the configurations alone: no weight is read."""
        from trainer.adapters.lora import rank_of

        out = {}
        for part, model in single_file.blank(source, self.parts).items():
            modules = dict(model.named_modules())
            paths = targets(model, self.unet_targets if part == "unet" else TEXT_TARGETS, adapter.targets)
            ranks = {p: rank_of(adapter, part, p, modules[p]) for p in paths}
            shapes = {p: modules[p].weight.shape for p, r in ranks.items() if r}
            out[part] = len(shapes), sum(ranks[p] * (s[0] + s[1:].numel()) for p, s in shapes.items())
        return out

    # text

    def tokenize(self, models: Models, part: str, captions: Sequence[str]) -> clip.Tokens:
        """Tokens of `captions` for one text encoder, as it reads them: windows of 75 tokens."""
        if part == "text_3":
            return clip.tokenize_t5(models.tokenizers[part], captions, max_windows=models.windows, weighted=models.weighted)
        return clip.tokenize(models.tokenizers[part], captions, max_windows=models.windows, weighted=models.weighted)

    def encode_text(self, models: Models, part: str, tokens: clip.Tokens) -> States:
        """What an encoder, as it is now, makes of `tokens`."""
        if part == "text_3":
            return States(clip.encode_t5(models.module(part), tokens))
        return States(*clip.encode(models.module(part), tokens, skip=self._skip(models, part), final_norm=self.final_norm))

    def _skip(self, models: Models, part: str) -> int:
        return self.skip[part]

    def condition(self, models: Models, states: dict[str, States], size: torch.Tensor | None) -> Cond:
        """The encoders' states as the denoiser takes them; `size` (B, 6) where the family has it."""
        return Cond(states["text_1"].hidden)

    @torch.no_grad()
    def read(self, models: Models, part: str, texts: Sequence[str]) -> tuple[States, tuple[int, ...]]:
        """(what one encoder, borrowed for it, makes of `texts` as it is now; how many windows each of them takes)."""
        tokens = self.tokenize(models, part, texts).to(models.device)
        pieces = torch.arange(len(texts), device=models.device).split(TEXT_ROWS)
        with models.borrow(part):
            found = [self.encode_text(models, part, tokens.rows(p)) for p in pieces]
        pooled = None if found[0].pooled is None else torch.cat([f.pooled for f in found])
        return States(torch.cat([f.hidden for f in found]), pooled), tokens.windows

    @torch.no_grad()
    def conditions(self, models: Models, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
        """Conditioning of `prompts` for pictures of `size` (width, height), by the encoders as they are now, borrowed one after the other."""
        states = {part: self.read(models, part, prompts)[0] for part in models.text}
        return self.condition(models, states, self.whole(models, size, len(prompts)))

    def whole(self, models: Models, size: tuple[int, int], rows: int) -> torch.Tensor | None:
        """Size conditioning (rows, 6) of pictures of `size` (width, height) of which nothing is cut off; None: the family has none."""
        told = self.size(size, Placement(*size, (0.0, 0.0, *map(float, size)), 1.0, 1.0), False)
        return None if told is None else torch.tensor([told], device=models.device).expand(rows, -1)

    def size(self, image: tuple[int, int], placement: Placement, flip: bool) -> tuple[float, ...] | None:
        """Size conditioning of an image of `image` (width, height) pixels; None: the family has none."""
        return None

    # pictures

    @torch.no_grad()
    def encode(self, models: Models, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the scaled latents' distribution, each (B, C, H/8, W/8) float32."""
        posterior = models.vae.encode(pixels.to(models.vae.dtype)).latent_dist
        scale, shift = models.vae.config.scaling_factor, models.vae.config.shift_factor or 0.0
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def pipeline(self, models: Models) -> Any:
        """diffusers' text-to-image pipeline of the loaded modules, with the scheduler that suits them."""
        raise NotImplementedError

    def preview_scheduler(self, models: Models) -> Any:
        """The scheduler of diffusers that sample images are made by."""
        raise NotImplementedError

    def sample(
        self,
        models: Models,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        tick: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of `size` (width, height), one for each prompt, each from its own seed, by the models as they are now: see Sampler."""
        make = Sampler(self, models)
        return make(prompts, seeds, negative=negative, steps=steps, guidance=guidance, size=size, tick=tick)
