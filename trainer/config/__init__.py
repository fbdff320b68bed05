"""The training configuration: strict, frozen pydantic models, without torch.

Every option of a run stands here once; the command line, the GUI and the presets are views of it. Unknown keys are
refused. `trainer.config.load` reads TOML or JSON, applies a preset and `--set` and gathers all errors in one go.

Paths may start with `~`. Empty strings for optional values mean "not set".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Targets = Literal["attention", "feed_forward", "projections", "convolutions"]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, values: Any) -> Any:
        """TOML has no null: an empty string says "not set" for values that may be so."""
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {k: None if k in optional and v == "" else v for k, v in values.items()}


class MergeConfig(Strict):
    """A LoRA that becomes a part of the frozen base: W + strength * its change."""

    file: Path = Field(description="a plain LoRA or LoCon file for a base of this family")
    strength: float = Field(1.0, ge=-4, le=4, description="how much of its change is added; below 0 takes it away")

    @field_validator("file", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("must be the path of a LoRA file")
        return value


class ModelConfig(Strict):
    """The frozen base."""

    source: str = Field("demo", description="`demo`, a diffusers folder, a `.safetensors` checkpoint, or a hub id like `owner/name`")
    family: Literal["auto", "sd1", "sd2", "sdxl", "sd3"] = Field("auto", description="model family; `auto` reads it from the files")
    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the UNet predicts; `auto` reads it from the files, or measures it where they don't say"
    )
    zero_terminal_snr: bool | None = Field(
        None, description="noise schedule rescaled to pure noise at its end (arXiv:2305.08891); None reads it from the files"
    )
    clip_skip: int = Field(1, ge=1, le=4, description="SD1 only: which layer of the text encoder is used, counted from the end")
    text_encoders: Path | None = Field(
        None, description="SD3 only: folder with clip_l, clip_g and t5xxl for a single file that lacks them, and the T5 tokenizer"
    )
    t5: Literal["auto", "skip", "8bit"] = Field(
        "auto", description="SD3's largest text encoder: used where it is there, left out (zeros in its place), or loaded in 8 bits"
    )
    merge: tuple[MergeConfig, ...] = Field((), description="LoRA files that are merged into the base before training")


class DataConfig(Strict):
    """One folder of images."""

    folder: Path
    kind: Literal["train", "prior", "validation"] = Field(
        "train",
        description="prior: images of the class (regularisation), trained with their own captions and no trigger; validation: held out",
    )
    visits: int | None = Field(None, ge=1, description="how often each image is seen; None takes train.visits")
    weight: float = Field(1.0, gt=0, le=100, description="weight of these images in the loss")
    trigger: str = Field("", description="word put first in every caption that lacks it")
    class_word: str = Field("", description="what it is (`woman`, `dog`): the caption of images without one is `trigger class_word`")
    several_captions: bool = Field(False, description="each line of a caption file is a caption of its own, one is drawn at each visit")
    prefix: str = Field("", description="put before every caption of this folder")
    suffix: str = Field("", description="put behind every caption of this folder")


class DatasetConfig(Strict):
    """How images become latents and captions become prompts."""

    resolution: int | None = Field(None, description="side of a square of the trained area in pixels; None takes the base's own")
    bucket_step: int | None = Field(None, description="sides are multiples of this; None takes 64, or 8 below 256 pixels")
    max_aspect: float = Field(3.0, ge=1, le=8, description="longest side over shortest side of a bucket, at most")
    max_upscale: float = Field(1.5, ge=1, le=8, description="an image enlarged by more than this gets a warning")
    flip: bool = Field(False, description="also train on mirrored images (not for faces or text)")
    background: str = Field("#ffffff", description="colour put behind transparent images, `#rrggbb`")
    shuffle_tags: bool = Field(False, description="shuffle the comma-separated parts of a caption at each visit")
    keep_tags: int = Field(1, ge=0, description="this many leading parts stay in place (and are never dropped)")
    keep_separator: str = Field("", description="parts before this mark (such as `|||`) stay in place, too; the mark itself vanishes")
    wildcards: bool = Field(False, description="{red|blue} in a caption gives one of them at each visit")
    masks: Literal["auto", "alpha", "off"] = Field(
        "auto",
        description="auto: `NAME-masklabel.png` beside an image weighs its loss; alpha: so does transparency where there is none; off: neither",
    )
    unmasked_weight: float = Field(0.1, ge=0, le=1, description="weight of the loss outside of a mask; inside it is 1")
    hold_out: int | None = Field(
        None, ge=0, description="training images that are held out for validation instead; None: 1 in 20 from 20 images on, at most 8"
    )
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of visits with an empty caption")
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="share of the movable parts left out at each visit")
    text_windows: int = Field(
        3, ge=1, le=3, description="captions longer than 75 tokens take up to this many windows of 75; the rest is cut"
    )
    prompt_weights: bool = Field(False, description="(word:1.2) and [word] in captions and sample prompts weigh words as in AUTOMATIC1111")

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError("must be a colour like #ffffff")
        return value

    @field_validator("bucket_step")
    @classmethod
    def _step(cls, value: int | None) -> int | None:
        if value is not None and (value % 8 or not 8 <= value <= 256):
            raise ValueError("must be a multiple of 8 from 8 to 256")
        return value

    @field_validator("resolution")
    @classmethod
    def _size(cls, value: int | None) -> int | None:
        if value is not None and (value % 8 or not 64 <= value <= 2048):
            near = min(2048, max(64, (value + 4) // 8 * 8))
            raise ValueError(f"must be a multiple of 8 from 64 to 2048. Nearest: {near}")
        return value


class BlockConfig(Strict):
    """What a block of layers has for its own; it holds for all of them, 3x3 convolutions too."""

    rank: int | None = Field(None, ge=0, le=1024, description="None: as elsewhere; 0 leaves the block as it is")
    alpha: float | None = Field(None, gt=0, le=4096, description="scale is alpha / rank; None keeps the scale that it has elsewhere")
    rate: float = Field(1.0, ge=0, le=10, description="multiplies the part's learning rate")


class LoraConfig(Strict):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * up @ down.

    LoCon is the same on convolutions, those larger than 1x1 with a rank of their own. `blocks` go by the start of a layer's name: part
    and module path, cut at a dot, such as `unet.mid_block` or `text_1.encoder.layers.0`. Of those that fit the longest holds, alone.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024, description="a layer smaller than this gets a smaller rank")
    alpha: float = Field(16.0, gt=0, le=4096, description="scale is alpha / rank; at alpha = rank it is 1")
    conv_rank: int | None = Field(None, ge=1, le=1024, description="rank of convolutions larger than 1x1 (LoCon); None takes rank")
    conv_alpha: float | None = Field(None, gt=0, le=4096, description="alpha of those; None gives them the scale of all others")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[Targets, ...] = Field(("attention",), min_length=1, description="kinds of layers that get an adapter")
    start: Path | None = Field(
        None, description="a LoRA file from which training starts, its layers with its ranks; None starts from no change"
    )
    blocks: dict[str, BlockConfig] = Field({}, description="ranks and learning-rate weights of blocks of layers, by the block's name")

    @field_validator("start", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("blocks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Take names with and without quotes: in TOML, dots outside of quotes nest."""
        if not isinstance(value, dict):
            return value
        found = _dotted(value, "")
        if "" in found:
            raise ValueError("must hold one table for each block, such as [adapter.blocks.unet.mid_block]")
        return found


