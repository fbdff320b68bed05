"""The machine: which device and dtype are timed, the rate at which it multiplies matrices, and the model's folder, made in time."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
SIDES = {"cuda": (4096, 8192), "xpu": (4096, 8192), "mps": (2048, 4096), "cpu": (1024, 2048)}
SECONDS = 0.5  # for each side


def main(job: dict[str, Any], meter: Any) -> dict[str, Any]:
    """Of `job`: `device` and `dtype` as wished for, `model`, and `work`, where its folder goes.

    Both sides' imports are made here once, so that neither of them reads them from a cold disk. Raises ValueError for a device or dtype
    that does not work here, and for a disk that is too full.
    """
    import torch

    import trainer.bench.reference
    import trainer.loop  # noqa: F401
    from trainer import hardware
    from trainer.bench import models

    chosen = hardware.choose(job["device"], job["dtype"])
    device = torch.device(chosen.device)
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "folder": str(models.make(job["model"], Path(job["work"]))),
        "device": chosen.device,
        "devices": 0 if device.type == "cpu" else getattr(torch, device.type).device_count(),
        "name": chosen.name,
        "dtype": chosen.dtype,
        "versions": versions,
        "matmul_tflops": max(matmul_tflops(device, chosen.dtype, side) for side in SIDES[device.type]),
    }


def matmul_tflops(device: Any, dtype: str, side: int) -> float:
    """10^12 operations a second in products of two square matrices of `side`, each product timed with those around it."""
    import torch

    from trainer.hardware import torch_dtype

    kind = torch_dtype(dtype)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    wait = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize

    def seconds(times: int) -> float:
        wait()
        begun = time.perf_counter()
        for _ in range(times):
            a @ b
        wait()
        return time.perf_counter() - begun

    seconds(2)
    times = max(1, min(1000, round(SECONDS / 3 / seconds(1))))
    return 2 * side**3 * times / min(seconds(times) for _ in range(3)) / 1e12
