"""Captions: the trigger word in them, and what of a caption one visit sees. Pure text, no files."""

from __future__ import annotations

import random
import re

from trainer.config import DatasetConfig


def contains(caption: str, words: str) -> bool:
    """Whether `words` stand in `caption` as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE) is not None


def with_trigger(caption: str, trigger: str, class_word: str) -> str:
    """`caption` with `trigger` put first where it lacks it; an empty caption becomes `trigger class_word`. All may be empty."""
    if not caption:
        return f"{trigger} {class_word}".strip()
    return caption if not trigger or contains(caption, trigger) else f"{trigger}, {caption}"


def is_random(config: DatasetConfig) -> bool:
    """Whether `draw` may give something else than the caption."""
    return config.shuffle_tags or config.caption_dropout > 0 or config.tag_dropout > 0


def draw(caption: str, trigger: str, config: DatasetConfig, rng: random.Random) -> str:
    """The caption that one visit sees; the caption itself, unchanged and without a draw, where no option is on.

    The parts between commas are held or movable: the first `keep_tags` and those with the trigger are held, they keep
    their place and are never dropped. Empty parts vanish.

    The draws are all `rng.random()`, the one method that Python promises to keep, and are the same whichever options
    are on, so that one option's outcome doesn't hang on another's: one number for caption_dropout, which may end it;
    then one for each movable part for tag_dropout; then one for each movable part, by which they are sorted to shuffle.
    """
    if not is_random(config):
        return caption
    if rng.random() < config.caption_dropout:
        return ""
    if not config.shuffle_tags and not config.tag_dropout:
        return caption
    parts = _parts(caption)
    names = _parts(trigger)
    movable = [i for i, part in enumerate(parts) if i >= config.keep_tags and not any(contains(part, name) for name in names)]
    dropped = {i for i in movable if rng.random() < config.tag_dropout}
    keys = {i: rng.random() for i in movable}
    left = [i for i in movable if i not in dropped]
    order = iter(sorted(left, key=keys.__getitem__) if config.shuffle_tags else left)
    slots = set(left)
    return ", ".join(parts[next(order)] if i in slots else part for i, part in enumerate(parts) if i not in dropped)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