def _dotted(node: dict[str, Any], name: str) -> dict[str, Any]:
    """{dotted name: settings} of nested tables; what is no table is a setting of the block that holds it."""
    own = {k: v for k, v in node.items() if not isinstance(v, dict | BlockConfig)}
    out: dict[str, Any] = {name: own} if own else {}
    for key, value in node.items():
        below = f"{name}.{key}" if name else key
        if isinstance(value, BlockConfig):
            out[below] = value
        elif isinstance(value, dict):
            out |= _dotted(value, below) or {below: {}}
    return out


# A union with the discriminator `kind` as soon as there is a second adapter; pydantic refuses a union of one.
AdapterConfig = LoraConfig


class PartConfig(Strict):
    """One trainable part of the base: the UNet or a text encoder."""

    train: bool = True
    learning_rate: float = Field(1e-4, gt=0, le=10, description="peak learning rate (1.0 is usual for Prodigy)")
    stop: float = Field(1.0, gt=0, le=1, description="share of the run after which this part is left as it is")


class TextPartConfig(PartConfig):
    """A text encoder: half the UNet's rate by default."""

    learning_rate: float = Field(5e-5, gt=0, le=10, description="peak learning rate (1.0 is usual for Prodigy)")


class SecondTextPartConfig(TextPartConfig):
    """The larger text encoder: left alone unless asked for."""

    train: bool = False


