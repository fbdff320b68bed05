"""What captions say: cleaning, bulk edits and token counts. Pure text, no files of a data set."""

from __future__ import annotations

import functools
from typing import Any

from app.errors import Problem
from app.paths import ROOT
from trainer.data.captions import parts_of

LIMIT = 20_000  # letters; no text encoder reads a tenth of it
TOKENIZER = ROOT / "assets" / "models" / "sd1" / "tokenizer"


@functools.cache
def _tokenizer() -> Any:
    """CLIP's own tokenizer, from its vocabulary, without transformers (which would bring torch)."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    files = str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt")
    made = Tokenizer(BPE.from_file(*files, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return made


@functools.lru_cache(maxsize=10_000)
def tokens(text: str) -> int:
    """How many of CLIP's tokens a caption has; the encoder reads 75 at a time."""
    return len(_tokenizer().encode(text).ids) if text else 0


def clean(text: str) -> str:
    """One line with single spaces, as the trainer reads it, that any file can hold. Raises Problem for one that is too long."""
    text = " ".join(text.replace("\0", "").encode("utf-8", "replace").decode().split())
    if len(text) > LIMIT:
        said = f"The caption has {len(text)} letters; at most {LIMIT} are kept, and a model reads about 300. Shorten it."
        raise Problem(said, errors={"caption": said})
    return text


def cut(text: str) -> str:
    return clean(text[:LIMIT])


def replaced(text: str, find: str, new: str) -> str:
    changed = text.replace(find, new)
    if changed != text and not new.strip():  # what is left of a list has no empty parts
        return ", ".join(parts_of(changed)) if "," in changed else changed
    return changed


def joined(first: str, second: str, behind: bool) -> str:
    """Two texts as one: with a comma where the caption is a list of tags or gets something appended, with a space where the
    text itself ends (or, appended, begins) in a space or mark."""
    if not first.strip() or not second.strip():
        return first.strip() or second.strip()
    caption, edge = (first, second[0]) if behind else (second, first[-1])
    if edge in ",.;:)!?" and behind:
        return first.rstrip() + second
    if edge.isspace() or edge in ",.;:!?":
        return f"{first.strip()} {second.strip()}"
    return f"{first}{', ' if behind or caption.count(',') >= 2 else ' '}{second}"
