"""Bases of the real architectures with random weights: what is timed does not depend on what a model has learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.bench.case import MODELS, BenchError
from trainer.families.sources import DEMO

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "models"
SAME_TOKENIZER = ("sd1", "tokenizer")  # all CLIP text encoders read the same words; they differ in what fills a window up
PADDING = {"sd2": "!"}
POOL = 2**24  # random numbers that are drawn; every weight is a stretch of them


def make(name: str, root: Path) -> Path:
    """The folder of model `name`: the demo base that the project has, or one below `root`, written in fp16 unless it is there already."""
    variant = MODELS[name].variant
    if variant is None:
        return DEMO
    done = root / name
    if not done.exists():
        part = root / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        try:
            _write(part, variant)
            part.rename(done)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return done


def _write(folder: Path, variant: str) -> None:
    """A diffusers folder as people download it, of a size at which activations stay finite. SD3 is without T5."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(ASSETS / variant, folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer*"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    layouts = {path.parent.name: _layout(path) for path in sorted(folder.glob("*/config.json"))}
    size = 2 * sum(torch.Size(shape).numel() for layout in layouts.values() for shape in layout.values())
    free = shutil.disk_usage(folder).free
    if free < 1.05 * size:
        raise BenchError(f"The model takes {size / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free. Choose another --work.")
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for name, layout in layouts.items():
        state = {}
        for k, (key, shape) in enumerate(layout.items()):
            if len(shape) > 1:
                scale = 0.5 * torch.Size(shape[1:]).numel() ** -0.5
                state[key] = _stretch(pool, 7919 * k, torch.Size(shape).numel()).mul(scale).half().view(shape)
            else:
                state[key] = torch.full(shape, float("norm" in key and key.endswith("weight")), dtype=torch.float16)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        save_file(state, folder / name / f"{stem}.safetensors", {"format": "pt"})
    for name in ("tokenizer", "tokenizer_2"):
        if name in index:
            _tokenizer(folder / name, "!" if name == "tokenizer_2" else PADDING.get(variant, "<|endoftext|>"))
    if "text_encoder_3" in index:
        index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def _stretch(pool: Any, start: int, count: int) -> Any:
    """`count` numbers of `pool` from `start` on, round and round."""
    import torch

    start %= len(pool)
    pieces = [pool[start : start + count]]
    while (left := count - sum(map(len, pieces))) > 0:
        pieces.append(pool[:left])
    return torch.cat(pieces)


def _layout(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a component's file has; no weight is made."""
    import diffusers
    import torch
    import transformers

    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        if "_class_name" in config:
            model = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            kind = getattr(transformers, config["architectures"][0])
            model = kind(kind.config_class(**config))
    plain = type(model).__name__ == "CLIPTextModel"  # whose files have a level more than the live model
    return {(f"text_model.{k.removeprefix('text_model.')}" if plain else k): tuple(t.shape) for k, t in model.state_dict().items()}


def _tokenizer(folder: Path, padding: str) -> None:
    shutil.copytree(ASSETS.joinpath(*SAME_TOKENIZER), folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"pad_token": padding}), encoding="utf-8")