class PartsConfig(Strict):
    """`unet`: the denoiser (SD3's transformer too); `text_1`: CLIP; `text_2`: SDXL's and SD3's second text encoder."""

    unet: PartConfig = PartConfig()
    text_1: TextPartConfig = TextPartConfig()
    text_2: SecondTextPartConfig = SecondTextPartConfig()


class AdamWConfig(Strict):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused where torch has it."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class AdamW8bitConfig(AdamWConfig):
    """AdamW with 8-bit moments (bitsandbytes, CUDA only). A LoRA's moments are small: it saves a few MB."""

    kind: Literal["adamw8bit"] = "adamw8bit"


class ProdigyConfig(Strict):
    """Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101): finds its own step size; set the learning rates to 1."""

    kind: Literal["prodigy"] = "prodigy"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    d_coef: float = Field(1.0, gt=0, description="multiplies the step size that Prodigy finds")


OptimizerConfig = Annotated[AdamWConfig | AdamW8bitConfig | ProdigyConfig, Field(discriminator="kind")]


class ScheduleConfig(Strict):
    """How the learning rate runs over the steps, as a factor in (0, 1] on each part's own rate."""

    kind: Literal["constant", "linear", "cosine", "cosine_restarts"] = "cosine"
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the run over which the rate rises from 0")
    floor: float = Field(0.1, ge=0, le=1, description="factor at the end of linear and cosine")
    restarts: int = Field(3, ge=1, le=100, description="number of cosine cycles for cosine_restarts")


class LossConfig(Strict):
    """What the loss is. The last four are for flow matching (SD3) alone, min-SNR and the noise offset for the others."""

    prior_weight: float = Field(
        0.0,
        ge=0,
        le=10,
        description="prior preservation without images: weight of keeping what the base says of the class word; 0 switches it off",
    )
    min_snr_gamma: float | None = Field(5.0, gt=0, description="min-SNR weighting (arXiv:2303.09556); None switches it off")
    noise_offset: float = Field(0.0, ge=0, le=1, description="adds this much noise that is constant over each channel of a latent")
    timesteps: Literal["logit_normal", "uniform"] = Field("logit_normal", description="SD3: how timesteps are drawn (arXiv:2403.03206)")
    logit_mean: float = Field(0.0, ge=-3, le=3, description="SD3: above 0 draws more of the noisy timesteps")
    logit_std: float = Field(1.0, gt=0, le=3, description="SD3: spread of the logit-normal distribution")
    shift: float | None = Field(None, gt=0, le=12, description="SD3: timestep shift; None takes the base's own (3)")


class LoopConfig(Strict):
    visits: int = Field(100, ge=1, description="how often each image is seen: the run's only length")
    batch_size: int = Field(1, ge=1, le=1024, description="images of one optimizer step, over all processes")
    accumulation: int = Field(1, ge=1, le=1024, description="parts into which a step's batch is cut to save memory")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; None switches it off")
    memory: Literal["auto", "fast", "selective", "checkpointing", "8bit", "4bit"] = Field(
        "auto",
        description="fast keeps all that the backward pass needs, selective computes the feed-forward layers again, checkpointing whole "
        "blocks; 8bit and 4bit also pack the frozen base, which changes results a little; auto takes the first that fits",
    )
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="what the frozen base is cast to; adapters stay fp32")
    attention: Literal["sdpa", "xformers"] = "sdpa"
    reproducible: bool = Field(False, description="deterministic CUDA kernels: two runs are equal to the last bit, and slower")


