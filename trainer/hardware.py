"""Which device, dtype and attention to train with, each with its reason; and what this machine has (`python -m trainer probe`).

Importing this module imports no torch; versions of packages are read from their metadata, never by importing them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

DTYPES = ("fp32", "bf16", "fp16")
ATTENTIONS = ("sdpa", "xformers")
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pillow",
    "onnxruntime",
    "xformers",
    "bitsandbytes",
    "prodigyopt",
)
GIB = 2**30
CONTEXT = 0.5  # GiB that a process's CUDA context takes; measured on an H200


@dataclass(frozen=True)
class Hardware:
    """What a run trains on. `warning`, if any, is the first line a user should see: a GPU is there but can't be used."""

    device: str  # "cuda", "cuda:1", "mps", "xpu", "cpu"
    name: str  # for people: "NVIDIA GeForce RTX 3060"
    dtype: str  # "fp32" | "bf16" | "fp16": what the frozen base is cast to
    attention: str  # "sdpa" | "xformers"
    reasons: tuple[str, ...]  # a sentence each: why this device, this dtype, this attention
    warning: str | None


def choose(device: str = "auto", dtype: str = "auto", attention: str = "sdpa") -> Hardware:
    """The hardware for these wishes. "auto" takes the best that works; anything else is taken as said or refused.

    A device with a number becomes torch's current one, on which Triton's kernels and CUDA graphs are launched.

    Raises ValueError, a sentence that says what is allowed, for a wish that this machine can't fulfil. Imports torch.
    """
    unusable = gpu_unusable()
    device, why_device = _choose_device(device, unusable)
    kind, _, number = device.partition(":")
    if number:
        import torch

        getattr(torch, kind).set_device(int(number))
    dtype, why_dtype = _choose_dtype(dtype, device)
    why_attention = _check_attention(attention, device)
    warning = unusable if device == "cpu" else None
    return Hardware(device, _device_name(device), dtype, attention, (why_device, why_dtype, why_attention), warning)


def probe() -> dict:
    """What this machine has, JSON-able; sizes in GiB. `choice` is choose() as a dict, `fits` and `slow` lists of sentences. Imports torch."""
    import psutil
    import torch

    choice, memory = choose(), psutil.virtual_memory()
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_build": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "gpus": _gpus(),
        "gpu_unusable": gpu_unusable(),
        "cpu": {"name": _cpu_name(), "cores": _cores()},
        "memory_gib": round(memory.total / GIB, 1),
        "free_memory_gib": round(memory.available / GIB, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "choice": asdict(choice),
    }
    found["fits"] = _fits(found["gpus"])
    found["slow"] = slow(found)
    return found


def _fits(gpus: list[dict]) -> list[str]:
    """Sentences on which bases train on each GPU, and how."""
    from trainer import memory

    said = []
    for number, gpu in enumerate(gpus):
        for (base, side), fit in zip(memory.BASES.values(), memory.fits(gpu["free_gib"]), strict=True):
            how = f"{memory.MODES[fit.mode].title}, about {fit.gib:.1f} GiB" if fit else "does not fit"
            said.append(f"cuda:{number}: {base} at {side} px {how}")
    return said


def slow(found: dict) -> list[str]:
    """Sentences for what would be slow or not fit and why; `found` is what probe() collects, without `slow`."""
    said, choice = [], found["choice"]
    cpu = choice["device"] == "cpu"
    if cpu:
        why = found["gpu_unusable"] or "No GPU that PyTorch can use."
        said.append(f"{why} On a CPU an SD1.5 LoRA at 512 px takes hours; only the demo's small model is made for it.")
        if found["cpu"]["cores"] < 8:
            said.append(f"Only {found['cpu']['cores']} CPU cores, and on a CPU the time of a step shrinks with their number.")
    if choice["device"] == "mps":
        said.append("Apple GPUs train in fp32 here and share their memory with the system: slower than an NVIDIA GPU with bf16.")
    for number, gpu in enumerate(found["gpus"]):
        where = f"{gpu['name']} (cuda:{number})"
        if gpu["memory_gib"] < 8:
            said.append(f"{where} has {gpu['memory_gib']:.1f} GiB, less than 8: SD1.5 needs small batches, SDXL may not fit.")
        elif gpu["free_gib"] < 0.7 * gpu["memory_gib"]:
            said.append(f"{where} has {gpu['free_gib']:.1f} of {gpu['memory_gib']:.1f} GiB free: close what else uses it before a run.")
        if not gpu["bf16"]:
            said.append(f"{where} has no bf16 units, so it trains in fp16 with loss scaling, which skips a step now and then.")
    if found["free_memory_gib"] < 6:
        said.append(f"Only {found['free_memory_gib']:.1f} GiB of memory are free: loading SDXL (7 GB) will swap to disk.")
    if found["disk_free_gib"] < 10:
        said.append(
            f"Only {found['disk_free_gib']:.1f} GiB of disk are free: a base model takes 2 to 7 GB, a run with checkpoints up to 1 GB."
        )
    return said


