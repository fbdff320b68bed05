"""Captions: the trigger word in them, and what of a caption one visit sees. Pure text, no files."""

from __future__ import annotations

import random
import re

from trainer.config import DataConfig, DatasetConfig


def contains(caption: str, words: str) -> bool:
    """Whether `words` stand in `caption` as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", caption, re.IGNORECASE) is not None


def parts_of(text: str) -> list[str]:
    """What stands between the commas; empty parts vanish."""
    return [part.strip() for part in text.split(",") if part.strip()]


def without(text: str, tags: str) -> str:
    """`text` less the parts that are one of `tags` (with commas between), in upper or lower case; as it is where none is."""
    gone = {tag.casefold() for tag in parts_of(tags)}
    kept = [part for part in parts_of(text) if part.casefold() not in gone]
    return ", ".join(kept) if len(kept) < len(parts_of(text)) else text


def trigger_first(text: str, trigger: str) -> str:
    """`text`, unless it is empty, with `trigger` at its beginning; a part that is the trigger moves there."""
    if not text or re.match(rf"{re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text
    rest = without(text, trigger)
    if rest == text and contains(text, trigger):  # inside a sentence: it is there, and twice would weigh more
        return text
    return f"{trigger}, {rest}" if rest else trigger


def with_trigger(caption: str, trigger: str, class_word: str) -> str:
    """`caption` with `trigger` put first where it lacks it; an empty caption becomes `trigger class_word`. All may be empty.

    Of several captions, one a line, each is treated so.
    """
    if not caption:
        return f"{trigger} {class_word}".strip()
    return "\n".join(line if not trigger or contains(line, trigger) else f"{trigger}, {line}" for line in caption.split("\n"))


def is_random(config: DatasetConfig, caption: str = "") -> bool:
    """Whether `draw` may give something else at one visit than at another."""
    several = len(_lines(caption)) > 1 or (config.wildcards and _CHOICE.search(caption) is not None)
    return several or config.shuffle_tags or config.caption_dropout > 0 or config.tag_dropout > 0


def draw(caption: str, source: DataConfig, config: DatasetConfig, rng: random.Random) -> str:
    """The caption that one visit sees.

    One of several lines; one of each `{a|b}`, from the innermost out; then what is dropped and shuffled; then the folder's `prefix` and
    `suffix`, unless the whole caption is dropped. The parts between commas are held or movable: the first `keep_tags`, those before
    `keep_separator` and those with the trigger are held, they keep their place and are never dropped. Empty parts vanish.

    The draws are all `rng.random()`, the one method that Python promises to keep, and those of dropping and shuffling are the same
    whichever of these options are on, so that one option's outcome doesn't hang on another's: one number for several lines and one for
    each choice, where there are such; one for caption_dropout, which may end it; then one for each movable part for tag_dropout; then one
    for each movable part, by which they are sorted to shuffle.
    """
    lines = _lines(caption)
    text = lines[int(rng.random() * len(lines))] if len(lines) > 1 else caption
    while config.wildcards and (choice := _CHOICE.search(text)):
        options = choice[1].split("|")
        text = text[: choice.start()] + options[int(rng.random() * len(options))] + text[choice.end() :]
    dropping = config.shuffle_tags or config.tag_dropout > 0
    if (dropping or config.caption_dropout) and rng.random() < config.caption_dropout:
        return ""
    held, mark, rest = text.partition(config.keep_separator) if config.keep_separator else ("", "", text)
    if dropping or mark:
        fixed = parts_of(held)
        text = ", ".join([*fixed, *_shuffled(parts_of(rest), max(0, config.keep_tags - len(fixed)), source.trigger, config, rng, dropping)])
    if source.prefix or source.suffix:
        text = re.sub(r"\s+,", ",", " ".join(f"{source.prefix} {text} {source.suffix}".split()))
    return text


def _lines(caption: str) -> list[str]:
    return [line for line in caption.split("\n") if line]


_CHOICE = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")


def _shuffled(parts: list[str], keep: int, trigger: str, config: DatasetConfig, rng: random.Random, dropping: bool) -> list[str]:
    if not dropping:
        return parts
    names = parts_of(trigger)
    movable = [i for i, part in enumerate(parts) if i >= keep and not any(contains(part, name) for name in names)]
    dropped = {i for i in movable if rng.random() < config.tag_dropout}
    keys = {i: rng.random() for i in movable}
    left = [i for i in movable if i not in dropped]
    order = iter(sorted(left, key=keys.__getitem__) if config.shuffle_tags else left)
    slots = set(left)
    return [parts[next(order)] if i in slots else part for i, part in enumerate(parts) if i not in dropped]


def as_class(caption: str, trigger: str, class_word: str) -> str:
    """What `caption` says of the class instead of the subject: the class word in the trigger's place, once; "" where there is no class word."""
    if not class_word:
        return ""
    if not trigger or not contains(caption, trigger):
        return class_word
    text = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", class_word, caption, flags=re.IGNORECASE)
    twice = rf"(?<!\w){re.escape(class_word)}(?:,?\s+(?:an?\s+|the\s+)?{re.escape(class_word)})+(?!\w)"
    return re.sub(twice, class_word, text, flags=re.IGNORECASE)
