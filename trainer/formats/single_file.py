"""Load a Stable Diffusion of any family, offline: from a diffusers folder, or from one `.safetensors` file in the original layout.

Weights are read tensor by tensor, cast at once, and copied, so that the file may be moved or replaced later. What a single file
does not hold, configurations and tokenizers, comes from assets/models. Names of the original layouts are converted by diffusers'
own single-file code; `from_single_file` itself would not say which tensors a file lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from trainer import imports
from trainer.formats import FormatError, int8
from trainer.formats.metadata import read_header
from trainer.formats.probe import LDM, TITLES, VAES, Kind, identify, weight_files
from trainer.staging import Stage

CONFIGS = Path(__file__).resolve().parents[2] / "assets" / "models"  # a folder for each family or variant, in diffusers' layout
VOCABULARY = CONFIGS / "sd1" / "tokenizer"
CLIP, CLIP_PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
UNET_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": CLIP}
# family -> component by diffusers' name -> class
COMPONENTS = {
    "sd1": UNET_PARTS,
    "sd2": UNET_PARTS,
    "sdxl": UNET_PARTS | {"text_encoder_2": CLIP_PROJECTED},
    "sd3": {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": CLIP_PROJECTED,
        "text_encoder_2": CLIP_PROJECTED,
        "text_encoder_3": "T5EncoderModel",
    },
}
DENOISERS = ("unet", "transformer")
T5 = "text_encoder_3"
# where a single file has its text encoders
TEXTS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    "sd3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        T5: "text_encoders.t5xxl.transformer.",
    },
}
# SD3's text encoders as files of their own, as ComfyUI names them; of several the first
FILES = {"text_encoder": ("clip_l",), "text_encoder_2": ("clip_g",), T5: ("t5xxl_fp16", "t5xxl_bf16", "t5xxl")}
NAMES = {
    "unet": "the UNet",
    "transformer": "the transformer",
    "vae": "the VAE",
    "text_encoder": "the text encoder",
    "text_encoder_2": "the second text encoder",
    T5: "the T5 text encoder",
}
PARTS = {"text_1": "text_encoder", "text_2": "text_encoder_2"}  # the trainer's name -> diffusers'
LEGACY_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of folders from before diffusers 0.15
WIDE = (".scale_weight", ".weight_scale")  # ends of the keys by which ComfyUI's scaled fp8 weights are multiplied
FP8 = tuple(getattr(torch, n) for n in ("float8_e4m3fn", "float8_e5m2"))
DRAWS = {getattr(nn.init, n) for n in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")}
CPU = torch.device("cpu")
AGAIN = "Download it again or choose another."

Read = Callable[[str], torch.Tensor]


def load_any(
    source: Path,
    dtype: torch.dtype,
    text_encoders: Path | None = None,
    t5: str = "auto",
    device: torch.device = CPU,
    layout: torch.memory_format = torch.preserve_format,
    beside: Executor | None = None,
) -> dict[str, Any]:
    """The components of the base at `source` by diffusers' names, in eval mode, and `notes`, sentences on what was done.

    `unet` or `transformer`, `vae`, `text_encoder`, `text_encoder_2`, `text_encoder_3` and the tokenizers as the family has them, and
    `scheduler`, its configuration as a dict. All models are cast to `dtype`, but the VAE is float32. Nothing is fetched from anywhere.

    Args:
        source: a diffusers folder or a single `.safetensors` file.
        text_encoders: SD3 only: a folder with the encoders that a single file lacks, under ComfyUI's names (`clip_l.safetensors`,
            `clip_g.safetensors`, `t5xxl_*.safetensors`) or in diffusers' layout, and with T5's tokenizer (`tokenizer_3/`, or
            `tokenizer.json` itself). What the source holds counts first.
        t5: `auto`, `skip` or `8bit` (see ModelConfig).
        device: where the models shall be in the end. Weights are read straight into CUDA's memory and cast there; else they are on the CPU.
        layout: of the denoiser's convolutions.
        beside: reads the denoiser's weights; until the future `arriving`, which is then among the components, is done, the denoiser is on
            the meta device. What may be raised here is raised by that future, as far as it is about them.

    Raises FormatError for what is no complete model of a known family.
    """
    source = Path(source)
    kind = _known(source)
    places = _places(source, kind, text_encoders)
    notes: list[str] = []
    if kind.family == "sd3" and (why := _no_t5(source, places, text_encoders, t5)):
        notes.append(why)
        places.pop(T5, None)
    found: dict[str, Any] = {"notes": notes, "scheduler": _json(_configs(source, kind) / "scheduler" / "scheduler_config.json")}
    for name, place in places.items():
        if beside and name in DENOISERS:
            found[name] = _model(place.cls, place.config)
        else:
            own = layout if name in DENOISERS else torch.preserve_format
            found[name] = place.load(torch.float32 if name == "vae" else dtype, name == T5 and t5 == "8bit", device, own)
        if name in FILES:
            words = name.replace("text_encoder", "tokenizer")
            found[words] = _t5_tokenizer(_t5_words(source, text_encoders)) if name == T5 else _tokenizer(source, kind, words)
    if beside:  # after the others, which are used first
        name = next(name for name in DENOISERS if name in places)
        found["arriving"] = beside.submit(_aside, device, partial(places[name].load, dtype, False, device, layout, found[name]))
    return found


def load_vae(source: Path, device: torch.device = CPU) -> torch.nn.Module:
    """The VAE alone of the base at `source`, frozen, as `load_any` has it. Raises FormatError."""
    source = Path(source)
    place = _places(source, _known(source), None)["vae"]
    return place.load(torch.float32, False, device, torch.preserve_format).requires_grad_(False).eval().to(device)


def uses_t5(source: Path, text_encoders: Path | None, t5: str) -> bool:
    """Whether SD3's T5 will be loaded."""
    source = Path(source)
    places = _places(source, _known(source), text_encoders)
    return T5 in places and not _no_t5(source, places, text_encoders, t5)