def free_gib(device: Any) -> float | None:
    """GiB of a CUDA device that this process may have in all: what is free, and what it holds without need; None on other devices.

    Its own context, which trainer.memory counts too, stands in it by its usual size.
    """
    import torch

    if device.type != "cuda":
        return None
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + idle) / GIB + CONTEXT


def warm_up(wish: str) -> None:
    """Have CUDA make its context, cuBLAS and cuDNN start and Triton read itself, on the device that `choose` will take for this wish or that
    a launcher gives to this process; for a thread beside imports. What does not work is said by whoever needs it."""
    import torch
    from torch.nn.functional import conv2d, scaled_dot_product_attention

    with contextlib.suppress(ValueError, RuntimeError, ImportError, AttributeError):
        device = torch.device(_choose_device(wish, None)[0])
        if device.type == "cuda":
            if "LOCAL_RANK" in os.environ:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            x = torch.zeros(1, 64, 64, 64, device=device, dtype=torch.bfloat16 if _has_bf16(str(device)) else torch.float16)
            x = conv2d(x, x.new_zeros(64, 64, 3, 3), padding=1) @ x
            scaled_dot_product_attention(x, x, x)
            torch.cuda.synchronize(device)
            from triton.runtime.cache import triton_key

            triton_key()  # a hash of all its files, which it keeps


def spills() -> bool:
    """Whether the driver lends the GPU the computer's memory when its own is full, which is many times slower, instead of failing."""
    return sys.platform == "win32" or Path("/dev/dxg").exists()  # the latter in WSL


def cap(device: Any, margin: float = 0.2) -> None:
    """Where the driver `spills`, let this process take no more of a CUDA device than what is free now, less `margin` GiB: beyond it torch
    raises OutOfMemoryError, and the run goes on in a smaller way."""
    import torch

    if device.type != "cuda" or not spills():
        return
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.05, (free + own - margin * GIB) / total)), device)


# ---- device -----------------------------------------------------------------------------------------------------------------------


