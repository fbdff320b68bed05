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


class ModelConfig(Strict):
    """The frozen base."""

    source: str = Field("demo", description="`demo`, a diffusers folder, a `.safetensors` checkpoint, or a hub id like `owner/name`")
    family: Literal["auto", "sd1"] = Field("auto", description="model family; `auto` reads it from the files")
    prediction: Literal["auto", "epsilon", "v_prediction"] = Field("auto", description="what the UNet predicts; `auto` reads the scheduler")


class DataConfig(Strict):
    """One folder of images."""

    folder: Path
    kind: Literal["train", "validation"] = "train"
    visits: int | None = Field(None, ge=1, description="how often each image is seen; None takes train.visits")
    weight: float = Field(1.0, gt=0, le=100, description="weight of these images in the loss")
    trigger: str = Field("", description="word put first in every caption that lacks it")
    class_word: str = Field("", description="what it is (`woman`, `dog`): the caption of images without one is `trigger class_word`")


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
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of visits with an empty caption")
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="share of the movable parts left out at each visit")

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


class LoraConfig(Strict):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * up @ down."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024, description="a layer smaller than this gets a smaller rank")
    alpha: float = Field(16.0, gt=0, le=4096, description="scale is alpha / rank; at alpha = rank it is 1")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[Targets, ...] = Field(("attention",), min_length=1, description="kinds of layers that get an adapter")
    start: Path | None = Field(None, description="a LoRA file of this rank from which training starts; None starts from no change")

    @field_validator("start", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value


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


class PartsConfig(Strict):
    unet: PartConfig = PartConfig()
    text_1: TextPartConfig = TextPartConfig()


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
    min_snr_gamma: float | None = Field(5.0, gt=0, description="min-SNR weighting (arXiv:2303.09556); None switches it off")
    noise_offset: float = Field(0.0, ge=0, le=1, description="adds this much noise that is constant over each channel of a latent")


class LoopConfig(Strict):
    visits: int = Field(100, ge=1, description="how often each image is seen: the run's only length")
    batch_size: int = Field(1, ge=1, le=1024, description="images of one optimizer step, over all processes")
    accumulation: int = Field(1, ge=1, le=1024, description="parts into which a step's batch is cut to save memory")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; None switches it off")
    checkpointing: bool = Field(False, description="compute activations again in the backward pass: less memory, slower")
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="what the frozen base is cast to; adapters stay fp32")
    attention: Literal["sdpa", "xformers"] = "sdpa"
    reproducible: bool = Field(False, description="deterministic CUDA kernels: two runs are equal to the last bit, and slower")


class PreviewConfig(Strict):
    every: int | None = Field(
        None, ge=0, description="make sample images every this many steps; None: eight times over the run; 0: only at the start and the end"
    )
    enabled: bool = True
    prompts: tuple[str, ...] = Field((), description="empty: made from the data")
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
    naming: Literal["kohya", "peft"] = Field("kohya", description="kohya: for A1111, Forge, ComfyUI and all others; peft: for diffusers")
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    save_every: int | None = Field(
        None,
        ge=0,
        description="also export the LoRA every this many steps; None: eight files over the run; 0: only at the end; none is deleted",
    )
    checkpoint_every: int = Field(100, ge=0, description="write a resumable checkpoint every this many steps; 0: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="resumable checkpoints that are kept (exported LoRAs are never pruned)")
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
        rates = [p.learning_rate for p in (self.part.unet, self.part.text_1) if p.train]
        if not rates:
            raise ValueError("no part is trained; set part.unet.train or part.text_1.train to true.")
        if all(p.stop < 1 for p in (self.part.unet, self.part.text_1) if p.train):
            raise ValueError("no part is trained to the end of the run; set part.unet.stop or part.text_1.stop to 1.")
        if self.optimizer.kind == "prodigy" and len(set(rates)) > 1:
            raise ValueError("The learning rates of the trained parts differ; Prodigy needs one rate for all. Set each to 1.")
        return self
