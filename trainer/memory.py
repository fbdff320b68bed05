"""What a run will take, by arithmetic on a table for each base: memory while training, and the size of a LoRA. Torch-free.

Numbers of parameters are those of the real configurations (a test counts them). What training keeps was measured on one H200 (torch 2.11,
captured steps on random weights at the native size: rows, kinds of layers, modes and dtypes as the test lists them); the tables meet all
of it within 8 %. Estimates are: how much of it is the frozen base and how much attention, since attention was never left out; SD3 medium
and SD3.5 large but for one figure, by 3.5 medium; trained second text encoders. Other GPUs may differ a little: their attention kernels
keep other things.

Sizes are in GiB (2^30 bytes), numbers of parameters in whole numbers. LoRAs with `adapter.blocks` are counted as if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from trainer.config import TrainConfig


@dataclass(frozen=True)
class Mode:
    """A way to train in less memory (train.memory).

    `bits`: of the frozen denoiser's large weights; `again`: what the backward pass computes anew, `feed_forward` layers or whole `blocks`;
    `title`: in words, as the end of a sentence that begins with "training".
    """

    bits: int
    again: Literal["", "feed_forward", "blocks"]
    title: str


MODES = {  # each takes less memory than the one before it, and longer; the last two change results a little
    "fast": Mode(16, "", "with everything kept"),
    "selective": Mode(16, "feed_forward", "with feed-forward layers computed twice"),
    "checkpointing": Mode(16, "blocks", "with every block computed twice"),
    "8bit": Mode(8, "blocks", "with every block computed twice and the base in 8 bits"),
    "4bit": Mode(4, "blocks", "with every block computed twice and the base in 4 bits"),
}
GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CONTEXT = 0.8  # what a CUDA process holds beside torch's tensors: context, libraries, blocks that are kept for reuse
PROCESS = 0.6  # a process on the CPU with torch and diffusers loaded, before any model
BYTES_TRAINED = {
    "fp32": 16,
    "bf16": 20,
    "fp16": 20,
}  # of an adapter's number: fp32 weight, gradient, two moments; 16-bit weight and gradient
PACKED_T5 = 0.97  # share of its numbers that 8 and 4 bits hold
BYTES_PACKED = {8: 8.5 / 8, 4: 4.25 / 8}  # with the scales
# The VAE in fp32, in GiB for each pixel of a batch, measured from 512 to 1536 px; and the pixels that one batch has at least.
ENCODING, ENCODED_AT_ONCE = 3.02 / 2**20, 2 * 512 * 512
DECODING, DECODED_AT_ONCE = 4.77 / 2**20, 512 * 512
TILE = 512 * 512  # pixels that are encoded at once where memory is short; a sample image is decoded in tiles of a ninth of it then
TEXTS = ("text_1", "text_2", "text_3")
LARGE = "convolutions_3x3"  # the convolutions that adapter.conv_rank is for


@dataclass(frozen=True)
class Table:
    """One base.

    Attributes:
        parameters: numbers in each part (buffers of a transformer too), and in "vae".
        per_rank: for each part and kind of layer, adapter parameters for each unit of rank.
        native: side in pixels that `activations` and `checkpointed` are for.
        activations: what a training row keeps for the backward pass, at 16 bits: of the frozen base, and more for each kind of layer
            and text encoder.
        selective: of the base where feed-forward layers are computed again; checkpointed: of all where whole blocks are.
        wide, wide_checkpointed: how much more that is at 32 bits: norms and the adapters are so already.
        overhead: what a step holds beside all this.
        packed: share of the denoiser's numbers that 8 and 4 bits hold.
        vae: what the VAE takes, in shares of that of the real ones.
        tflop: 10^12 operations of a training row of native size, adapters apart (counted by torch's counter on the real configurations).
        cost: how long a step takes in each of MODES, in times of that with everything kept; measured as the rest.
    """

    parameters: Mapping[str, int]
    per_rank: Mapping[str, Mapping[str, int]]
    native: int
    activations: Mapping[str, float]
    selective: float
    checkpointed: float
    wide: float
    wide_checkpointed: float
    overhead: float
    tflop: float
    packed: float = 0.994
    vae: float = 1.0
    cost: tuple[float, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The text encoders that may carry an adapter."""
        return tuple(p for p in self.per_rank if p in TEXTS)


_CLIP_L = {"attention": 73_728, "feed_forward": 92_160}
_CLIP_G = {"attention": 327_680, "feed_forward": 409_600}
_SD3_TEXTS = {"text_1": 123_650_304, "text_2": 694_659_840, "text_3": 4_762_310_656, "vae": 83_819_683}

TABLES = {
    "sd1": Table(
        parameters={"unet": 859_520_964, "text_1": 123_060_480, "vae": 83_653_863},
        per_rank={
            "unet": {"attention": 199_296, "feed_forward": 174_720, "projections": 49_920, "convolutions": 82_880, LARGE: 544_000},
            "text_1": _CLIP_L,
        },
        native=512,
        activations={"base": 0.42, "attention": 0.10, "feed_forward": 0.108, "projections": 0.045, "convolutions": 0.083, "text_1": 0.042},
        selective=0.3,
        checkpointed=0.2,
        wide=2.0,
        wide_checkpointed=2.0,
        overhead=0.12,
        tflop=1.73,
        cost=(1.0, 1.08, 1.32, 1.94, 1.70),
    ),
    "sd2": Table(
        parameters={"unet": 865_910_724, "text_1": 340_387_840, "vae": 83_653_863},
        per_rank={
            "unet": {"attention": 207_488, "feed_forward": 174_720, "projections": 49_920, "convolutions": 82_880, LARGE: 544_000},
            "text_1": {"attention": 188_416, "feed_forward": 235_520},
        },
        native=768,
        activations={"base": 0.92, "attention": 0.247, "feed_forward": 0.24, "projections": 0.083, "convolutions": 0.173, "text_1": 0.09},
        selective=0.62,
        checkpointed=0.42,
        wide=2.0,
        wide_checkpointed=2.0,
        overhead=0.108,
        tflop=4.91,
        cost=(1.0, 1.03, 1.26, 1.65, 1.52),
    ),
    "sdxl": Table(
        parameters={"unet": 2_567_463_684, "text_1": 123_060_480, "text_2": 694_659_840, "vae": 83_653_863},
        per_rank={
            "unet": {"attention": 1_451_520, "feed_forward": 1_164_800, "projections": 43_520, "convolutions": 58_560, LARGE: 355_840},
            "text_1": _CLIP_L,
            "text_2": _CLIP_G,
        },
        native=1024,
        activations={
            "base": 3.27, "attention": 0.80, "feed_forward": 0.993, "projections": 0.077, "convolutions": 0.327, "text_1": 0.03, "text_2": 0.2,
        },
        selective=1.9,
        checkpointed=0.49,
        wide=2.0,
        wide_checkpointed=1.9,
        overhead=0.1,
        tflop=14.22,
        cost=(1.0, 1.08, 1.35, 1.86, 1.67),
    ),
    "sd3_medium": Table(
        parameters={"unet": 2_028_328_000 + 56_623_104} | _SD3_TEXTS,
        per_rank={"unet": {"attention": 586_752, "feed_forward": 721_920, "projections": 509_952}, "text_1": _CLIP_L, "text_2": _CLIP_G},
        native=1024,
        activations={"base": 2.93, "attention": 0.75, "feed_forward": 1.35, "projections": 1.27, "text_1": 0.045, "text_2": 0.17},
        selective=2.5,
        checkpointed=0.6,
        wide=1.58,
        wide_checkpointed=1.6,
        overhead=0.06,
        tflop=19.53,
        packed=0.957,
        cost=(1.0, 1.03, 1.39, 1.59, 1.51),
    ),
    "sd35_medium": Table(
        parameters={"unet": 2_243_171_520 + 226_492_416} | _SD3_TEXTS,
        per_rank={"unet": {"attention": 746_496, "feed_forward": 721_920, "projections": 569_856}, "text_1": _CLIP_L, "text_2": _CLIP_G},
        native=1024,
        activations={"base": 5.7, "attention": 1.45, "feed_forward": 1.405, "projections": 1.31, "text_1": 0.045, "text_2": 0.17},
        selective=4.87,
        checkpointed=0.69,
        wide=1.58,
        wide_checkpointed=1.6,
        overhead=0.06,
        tflop=25.56,
        packed=0.90,
        cost=(1.0, 1.03, 1.39, 1.59, 1.51),
    ),
    "sd35_large": Table(
        parameters={"unet": 8_056_627_520 + 89_653_248} | _SD3_TEXTS,
        per_rank={"unet": {"attention": 1_473_792, "feed_forward": 1_824_000, "projections": 1_284_096}, "text_1": _CLIP_L, "text_2": _CLIP_G},
        native=1024,
        activations={"base": 10.3, "attention": 2.6, "feed_forward": 3.5, "projections": 2.9, "text_1": 0.045, "text_2": 0.17},
        selective=8.8,
        checkpointed=1.2,
        wide=1.58,
        wide_checkpointed=1.6,
        overhead=0.2,
        tflop=65.86,
        packed=0.978,
        cost=(1.0, 1.03, 1.39, 1.59, 1.51),
    ),
    "demo": Table(
        parameters={"unet": 4_283_012, "text_1": 498_048, "vae": 3_406_663},
        per_rank={
            "unet": {"attention": 11_648, "feed_forward": 9_856, "projections": 2_816, "convolutions": 4_224, LARGE: 21_440},
            "text_1": {"attention": 3_072, "feed_forward": 2_304},
        },
        native=128,
        activations={"base": 0.02, "attention": 0.004, "feed_forward": 0.005, "projections": 0.002, "convolutions": 0.004, "text_1": 0.001},
        selective=0.0,
        checkpointed=0.008,
        wide=1.34,
        wide_checkpointed=1.18,
        overhead=0.001,
        tflop=0.0019,
        vae=0.035,
    ),
}  # fmt: skip


def lora_parameters(config: TrainConfig, table: str) -> int:
    """Numbers in the LoRA of a configuration. A rank above 320 is counted in full, though the smallest layers get less."""
    kinds, adapter = list(config.adapter.targets), config.adapter
    trained = [kinds_of for part, kinds_of in TABLES[table].per_rank.items() if getattr(config.part, part).train]
    count = adapter.rank * sum(kinds_of.get(kind, 0) for kinds_of in trained for kind in kinds)
    if "convolutions" in kinds:
        count += (adapter.conv_rank or adapter.rank) * sum(kinds_of.get(LARGE, 0) for kinds_of in trained)
    return count


def lora_bytes(config: TrainConfig, table: str) -> int:
    return lora_parameters(config, table) * BYTES[config.output.dtype]


def checkpoint_bytes(config: TrainConfig, table: str) -> int:
    """A resumable checkpoint: the adapter and its two moments in fp32."""
    return lora_parameters(config, table) * 12


def weights(table: str, dtype: str, parts: tuple[str, ...], t5: str = "auto", bits: int = 16) -> float:
    """GiB of the frozen parts; the VAE stays in fp32, T5 has 8 bits where `t5` says so, and `bits` below 16 pack the denoiser and T5."""
    total = 0.0
    for part in parts:
        each = 4 if part == "vae" else 1 if part == "text_3" and t5 == "8bit" else BYTES[dtype]
        if bits < 16 and part in ("unet", "text_3"):
            share = TABLES[table].packed if part == "unet" else PACKED_T5
            each = share * BYTES_PACKED[bits] + (1 - share) * BYTES[dtype]
        total += TABLES[table].parameters[part] * each
    return total / GIB


@dataclass(frozen=True)
class Need:
    """What a run asks for beside its configuration.

    Attributes:
        table: which base; pixels: of the largest bucket; rows: images of the largest batch, on one process; dtype: what the base is cast to.
        cpu: whether it trains in the computer's own memory; t5: whether SD3's T5 is used.
    """

    table: str
    pixels: int
    dtype: str
    rows: int
    cpu: bool = False
    t5: bool = False


@dataclass(frozen=True)
class Choice:
    """How a run keeps within its memory: one of MODES, parts into which a batch is cut, and whether idle models wait on the CPU from the
    start."""

    mode: str
    accumulation: int
    parked: bool = False


def training(config: TrainConfig, need: Need, choice: Choice) -> float:
    """Most GiB that the steps hold, in the GPU or, on a CPU, in the process."""
    t, mode, wide = TABLES[need.table], MODES[choice.mode], need.dtype == "fp32"
    trained = tuple(p for p in t.texts if getattr(config.part, p).train)
    kinds = [k for k in (*config.adapter.targets, *trained) if mode.again != "feed_forward" or k != "feed_forward"]
    row = (t.selective if mode.again == "feed_forward" else t.activations["base"]) + sum(t.activations.get(k, 0) for k in kinds)
    kept = t.checkpointed * (t.wide_checkpointed if wide else 1) if mode.again == "blocks" else row * (t.wide if wide else 1)
    kept *= need.pixels / t.native**2 * -(-need.rows // choice.accumulation)
    held = ("unet", *t.texts, *(("text_3",) if need.t5 else ()), "vae") if need.cpu else ("unet", *trained)
    state = lora_parameters(config, need.table) * BYTES_TRAINED[need.dtype] / GIB
    return (
        weights(need.table, need.dtype, held, config.model.t5, mode.bits) + state + kept + t.overhead + (PROCESS if need.cpu else CONTEXT)
    )


def stages(config: TrainConfig, need: Need, choice: Choice) -> dict[str, float]:
    """Least GiB with which a run gets through each of its stages: `encoding` of images and captions, `training`, and `previews`.

    Where more is free, images are encoded and sample images decoded whole instead of in tiles, and CUDA graphs keep their memory between
    the steps while sample images are made.
    """
    t, bits = TABLES[need.table], MODES[choice.mode].bits
    trained = tuple(p for p in t.texts if getattr(config.part, p).train)
    texts = (*t.texts, *(("text_3",) if need.t5 else ()))
    state = lora_parameters(config, need.table) * BYTES_TRAINED[need.dtype] / GIB
    always = t.overhead + (PROCESS if need.cpu else CONTEXT)

    def held(*parts: str) -> float:
        return weights(need.table, need.dtype, parts, config.model.t5, bits)

    if choice.parked:
        encoding = max(held("vae") + t.vae * ENCODING * min(need.pixels, TILE), *(held(text) for text in texts))
    else:
        encoding = held("unet", *texts, "vae") + t.vae * ENCODING * max(ENCODED_AT_ONCE, need.pixels)
    found = {"encoding": encoding + always, "training": training(config, need, choice)}
    if config.preview.enabled:
        size = (config.preview.width or need.pixels**0.5) * (config.preview.height or need.pixels**0.5)
        decoding = t.vae * DECODING * (max(DECODED_AT_ONCE, size) if need.cpu else size / 9)
        found["previews"] = held("unet", "vae", *(texts if need.cpu else trained)) + decoding + state + always
    return found


def ladder(config: TrainConfig, rows: int) -> list[Choice]:
    """What a run tries one after the other, each in less memory: from `train.memory` (`auto`: all of them) on.

    A batch is cut into single images before the base is packed: that changes nothing of what is learnt.
    """
    given = config.train.accumulation
    names = list(MODES)
    first = 0 if config.train.memory == "auto" else names.index(config.train.memory)
    exact = [Choice(name, given) for name in names[first:3]]
    if config.train.memory not in names[3:] and given < rows:
        exact.append(Choice("checkpointing", rows))
    parts = max(given, rows) if exact else given
    packed = [Choice(name, parts) for name in names[max(3, first) :]]
    if not exact and given < rows:
        packed += [Choice(packed[-1].mode, rows)]
    return exact + packed


def choose(config: TrainConfig, need: Need, free: float) -> Choice:
    """The first choice that fits into `free` GiB, models that are idle being parked, or else the last."""
    choices = ladder(config, need.rows)
    found = next((c for c in choices if peak(config, need, replace(c, parked=True)) <= free), choices[-1])
    return settle(config, need, found, free)


def settle(config: TrainConfig, need: Need, choice: Choice, free: float) -> Choice:
    """`choice` with its models parked from the start, where all of them together are too much for `free` GiB while images are encoded."""
    return replace(choice, parked=MODES[choice.mode].bits < 16 or stages(config, need, choice)["encoding"] > free)


def peak(config: TrainConfig, need: Need, choice: Choice) -> float:
    """GiB that the run takes: the most of all `stages`."""
    return max(stages(config, need, choice).values())


BASES = {  # what people ask about: table -> its name and size of training in words
    "sd1": ("SD 1.5", "512"),
    "sd2": ("SD 2.1", "768"),
    "sdxl": ("SDXL", "1024"),
    "sd35_medium": ("SD 3.5 medium", "1024"),
    "sd35_large": ("SD 3.5 large", "1024"),
}


@dataclass(frozen=True)
class Fit:
    """How a base fits: its name and side in pixels, the mode, GiB of the steps, how many times longer a step takes than in full memory."""

    base: str
    side: str
    mode: str
    gib: float
    cost: float


def fits(free: float) -> list[Fit | None]:
    """For each of BASES how a usual LoRA (rank 16 on attention and feed-forward layers, one image at a time, bf16) trains in `free` GiB; None:
    not at all."""
    found: list[Fit | None] = []
    for table, (base, side) in BASES.items():
        texts = {part: {"train": False} for part in ("text_1", "text_2")}
        usual = {"data": [{"folder": "."}], "adapter": {"rank": 16, "targets": ["attention", "feed_forward"]}, "part": texts}
        config = TrainConfig.model_validate(usual)
        need = Need(table, TABLES[table].native ** 2, "bf16", 1)
        way = choose(config, need, free)
        gib = training(config, need, way)
        cost = dict(zip(MODES, TABLES[table].cost, strict=False)).get(way.mode, 1.0)
        found.append(Fit(base, side, way.mode, round(gib, 1), cost) if gib <= free else None)
    return found


CARDS = (6, 8, 10, 12, 16, 24)
TAKEN = 0.7  # GiB of a card that the system and the screen take, as a rule


def table_of_cards() -> str:
    """A table in Markdown: for each base and card how it trains, in how many GiB, and how much longer a step takes."""
    columns = [fits(card - TAKEN) for card in CARDS]
    lines = ["| base | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
    for k, (base, side) in enumerate(BASES.values()):
        cells = [f"{f.mode}, {f.gib:g} GiB, {f.cost:.1f} x" if (f := column[k]) else "-" for column in columns]
        lines.append(f"| {base}, {side} px | " + " | ".join(cells) + " |")
    return "\n".join(lines)