def _available() -> dict[str, int]:
    """Kinds of device that work and how many of each, best first; "cuda" is also AMD's ROCm."""
    import torch

    counts = {
        "cuda": sum(_kernels_missing(i) is None for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else 0,
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    return {kind: count for kind, count in counts.items() if count}


def _choose_device(wish: str, unusable: str | None) -> tuple[str, str]:
    available = _available()
    if wish == "auto":
        kind = next(iter(available))
        if kind == "cpu":
            return "cpu", "CPU, because no GPU can be used here."
        if kind == "cuda":
            import torch

            first = next(i for i in range(torch.cuda.device_count()) if _kernels_missing(i) is None)
            others = f"; {available['cuda'] - 1} more can be chosen as cuda:N" if available["cuda"] > 1 else ""
            return f"cuda:{first}" if first else "cuda", f"GPU, because PyTorch can use it{others}."
        return kind, f"{kind}, because PyTorch can use it."
    if not re.fullmatch(r"(cuda|xpu)(:\d+)?|mps|cpu", wish):
        raise ValueError(f'device is "{wish}"; allowed are "auto", "cuda", "cuda:N", "xpu", "xpu:N", "mps" and "cpu".')
    kind, _, number = wish.partition(":")
    if kind not in available:
        why = f" {unusable}" if unusable and kind == "cuda" else ""
        raise ValueError(f'device is "{wish}", which does not work here; what works: {", ".join(available)}, or "auto".{why}')
    count = _count(kind)
    if int(number or 0) >= count:
        raise ValueError(f'device is "{wish}"; {kind} has devices 0 to {count - 1} here. Choose one of them, or "auto".')
    missing = _kernels_missing(int(number or 0)) if kind == "cuda" else None
    if missing:
        raise ValueError(f'device is "{wish}", which does not work: {missing} Or choose another, or "auto".')
    return wish, f"{wish}, as asked for."


def _count(kind: str) -> int:
    import torch

    return {"cuda": torch.cuda.device_count, "xpu": torch.xpu.device_count}.get(kind, lambda: 1)()


def _kernels_missing(number: int) -> str | None:
    """Why this build of torch has no kernels for CUDA device `number`, or None. Not asked of ROCm, where overrides exist."""
    import torch

    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(number)
    # A cubin sm_xy runs on x.z with z >= y; PTX compute_xy on everything newer (CUDA C++ Programming Guide, "Binary compatibility").
    for arch in torch.cuda.get_arch_list():
        kind, _, digits = arch.partition("_")
        built = int(re.match(r"\d+", digits).group()[:-1]), int(re.match(r"\d+", digits).group()[-1])
        if (kind == "compute" and built <= (major, minor)) or (kind == "sm" and built[0] == major and built[1] <= minor):
            return None
    name = torch.cuda.get_device_name(number)
    return (
        f"{name} has compute capability {major}.{minor}, and the installed PyTorch (CUDA {torch.version.cuda}) has no kernels for it; "
        "run `python launch.py update`, which picks the build that fits."
    )


def nvidia_present(has: Callable[[str], bool] = lambda path: Path(path).exists()) -> bool:
    """Whether an NVIDIA GPU and driver seem to be here, without torch and without starting a program."""
    if sys.platform.startswith("linux"):
        return has("/proc/driver/nvidia/gpus") or (has("/dev/dxg") and has("/usr/lib/wsl/lib/nvidia-smi"))  # the latter in WSL
    return shutil.which("nvidia-smi") is not None


def gpu_unusable() -> str | None:
    """A GPU is there that torch can't use: a sentence with the reason and the remedy. None where all is well or there is none."""
    import torch

    if torch.cuda.is_available():
        reasons = [_kernels_missing(i) for i in range(torch.cuda.device_count())]
        return reasons[0] if reasons and all(reasons) else None
    if nvidia_present():
        if torch.version.cuda is None:
            return (
                f"An NVIDIA GPU is there, but the installed PyTorch {torch.__version__} is a build without CUDA; "
                "run `python launch.py update`, which picks the build that fits."
            )
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return "An NVIDIA GPU is there, but CUDA_VISIBLE_DEVICES hides it; unset that variable and start again."
        return (
            f"An NVIDIA GPU is there, but PyTorch's CUDA {torch.version.cuda} does not start on it, most likely because "
            "the driver is too old; install a newer driver, or run `python launch.py update` for a build that fits the driver."
        )
    if Path("/dev/kfd").exists() and torch.version.hip is None and torch.version.cuda is None:
        return (
            "An AMD GPU may be there, but the installed PyTorch is a build without ROCm; "
            "`python launch.py update` installs the ROCm build if it has kernels for that GPU."
        )
    return None


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device.startswith("xpu"):
        return torch.xpu.get_device_name(device)
    return _cpu_name() + (" GPU" if device == "mps" else "")


def _gpus() -> list[dict]:
    import torch

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append(
            {
                "name": torch.cuda.get_device_name(i),
                "memory_gib": round(total / GIB, 1),
                "free_gib": round(min(free / GIB + CONTEXT, total / GIB), 1),  # this process ends
                "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(i)),
                "bf16": _has_bf16(f"cuda:{i}"),
            }
        )
    return gpus


# ---- dtype and attention ------------------------------------------------------------------------------------------------------------


def _has_bf16(device: str) -> bool:
    """Whether a CUDA device multiplies bf16 in hardware: sm_80 and newer. Older ones emulate it, several times slower than fp16."""
    import torch

    if torch.version.hip:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cuda.get_device_capability(device) >= (8, 0)


def torch_dtype(name: str) -> Any:
    """torch's dtype of "fp32", "bf16" or "fp16"."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _choose_dtype(wish: str, device: str) -> tuple[str, str]:
    if wish not in ("auto", *DTYPES):
        raise ValueError(f'dtype is "{wish}"; allowed are "auto", {", ".join(f"{name!r}" for name in DTYPES)}.'.replace("'", '"'))
    kind = device.partition(":")[0]
    if wish == "auto":
        if kind == "cuda" and _has_bf16(device):
            return "bf16", "bf16, because the GPU multiplies it in hardware and it needs no loss scaling."
        if kind == "cuda":
            return "fp16", "fp16, because the GPU only emulates bf16 (before compute capability 8.0)."
        if kind == "xpu":
            return "bf16", "bf16, because Intel GPUs multiply it in hardware and it needs no loss scaling."
        return "fp32", f"fp32, because half precision is slow or incomplete on {kind}."
    if kind == "cpu" and wish == "fp16":
        raise ValueError('dtype is "fp16" on a CPU, which computes it slowly and in part not at all; choose "fp32", "bf16" or "auto".')
    if kind == "cpu" and wish == "bf16":
        return "bf16", 'bf16, as asked for; "auto" takes fp32 on a CPU, which is faster on most and takes twice the memory.'
    if kind == "cuda" and wish == "bf16" and not _has_bf16(device):
        return "bf16", 'bf16, as asked for; this GPU emulates it, slower than fp16 (before compute capability 8.0): "auto" takes fp16.'
    return wish, f"{wish}, as asked for."


def _check_attention(wish: str, device: str) -> str:
    """The reason for this attention. Raises ValueError where it can't work."""
    if wish not in ATTENTIONS:
        raise ValueError(f'attention is "{wish}"; allowed are "sdpa" and "xformers".')
    if wish == "sdpa":
        return "sdpa, PyTorch's own attention: it needs no further package and is as fast as any on current GPUs."
    if not device.startswith("cuda"):
        raise ValueError(f'attention is "xformers", which needs a CUDA GPU, and the device is "{device}"; choose "sdpa".')
    if _version("xformers") is None:
        raise ValueError('attention is "xformers", which is not installed; choose "sdpa", or run `pip install "lora-atelier[xformers]"`.')
    return "xformers, as asked for."


# ---- small facts --------------------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine() or "CPU"