class PreviewConfig(Strict):
    every: int | None = Field(
        None,
        ge=0,
        description="make sample images every this many steps; None: eight times over the run, or as often as a tenth of its time allows; "
        "0: only at the start and the end",
    )
    enabled: bool = True
    prompts: tuple[str, ...] = Field((), description="empty: made from the data")
    quality: str = Field("", description="words put before each prompt that is made from the data, such as `masterpiece, best quality`")
    negative: str = ""
    steps: int = Field(20, ge=1, le=200)
    guidance: float = Field(7.0, ge=1, le=30)
    seed: int = Field(1, ge=0, lt=2**32)
    width: int | None = Field(None, ge=64, le=2048, multiple_of=8)
    height: int | None = Field(None, ge=64, le=2048, multiple_of=8)


class ValidationConfig(Strict):
    every: int = Field(50, ge=0, description="measure the loss on fixed noise every this many steps; 0: only at the start and the end")
    enabled: bool = True
    images: int = Field(16, ge=1, description="at most this many images of each kind")
    draws: int = Field(4, ge=1, le=64, description="noise draws (and timesteps) for each image")


class OutputConfig(Strict):
    name: str = Field("lora", description="file name of the LoRA, without ending")
    naming: Literal["kohya", "peft"] = Field(
        "kohya", description="kohya: for A1111, Forge, ComfyUI and all others; peft: for diffusers (of SD3, kohya writes both files)"
    )
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    save_every: int | None = Field(
        None,
        ge=0,
        description="also export the LoRA every this many steps; None: eight files over the run; 0: only at the end; none is deleted",
    )
    checkpoint_every: int = Field(100, ge=0, description="write a resumable checkpoint every this many steps; 0: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="resumable checkpoints that are kept (exported LoRAs are never pruned)")
    thumbnail: bool = Field(False, description="put a small picture of the last sample into the LoRA's metadata")
    sidecars: tuple[Literal["json", "png"], ...] = Field(
        ("json",), description="files beside the LoRA: NAME.json tells web UIs the trigger word, NAME.png shows the last sample"
    )
    title: str = ""
    author: str = ""
    description: str = ""
    license: str = ""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not value.strip() or value != value.strip() or re.search(r'[<>:"/\\|?*\x00-\x1f]', value) or value in (".", ".."):
            raise ValueError('must be a file name without any of < > : " / \\ | ? * and without spaces at its ends')
        return value


class TrainConfig(Strict):
    """Everything that one run is made of. `run_dir/config.json` holds it fully resolved."""

    model: ModelConfig = ModelConfig()
    data: tuple[DataConfig, ...] = Field(min_length=1)
    dataset: DatasetConfig = DatasetConfig()
    adapter: AdapterConfig = LoraConfig()
    part: PartsConfig = PartsConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    train: LoopConfig = LoopConfig()
    preview: PreviewConfig = PreviewConfig()
    validation: ValidationConfig = ValidationConfig()
    output: OutputConfig = OutputConfig()

    @field_validator("optimizer", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        return {"kind": "adamw"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _together(self) -> TrainConfig:
        if not any(d.kind == "train" for d in self.data):
            raise ValueError("no [[data]] folder has kind = train; add one with the images to learn from.")
        trained = [part for _, part in self.part if part.train]
        rates = [p.learning_rate for p in trained]
        if not rates:
            raise ValueError("no part is trained; set part.unet.train or part.text_1.train to true.")
        if all(p.stop < 1 for p in trained):
            raise ValueError("no part is trained to the end of the run; set part.unet.stop or part.text_1.stop to 1.")
        if self.model.prediction == "epsilon" and self.model.zero_terminal_snr:
            raise ValueError("no noise can be told from pure noise: model.zero_terminal_snr needs model.prediction = v_prediction.")
        if self.optimizer.kind == "prodigy" and len(set(rates)) > 1:
            raise ValueError("The learning rates of the trained parts differ; Prodigy needs one rate for all. Set each to 1.")
        if self.optimizer.kind == "prodigy" and any(block.rate not in (0, 1) for block in self.adapter.blocks.values()):
            raise ValueError(
                "The rates of adapter.blocks differ; Prodigy needs one rate for all. Set each to 1, or to 0 to freeze a block."
            )
        return self
