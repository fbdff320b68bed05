"""What a captioner said, made into a caption."""

from __future__ import annotations

import re

from trainer.data.captions import parts_of, trigger_first

# How describing models begin: it says nothing, and would be learnt as a part of every caption.
_OPENING = re.compile(
    r"(?:in )?(?:the|this) (?:image|picture|photo|photograph|illustration|drawing|painting)(?:,? (?:we can see|there is|there are)| shows| "
    r"depicts| features| displays| is of| captures| contains)?,? (?=\w)",
    re.IGNORECASE,
)


def bare(text: str) -> str:
    """A description on one line, without the words that it was asked for and without a last sentence that was cut off."""
    text = " ".join(text.replace("\u201c", '"').replace("\u201d", '"').split()).strip('" ')
    found = _OPENING.match(text)
    text = (
        text[found.end() :]
        if found and re.search(r" (see|is|are|shows|depicts|features|displays|of|captures|contains)", found[0])
        else text
    )
    if text and text[-1] not in ".!?)" and (end := max(text.rfind(mark) for mark in (". ", "! ", "? "))) > 0:
        text = text[: end + 1]
    return text


def combined(old: str, new: str, trigger: str, add: bool) -> str:
    """The caption that is kept: what was written, or (`add`) the caption there was with those parts behind it that it lacks; the
    trigger first."""
    if add and old:
        have = {part.casefold() for part in parts_of(old)}
        fresh = [part for part in parts_of(new) if part.casefold() not in have and part.casefold() != trigger.casefold()]
        whole = new.casefold() in old.casefold()  # a sentence that is there already, of which a comma may be a part
        new = old if whole or not fresh else ", ".join([old.rstrip(" .,"), *fresh])
    return trigger_first(new, trigger) if trigger else new
