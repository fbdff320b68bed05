"""What is timed: a model, a size, a rank and so on, as options say it; and the run's settings that follow from it. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from trainer import plan
from trainer.bench.meter import PROFILED
from trainer.config import Targets, TrainConfig
from trainer.config.load import merge, parse_set, validate
from trainer.data.buckets import step_of

IMAGES = 12  # what a LoRA is usually made of: 10 to 20
TARGETS = get_args(Targets)


class BenchError(ValueError):
    """Something that the user can mend, or that kept a process from its end."""


OWN = ("data", "model.source", "dataset.resolution", "train.visits", "train.batch_size", "train.device", "train.dtype")  # not for --set


@dataclass(frozen=True)
class Model:
    """A base to time. `variant`: its folder in assets/models; None: the base that the project comes with."""

    family: str
    size: int  # native side in pixels
    variant: str | None = None


MODELS = {
    "demo": Model("sd1", 128),
    "sd15": Model("sd1", 512, "sd1"),
    "sd2": Model("sd2", 768, "sd2"),
    "sdxl": Model("sdxl", 1024, "sdxl"),
    "sd35": Model("sd3", 1024, "sd35_medium"),
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        size: side of the square pictures in pixels; 0 takes the model's own.
        te: whether the text encoders are trained too, so that they read in each step.
        steps: timed steps; 0 takes as many as suit the device.
        assignments: `section.name=value` settings of our run alone.
        previews: whether sample images are timed.
    """

    model: str = "demo"
    size: int = 0
    batch: int = 1
    rank: int = 16
    te: bool = False
    dtype: str = "auto"
    device: str = "auto"
    steps: int = 0
    checkpointing: bool = False
    targets: tuple[str, ...] = ("attention",)
    assignments: tuple[str, ...] = ()
    previews: bool = True

    @property
    def side(self) -> int:
        return self.size or MODELS[self.model].size

    def on(self, device: str) -> tuple[int, int]:
        """(steps before the timed ones, timed steps) on this device. On a GPU the first ten are for graphs and autotuning."""
        gpu = device != "cpu"
        return (10 if gpu else 2), self.steps or (20 if gpu else 100 if self.model == "demo" else 8)


def check(case: Case) -> None:
    """Raise BenchError, and trainer.config.load.ConfigError, for options that make no run; no model is needed for that."""
    model = MODELS[case.model]
    for name, least in (("size", 0), ("steps", 0), ("batch", 1)):
        if (value := getattr(case, name)) < least:
            raise BenchError(f"--{name} is {value}; it must be at least {max(1, least)}.")
    for key in (item.partition("=")[0].strip() for item in case.assignments):
        if key in OWN:
            raise BenchError(f"--set {key}: the bench sets this itself, for both sides. See python -m trainer bench --help.")
    step = step_of(case.side, None, model.family)
    if case.side % step:
        below = max(step, case.side // step * step)
        raise BenchError(f"--size is {case.side}; for {case.model} it must be a multiple of {step}, such as {below} or {below + step}.")
    settings(case, Path(), Path(), "cpu", "fp32")  # its values are checked


def settings(case: Case, folder: Path, images: Path, device: str, dtype: str) -> TrainConfig:
    """Our run: the product's settings, with nothing beside the steps, and what the reference does where defaults differ from it.

    Those are a constant rate, the same for all parts; beta2 .999; no weighting of timesteps.
    """
    warm, steps = case.on(device)
    needed = warm + steps + PROFILED + 8  # the last for previews
    images_seen = max(IMAGES, case.batch)
    values = {
        "model": {"source": str(folder) if MODELS[case.model].variant else "demo"},
        "data": [{"folder": str(images)}],
        "dataset": {"resolution": case.side},
        "adapter": {"rank": case.rank, "alpha": case.rank, "targets": list(case.targets)},
        "part": {part: {"train": part == "unet" or case.te, "learning_rate": 1e-4} for part in ("unet", "text_1", "text_2")},
        "optimizer": {"kind": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        "schedule": {"kind": "constant", "warmup": 0},
        "loss": {"min_snr_gamma": None},
        "train": {
            "visits": -(-needed * case.batch // images_seen),
            "batch_size": case.batch,
            "max_grad_norm": 1.0,
            "memory": "checkpointing" if case.checkpointing else "fast",
            "device": device,
            "dtype": dtype,
        },
        "preview": {"enabled": False},
        "validation": {"enabled": False},
        "output": {"name": "bench", "save_every": 0, "checkpoint_every": 0},
    }
    return validate(merge(values, parse_set(case.assignments)))


def draw_images(folder: Path, case: Case) -> None:
    """Pictures of coloured blotches of the case's size, with captions; the same ones each time."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = random.Random(0)
    for k in range(max(IMAGES, case.batch)):
        dots = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
        dots.resize((case.side, case.side), Image.Resampling.BICUBIC).save(folder / f"{k:04}.png")
        (folder / f"{k:04}.txt").write_text(f"a picture of coloured blotches, number {k}", encoding="utf-8")


def order(case: Case, config: TrainConfig) -> list[list[tuple[str, str]]]:
    """For each step the (file, caption) of its rows, as our run will take them: the reference takes the same."""
    model = MODELS[case.model]
    laid = plan.make(config, model.size, model.family)
    if laid.buckets() != {(case.side, case.side): len(laid.images)}:
        raise BenchError(f"--set changed the pictures' size or number to {laid.buckets()}; both must train on {case.side} px squares.")
    return [[(str(laid.images[r.image].path), laid.captions[r.caption]) for r in rows] for rows in laid.steps]


def describe(case: Mapping[str, Any]) -> str:
    """A finished case (as in the JSON) in words."""
    parts = "denoiser and text encoders" if case["te"] else "denoiser"
    more = ", checkpointing" if case["checkpointing"] else ""
    more += f", ours with {' '.join(case['assignments'])}" if case["assignments"] else ""
    targets = ", ".join(t.replace("_", " ") for t in case["targets"])
    return (
        f"{case['model']} at {case['size']} px, batch {case['batch']}, rank {case['rank']} on {targets} of the {parts}, "
        f"{case['dtype']}{more}"
    )
