"""Where a base comes from: `demo`, a diffusers folder, a single `.safetensors` file, or a hub id.

Nothing is downloaded but a hub id that the user named, and its size and licence are said first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from trainer.config.load import ROOT
from trainer.formats.probe import identify

DEMO = ROOT / "assets" / "demo" / "base"
FAMILIES = ("sd1",)


class SourceError(ValueError):
    """The named base cannot be used; the text says why and what to do."""


def resolve(source: str, say: Callable[[str], None]) -> Path:
    """The local folder or file of a base. Raises SourceError; `say` gets a sentence before a download begins."""
    text = source.strip().strip("\"'")
    if text == "demo":
        return DEMO
    path = Path(text).expanduser()
    if path.exists():
        return path.resolve()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and path.suffix != ".safetensors" and not text.startswith("."):
        return _download(text, say)
    raise SourceError(
        f"model.source is {source!r}, and there is no such file or folder. Give a diffusers folder, a .safetensors checkpoint, "
        "a hub id like owner/name, or demo."
    )


def family_of(path: Path, wanted: str) -> str:
    """The family's name, read from the files. Raises SourceError for what is no base or of a family not supported."""
    found = identify(path)
    if found.kind not in FAMILIES:
        raise SourceError(f"model.source is {path}, which is {found.what}. Choose a Stable Diffusion 1.x base model.")
    if wanted not in ("auto", found.kind):
        raise SourceError(f"model.family is {wanted!r}, but {path} is {found.kind}. Set model.family to auto.")
    return found.kind


def _download(repo: str, say: Callable[[str], None]) -> Path:
    """Fetch a model of the hub into its cache, with the hub's progress bars; files already there are not fetched again."""
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    offline = f"The hub cannot be reached, so {repo} cannot be downloaded. Check the network, or give the path of a model on this machine."
    kinds = ("model_index.json", "unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        files = [
            f for f in info.siblings or [] if f.rfilename.startswith(kinds) and f.rfilename.endswith((".safetensors", ".json", ".txt"))
        ]
        if not any(f.rfilename == "model_index.json" for f in files):
            raise SourceError(
                f"model.source is {repo!r}, a hub repository without model_index.json. Choose one in diffusers format, or download a "
                ".safetensors checkpoint and give its path."
            )
        half = {f.rfilename for f in files if ".fp16." in f.rfilename}
        variant = "fp16" if any(name.startswith("unet/") for name in half) else None
        wanted = [f for f in files if f.rfilename.endswith((".json", ".txt")) or (f.rfilename in half) == (variant is not None)]
        size = sum(f.size or 0 for f in wanted if ".non_ema." not in f.rfilename) / 1e9
        licence = (info.card_data.get("license") if info.card_data else None) or "none stated"
        say(f"Downloading {repo} from huggingface.co: about {size:.1f} GB, licence: {licence}.")
        return Path(
            StableDiffusionPipeline.download(repo, variant=variant, use_safetensors=True, safety_checker=None, feature_extractor=None)
        )
    except GatedRepoError:
        raise SourceError(f"{repo} asks you to accept its terms: open huggingface.co/{repo}, accept, then run `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"model.source is {repo!r}: there is no such folder here and no such model on the hub (or it is private)."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{offline} ({type(error).__name__})") from None