def blank(source: Path, parts: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The parts `unet` (the denoiser), `text_1` and `text_2` of the base at `source` on the meta device, from configurations alone."""
    source = Path(source)
    kind = _known(source)
    configs = _configs(source, kind)
    names = {p: PARTS.get(p) or next(iter(COMPONENTS[kind.family])) for p in parts}
    return {p: _model(COMPONENTS[kind.family][n], configs / n) for p, n in names.items()}


class Weights:
    """The tensors of one component in one or several `.safetensors` files, without what stands before their names in the file."""

    def __init__(self, files: Sequence[Path], prefix: str | None = "") -> None:
        """`prefix` None: a denoiser that stands in the file without any prefix, so all that is no other component."""
        self.keys: dict[str, tuple[Path, str]] = {}
        for path in files:
            for key in read_header(path)[1]:
                if key.startswith(prefix or "") and not (prefix is None and key.startswith((*VAES, "text_encoders."))):
                    self.keys[key.removeprefix(prefix or "")] = path, key

    def __bool__(self) -> bool:
        return bool(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """read(key): that tensor, mapped from the file; fp8 weights stored with a scale are multiplied by it, and float32."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, "pt")) for path in {path for path, _ in self.keys.values()}}

            def read(key: str) -> torch.Tensor:
                path, full = self.keys[key]
                tensor = files[path].get_tensor(full)
                scale = next((key.removesuffix(".weight") + w for w in WIDE if key.removesuffix(".weight") + w in self), None)
                if tensor.dtype in FP8 and key.endswith(".weight") and scale:
                    return tensor.float() * read(scale).float()
                return tensor

            yield read


@dataclass(frozen=True)
class Place:
    """Where one component of a model comes from.

    Attributes:
        name: its name among diffusers' components; cls: its class there.
        config: the folder of its configuration.
        weights: its tensors.
        original: whether they are named as in the original layout.
        title: the model's, for messages; label: the file's or folder's.
    """

    name: str
    cls: str
    config: Path
    weights: Weights
    original: bool
    title: str
    label: str

    def load(
        self,
        dtype: torch.dtype,
        eight: bool = False,
        device: torch.device = CPU,
        layout: torch.memory_format = torch.preserve_format,
        model: torch.nn.Module | None = None,
    ) -> torch.nn.Module:
        """The model with its weights cast to `dtype`, those of convolutions in `layout`, on a CUDA `device` or the CPU.

        `eight`: its Linear layers in 8 bits, on the CPU. `model`: it, on the meta device, where it has been made already.
        """
        what = f"{self.label}: {NAMES[self.name]}"
        model = _model(self.cls, self.config) if model is None else model
        small = int8.replace_linears(model) if eight else set()
        wanted = model.state_dict()
        try:
            with self.weights.opened() as read:
                stage = Stage(device) if device.type == "cuda" else None

                def cast(key: str, name: str = "") -> torch.Tensor:
                    """T5 overflows in fp16 unless the last layer of each block stays float32 (transformers keeps it so, too)."""
                    kind = torch.float32 if dtype == torch.float16 and self.name == T5 and ".wo." in name else dtype
                    weight = read(key)
                    own = layout if weight.ndim == 4 else torch.preserve_format
                    if stage:  # the GPU changes the type
                        return stage.up(weight).to(kind, memory_format=own)
                    return weight.to(kind, copy=True, memory_format=own)

                state = self._state(model, wanted, read, cast, small)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise FormatError(f"{what} is damaged or lacks a tensor: {error}. {AGAIN}") from error
        for key in (k for k in wanted if k in state and state[k].shape != wanted[k].shape):
            size = f"{key} has the shape {tuple(state[key].shape)}, {self.title} has {tuple(wanted[key].shape)}"
            raise FormatError(f"{what} is of another size: {size}. Choose an ordinary {self.title} model.")
        if missing := [k for k in wanted if k not in state]:
            count = f"{len(missing)} tensors, the first is" if len(missing) > 1 else "the tensor"
            raise FormatError(f"{what} lacks {count} {missing[0]}. {AGAIN}")
        model.load_state_dict({k: state[k] for k in wanted}, assign=True)
        if self.cls == "T5EncoderModel":
            model.encoder.embed_tokens.weight = model.shared.weight
        for module in model.modules():
            if "position_ids" in module._buffers:  # not stored by transformers 5
                module.position_ids = torch.arange(module.position_ids.shape[-1]).expand(1, -1)
        return model.eval()

    def _state(
        self, model: torch.nn.Module, wanted: Mapping[str, torch.Tensor], read: Read, cast: Callable[..., torch.Tensor], small: set[str]
    ) -> dict[str, torch.Tensor]:
        """The tensors under the model's names. `cast`: read(key) as the model has it; takes that key, and the model's name for it."""
        if self.original and self.cls != "T5EncoderModel":
            return self._converted(model, {k: cast(k) for k in self.weights.keys if not k.endswith(WIDE)})
        state: dict[str, torch.Tensor] = {}
        for key in self.weights.keys:
            name = self._own(key, model)
            layer = name.removesuffix(".weight")
            if layer in small:
                state[name], state[f"{layer}.scale"] = int8.quantise(read(key))
            elif name in wanted:
                state[name] = cast(key, name)
        if self.cls == "T5EncoderModel":
            twins = "shared.weight", "encoder.embed_tokens.weight"
            state |= {b: state[a] for a, b in (twins, twins[::-1]) if a in state and b not in state}
        return state

    def _own(self, key: str, model: torch.nn.Module) -> str:
        """The model's name for a key of diffusers or transformers, in any of their versions."""
        if self.name == "vae":
            return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{LEGACY_VAE[m[2]]}.", key)
        if self.cls in (CLIP, CLIP_PROJECTED) and not key.startswith("text_projection"):
            return ("text_model." if hasattr(model, "text_model") else "") + key.removeprefix("text_model.")
        return key

    def _converted(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the original layout, without prefix, under the model's names."""
        from diffusers.loaders import single_file_utils as ldm

        if self.name == "unet":
            return ldm.convert_ldm_unet_checkpoint({LDM + k: t for k, t in tensors.items()}, model.config)
        if self.name == "transformer":
            return ldm.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
        if self.name == "vae":
            return ldm.convert_ldm_vae_checkpoint(tensors, model.config)
        if any(k.startswith("transformer.resblocks.") for k in tensors):
            tensors = ldm.convert_open_clip_checkpoint(model, tensors, prefix="")
        state = {self._own(k, model): t for k, t in tensors.items()}
        if self.cls == CLIP_PROJECTED and "text_projection" in state:
            state["text_projection.weight"] = state.pop("text_projection").T.contiguous()
        if self.cls == CLIP_PROJECTED and self.name == "text_encoder" and "text_projection.weight" not in state:
            # SD3's CLIP-L file has none: its pooled states are used as they are (Stability-AI/sd3-ref, diffusers)
            like = next(iter(state.values()))
            state["text_projection.weight"] = torch.eye(model.config.hidden_size, dtype=like.dtype, device=like.device)
        return state


def _known(source: Path) -> Kind:
    kind = identify(source)
    if kind.kind not in COMPONENTS:
        raise FormatError(f"{source.name} is {kind.what}. Needed here: a complete model of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5.")
    return kind


def _configs(source: Path, kind: Kind) -> Path:
    """The folder with a model's configurations: its own, or one of assets/models."""
    return source if source.is_dir() else CONFIGS / (kind.variant or kind.kind)


def _aside(device: torch.device, load: Callable[[], nn.Module]) -> None:
    """Load a model in a thread. On CUDA it has a stream of its own: copies to the GPU would wait for all that others gave it to compute."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            load()
        stream.synchronize()
    else:
        load().to(device)


@contextmanager
def weightless() -> Iterator[None]:
    """Modules that are made meanwhile are on the meta device, and no number is drawn for them: they are about to get their weights."""
    with torch.device("meta"), _Blank():
        yield


class _Blank(TorchFunctionMode):
    """On the meta device: no number is drawn or counted.

    torch has normal_ and arange in Python there, and imports sympy for them (.5 s).
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange and len(args) == 1 and isinstance(args[0], int) and kwargs.keys() <= {"dtype"}:
            return torch.empty(args[0], dtype=kwargs.get("dtype") or torch.int64, device="meta")
        return func(*args, **kwargs)


def _model(cls: str, config: Path) -> torch.nn.Module:
    """A model on the meta device. Raises FormatError for a configuration that cannot be used."""
    imports.light()
    import diffusers
    import transformers

    try:
        with weightless():
            if hasattr(diffusers, cls):
                kind = getattr(diffusers, cls)
                return kind.from_config(kind.load_config(config, local_files_only=True))
            kind = getattr(transformers, cls)
            return kind(kind.config_class.from_pretrained(config, local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise FormatError(f"{config} has no configuration of a {cls} that can be used: {reason}. {AGAIN}") from error


def _places(source: Path, kind: Kind, text_encoders: Path | None) -> dict[str, Place]:
    """Where each component comes from. T5 may be missing. Raises FormatError where another one is."""
    configs, title = _configs(source, kind), TITLES[kind.variant or kind.kind]
    places = {}
    for name, cls in COMPONENTS[kind.kind].items():
        config, original, label = configs / name, not source.is_dir(), source.name
        weights = _folder(source / name) if source.is_dir() else _part(source, kind, name)
        if not weights and name in FILES and kind.kind == "sd3" and text_encoders:
            extra = Path(text_encoders)
            weights, original, label = _folder(extra / name), False, f"{extra.name}/{name}"
            if weights and (extra / name / "config.json").is_file():
                config = extra / name
            if not weights and (path := _comfy(extra, name)):
                weights, original, label = Weights([path]), True, path.name
        if not weights and name == T5:
            continue
        if not weights and name in FILES and kind.kind == "sd3":
            raise FormatError(
                f"{source.name} has no {FILES[name][0]} text encoder. Set model.text_encoders to a folder with clip_l.safetensors and "
                "clip_g.safetensors (and t5xxl_fp16.safetensors with its tokenizer.json, if T5 is wanted)."
            )
        if not weights:
            raise FormatError(f"{source.name} has no weights of {NAMES[name]} in .safetensors files. {AGAIN}")
        places[name] = Place(name, cls, config, weights, original, title, label)
    return places


def _part(path: Path, kind: Kind, name: str) -> Weights:
    """One component of a single file; empty where it has none."""
    if name in FILES:
        return Weights([path], TEXTS[kind.kind][name])
    if name == "vae":
        return next(filter(None, (Weights([path], prefix) for prefix in VAES)), Weights([]))
    return Weights([path], LDM) or Weights([path], None)


def _folder(folder: Path) -> Weights:
    """One component of a diffusers folder."""
    return Weights([folder / n for n in weight_files(p.name for p in folder.iterdir())] if folder.is_dir() else [])


def _comfy(folder: Path, name: str) -> Path | None:
    """The file of a text encoder under the name that ComfyUI gives it."""
    files = sorted(folder.glob("*.safetensors"))
    return next((p for stem in FILES[name] for p in files if stem in p.name.lower()), None)


def _no_t5(source: Path, places: Mapping[str, Place], text_encoders: Path | None, t5: str) -> str:
    """A sentence on why SD3's T5 is left out, or ""."""
    if t5 == "skip":
        return "T5 is left out, as model.t5 says."
    where = Path(text_encoders or source).name
    if T5 not in places:
        return f"T5 is left out: {where} has no weights of it. Captions are read by the two CLIP encoders."
    if _t5_words(source, text_encoders) is None:
        return (
            "T5 is left out: its tokenizer is not there, and none comes with this program. Put tokenizer.json of the model's tokenizer_3 "
            "folder into a folder and set model.text_encoders to it."
        )
    return ""


def _t5_words(source: Path, text_encoders: Path | None) -> Path | None:
    """The folder with T5's tokenizer."""
    folders = [source / "tokenizer_3"] if source.is_dir() else []
    if text_encoders:
        folders += [Path(text_encoders) / "tokenizer_3", Path(text_encoders)]
    return next((f for f in folders for n in ("tokenizer.json", "spiece.model") if (f / n).is_file()), None)


def _t5_tokenizer(folder: Path) -> Any:
    from transformers import T5Tokenizer

    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise FormatError(
            f"{folder} has no T5 tokenizer that can be read ({str(error).splitlines()[0]}). Give its tokenizer.json."
        ) from error


def _tokenizer(source: Path, kind: Kind, name: str) -> Any:
    """A CLIP tokenizer. All have one vocabulary; OpenCLIP's encoders (SD2's, and SDXL's and SD3's second) are padded with "!", id 0."""
    from transformers import CLIPTokenizer

    def read(folder: Path) -> Any:
        try:
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise FormatError(f"{folder} has no CLIP tokenizer that can be read ({reason}). {AGAIN}") from error

    if source.is_dir():
        own = read(source / name)
        if own.pad_token != "!" or own.get_vocab() != (clip := read(VOCABULARY)).get_vocab():
            return own
    else:
        clip = read(VOCABULARY)
        if kind.kind != "sd2" and name != "tokenizer_2":
            return clip
    clip.pad_token = "!"  # set afterwards: named while loading, "!" in captions would become padding, too
    return clip


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise FormatError(f"{path} is missing or cannot be read. {AGAIN}") from None
