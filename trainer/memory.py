"""What a run will take, by arithmetic on a table for each family: memory while training, and the size of a LoRA. Torch-free.

The table of SD1 was fitted to 19 runs on one H200 (torch 2.11, 512 and 768 px, batch 1 to 4, bf16 and fp32, with and without text
encoder and checkpointing); it meets them within 5 %. Other GPUs may differ a little: their attention kernels keep other things.
Sizes are in GiB (2^30 bytes), numbers of parameters in whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import TrainConfig

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CONTEXT = 0.8  # what a CUDA process holds beside torch's tensors: context, libraries, blocks that are kept for reuse
PROCESS = 0.6  # a process on the CPU with torch and diffusers loaded, before any model
MOMENTS = 4  # fp32 copies of an adapter in training: weights, gradients, two moments


@dataclass(frozen=True)
class Table:
    """One family in its usual size.

    Attributes:
        parameters: numbers in each part, "vae" too.
        per_rank: for each part and kind of layer, adapter parameters for each unit of rank.
        native: side in pixels that `activations` and `checkpointed` are for.
        activations: what a training row keeps for the backward pass, at 16 bits: of the frozen base, and more for each kind of layer.
        checkpointed: the same with gradient checkpointing.
        encoding: what the VAE takes beside all weights while it encodes images; `decoding`, while a sample image is decoded.
    """

    parameters: Mapping[str, int]
    per_rank: Mapping[str, Mapping[str, int]]
    native: int
    activations: Mapping[str, float]
    checkpointed: float
    encoding: float
    decoding: float


TABLES = {
    "sd1": Table(
        parameters={"unet": 859_520_964, "text_1": 123_060_480, "vae": 83_653_863},
        per_rank={
            "unet": {"attention": 199_296, "feed_forward": 174_720, "projections": 49_920, "convolutions": 626_880},
            "text_1": {"attention": 73_728, "feed_forward": 92_160},
        },
        native=512,
        activations={"base": 0.80, "attention": 0.20, "feed_forward": 0.28, "projections": 0.085, "convolutions": 0.21, "text_1": 0.045},
        checkpointed=0.427,
        encoding=1.5,
        decoding=2.0,
    ),
    "demo": Table(
        parameters={"unet": 4_283_012, "text_1": 498_048, "vae": 3_406_663},
        per_rank={
            "unet": {"attention": 11_648, "feed_forward": 9_856, "projections": 2_816, "convolutions": 25_664},
            "text_1": {"attention": 3_072, "feed_forward": 2_304},
        },
        native=128,
        activations={"base": 0.02, "attention": 0.004, "feed_forward": 0.005, "projections": 0.002, "convolutions": 0.004, "text_1": 0.001},
        checkpointed=0.008,
        encoding=0.05,
        decoding=0.06,
    ),
}
FP32_ACTIVATIONS, FP32_CHECKPOINTED = 1.34, 1.18  # how much more is kept at 32 bits: norms and the adapters are so already


def lora_parameters(config: TrainConfig, table: str) -> int:
    """Numbers in the LoRA of a configuration. A rank above 320 is counted in full, though the smallest layers get less."""
    parts = TABLES[table].per_rank
    return config.adapter.rank * sum(
        parts[part].get(kind, 0) for part in parts if getattr(config.part, part).train for kind in config.adapter.targets
    )


def lora_bytes(config: TrainConfig, table: str) -> int:
    return lora_parameters(config, table) * BYTES[config.output.dtype]


def checkpoint_bytes(config: TrainConfig, table: str) -> int:
    """A resumable checkpoint: the adapter and its two moments in fp32."""
    return lora_parameters(config, table) * 12


def weights(table: str, dtype: str, parts: tuple[str, ...]) -> float:
    """GiB of the frozen parts; the VAE stays in fp32."""
    return sum(TABLES[table].parameters[p] * (4 if p == "vae" else BYTES[dtype]) for p in parts) / GIB


def peak(config: TrainConfig, table: str, *, pixels: int, dtype: str, rows: int, cpu: bool = False) -> float:
    """Most GiB that a run holds at once, in the GPU or, with `cpu`, in the process.

    Args:
        pixels: of the largest bucket; rows: images of the largest batch; dtype: what the base is cast to.
    """
    t, area = TABLES[table], pixels / TABLES[table].native ** 2
    text = config.part.text_1.train
    row = t.activations["base"] + sum(t.activations[k] for k in config.adapter.targets) + text * t.activations["text_1"]
    wide = dtype == "fp32"
    kept = t.checkpointed * (FP32_CHECKPOINTED if wide else 1) if config.train.checkpointing else row * (FP32_ACTIVATIONS if wide else 1)
    at_once = -(-rows // config.train.accumulation)
    state = lora_parameters(config, table) * 4 * MOMENTS / GIB
    training = weights(table, dtype, ("unet", "text_1") if text or cpu else ("unet",)) + (weights(table, dtype, ("vae",)) if cpu else 0)
    training += 0.1 * t.parameters["unet"] / TABLES["sd1"].parameters["unet"] + state + kept * area * at_once
    pictures = t.decoding if config.preview.enabled else t.encoding
    # Encoding goes a few images at a time up to the native size, so it grows with the side at first, and slowly above.
    pictures *= area**0.5 if area <= 1 else 1 + 0.107 * (area - 1)
    beside = weights(table, dtype, ("unet", "text_1", "vae")) + 0.09 * t.parameters["unet"] / TABLES["sd1"].parameters["unet"] + pictures
    return max(training, beside) + (PROCESS if cpu else CONTEXT)
