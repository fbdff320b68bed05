"""What is worth mending in a data set before training, the most important first, each with its remedy. Pure arithmetic, no files.

A card's badges (app/pictures.py) say what is odd about one picture; here the same is said once for all pictures that have it, together with
what shows only in all of them: how many, how alike, and what their captions have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app import caption_texts, pictures
from trainer.data.captions import contains

FEW = 8
MANY = {"character": 100, "object": 100, "style": 300}  # above, the same result is had from fewer pictures in less time
WINDOW = 75  # tokens that CLIP reads at once

# Two backgrounds are alike where the 20 of 8 x 8 colours along the top and the sides differ by less than BACKGROUND of 255 on average;
# pictures of one wall differ by 2 to 12, of different places by 30 and more. Two compositions are alike where their 64-bit difference
# hashes differ in less than POSE bits: those of unrelated pictures differ in 24 to 40, of one pose 0 to 14.
BACKGROUND, POSE, LEAST, SHARE = 14, 15, 6, 0.75


@dataclass(frozen=True)
class Other:
    """Another set of the same training: what it is called, its trigger word, and its captions."""

    name: str
    trigger: str
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """What the pictures are for. `style`: the captions that the model was trained on, tags | sentences | "" (not known, or either);
    `windows`: how often CLIP's 75 tokens of a caption are read at most; `alike`: names of images that a captioner can hardly tell apart."""

    purpose: str = "character"
    trigger: str = ""
    class_word: str = ""
    style: str = ""
    windows: int = 3
    others: tuple[Other, ...] = ()
    alike: frozenset[str] = frozenset()


Item = dict[str, Any]  # an IMAGE of assets/help/api.md
Rule = Callable[[Sequence[Item], Mapping[str, pictures.Look], About], Iterator[dict[str, Any]]]


def advise(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> list[dict[str, Any]]:
    """[{"kind", "text", "images": ids, "remedy"}], the most important first, for the active ones of `images`.

    `looks`: what was seen of a picture, by its id; those that do not decode have none. `remedy`: None, or {"label", "do"} with do = remove
    ("ids"), trigger_first, or go ("place": where on the page it is mended).
    """
    there = [i for i in images if not i["removed"]]
    return [said for rule in RULES for said in rule(there, looks, about)] if there else []


def _say(kind: str, text: str, images: Sequence[Item] = (), remedy: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"kind": kind, "text": text, "images": [i["id"] for i in images], "remedy": remedy}


def _go(label: str, place: str) -> dict[str, Any]:
    return {"label": label, "do": "go", "place": place}


def _of(n: int, total: int) -> str:
    return f"All {n} images" if n == total else f"{n} of {total} images"


# ---- how many; also said before Start (app/preflight.py) -----------------------------------------------------------------------


def number(n: int, purpose: str) -> tuple[str, str] | None:
    """("few" | "many", a sentence) on the number of pictures, None where it is fine."""
    if 0 < n < FEW:
        return "few", f"Only {n} image{'s' if n > 1 else ''}: the LoRA will know little but these. 10 to 20 are better."
    if n > MANY[purpose]:
        return (
            "many",
            f"{n} images: {'50 to 200' if purpose == 'style' else '10 to 20'} good ones are often as good, and {n} take longer. Lower the "
            "visits if you keep them all.",
        )
    return None


def uncaptioned(missing: int, total: int, trigger: str, class_word: str) -> str:
    """A sentence on the pictures without a caption, "" where there are none."""
    if not missing:
        return ""
    few = missing < total
    of, verb = (f"{missing} of {total} images", "have no caption") if few else (f"None of the {total} images", "has a caption")
    if subject := " ".join(w for w in (trigger, class_word) if w):
        said = f"{of} {verb} and will be called “{subject}”." if few else f"{of} {verb}; all will be called “{subject}”."
        return f"{said} Captions that say what else is there give a LoRA that can be steered."
    return f"{of} {verb}, and there is no trigger or class word to stand in. Write captions, or let them be written."


def _few(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    found = number(len(images), about.purpose)
    if found and found[0] == "few":
        yield _say(*found, remedy=_go("Add more images", "images"))


def _many(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    found = number(len(images), about.purpose)
    if found and found[0] == "many":
        yield _say(*found, remedy=_go("Set the visits", "train.visits"))


# ---- what single pictures have, once for all of them ------------------------------------------------------------------------------


def _duplicates(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    seen = [i for i in images if i["id"] in looks]
    groups = [[seen[k] for k in group] for group in pictures.twins([looks[i["id"]] for i in seen])]
    if not groups:
        return
    best = [max(group, key=lambda i: (i["width"] * i["height"], i["has_caption"])) for group in groups]
    copies = [i for group, kept in zip(groups, best, strict=True) for i in group if i is not kept]
    names = ", ".join(f"{i['name']}" for i in groups[0][:4]) + (" and more" if len(groups) > 1 or len(groups[0]) > 4 else "")
    n = len(copies)
    text = (
        f"{n} image{' is' if n == 1 else 's are'} nearly the same as {'another' if n == 1 else 'others'} ({names}), which then count more."
    )
    label = "Remove the copy" if n == 1 else f"Remove the {n} copies"
    shown = [i for group in groups for i in group]
    remedy = {"label": label, "do": "remove", "ids": [i["id"] for i in copies]}
    yield _say("duplicate", f"{text} The largest of each is worth keeping.", shown, remedy)


BADGES = {  # kind: what is said where several have it, and the remedy
    "small": (
        "{of} have too few pixels for the size that is trained and look soft when enlarged. Use larger versions, or a lower resolution.",
        _go("Set the resolution", "dataset.resolution"),
    ),
    "blurred": ("{of} look blurred, and the LoRA learns that too. Use sharper pictures, unless the blur is meant.", None),
    "bars": ("{of} have plain bars along two sides, which the LoRA learns too. Cut them off.", None),
    "long": ("{of} are longer than is trained: much of them is cut off. Crop them to the part that matters.", None),
    "crop": ("{of} lose more than a tenth to fit their shape. Look whether what matters is cut.", None),
}


def _badge(kind: str) -> Rule:
    def rule(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
        has = [(i, b["text"]) for i in images for b in i["badges"] if b["kind"] == kind]
        if kind == "crop":  # of a long one that is said already
            has = [(i, text) for i, text in has if all(b["kind"] != "long" for b in i["badges"])]
        text, remedy = BADGES[kind]
        if has:
            said = f"{has[0][0]['name']}: {has[0][1]}" if len(has) == 1 else text.format(of=_of(len(has), len(images)))
            yield _say(kind, said, [i for i, _ in has], remedy)

    return rule


# ---- captions -------------------------------------------------------------------------------------------------------------------


def _other_triggers(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    for other in about.others:
        if other.trigger and other.trigger.casefold() != about.trigger.casefold():
            wrong = [i for i in images if contains(i["caption"], other.trigger)]
            if wrong:
                says = "say" if len(wrong) > 1 else "says"
                text = (
                    f"{len(wrong)} caption{'s' if len(wrong) > 1 else ''} here {says} “{other.trigger}”, the trigger word of {other.name}."
                )
                yield _say("other_trigger", f"{text} Take it out, so that the two stay apart.", wrong, _go("Change captions", "captions"))
        if about.trigger and other.trigger.casefold() != about.trigger.casefold():
            n = sum(contains(text, about.trigger) for text in other.captions)
            if n:
                text = f"{n} caption{'s' if n > 1 else ''} of {other.name} say{'' if n > 1 else 's'} “{about.trigger}”, the trigger word of"
                yield _say("other_trigger", f"{text} the images here. Take it out there, so that the two stay apart.")


def _missing(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    without = [i for i in images if not i["has_caption"]]
    if said := uncaptioned(len(without), len(images), about.trigger, about.class_word):
        yield _say("missing", said, without, _go("Write captions", "captions"))


def _trigger(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    texts = [i for i in images if i["has_caption"]]
    lacking = [i for i in texts if not contains(i["caption"], about.trigger)] if about.trigger else []
    if lacking and len(lacking) < len(texts):
        n, last = len(texts) - len(lacking), len(lacking)
        text = f"“{about.trigger}” stands in {n} of {len(texts)} captions; training puts it before the other{'s' if last > 1 else ''}."
        remedy = {"label": "Put the trigger first", "do": "trigger_first"}
        yield _say("trigger", f"{text} Put it first in all, so that what you read is what is trained.", lacking, remedy)


def _identical(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for image in images:
        if image["has_caption"]:
            groups[image["caption"].casefold()].append(image)
    same = [i for group in groups.values() if len(group) > 2 for i in group]
    if same:
        most = max(groups.values(), key=len)[0]["caption"]
        quoted = most if len(most) <= 60 else f"{most[:59]}…"
        text = f"{_of(len(same), len(images))} share their caption with others (“{quoted}”). What differs between them stays unnamed, and"
        yield _say("identical", f"{text} cannot be steered later.", same, _go("Change captions", "captions"))


def _style(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    texts = [i for i in images if i["has_caption"]]
    wrong = [i for i in texts if about.style and (kind := kind_of(i["caption"])) and kind != about.style]
    if len(wrong) > 2 and 2 * len(wrong) > len(texts):
        of = f"{'All' if len(wrong) == len(texts) else len(wrong)} captions are"
        text = (
            f"{of} sentences, and this model was trained on tags (“1girl, smile, red dress”). Tags are understood better."
            if about.style == "tags"
            else f"{of} lists of tags, and this model was trained on sentences (“a woman in a red dress smiles”). They are understood better."
        )
        yield _say("style", text, wrong, _go("Change captions", "captions"))


def kind_of(caption: str) -> str:
    """Whether a caption is "tags" or "sentences", "" where it could be either."""
    parts, words = caption_texts.parts_of(caption), len(caption.split())
    if len(parts) > 2 and words <= 3 * len(parts):
        return "tags"
    return "sentences" if words > 5 and words >= 5 * len(parts) else ""


def _long_captions(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    limit = WINDOW * about.windows
    if long := [i for i in images if i["tokens"] > limit]:
        n, most = len(long), max(i["tokens"] for i in long)
        text = f"{n} caption{'s have' if n > 1 else ' has'} more than {limit} tokens (most: {most}); what comes after is cut off. Shorten them."
        yield _say("tokens", text, long, _go("Change captions", "captions"))


# ---- how alike ------------------------------------------------------------------------------------------------------------------


def _background(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    seen = _different(images, looks)
    if about.purpose == "style" or len(seen) < LEAST:
        return
    colours = np.stack([np.frombuffer(looks[i["id"]].colours, np.uint8).reshape(8, 8, 3) for i in seen]).astype(np.float32)
    edge = np.concatenate([colours[:, 0], colours[:, 1:7, 0], colours[:, 1:7, 7]], axis=1)  # the subject often stands on the lower one
    away = np.abs(edge - np.median(edge, axis=0)).mean(axis=(1, 2))
    alike = [i for i, d in zip(seen, away, strict=True) if d < BACKGROUND and "background" not in i["caption"].lower()]
    if len(alike) >= SHARE * len(seen):
        text = f"{_of(len(alike), len(images))} have nearly the same background, which becomes part of what is learned. Add pictures in"
        yield _say("background", f"{text} other places, or name the background in the captions.", alike, _go("Change captions", "captions"))


def _pose(images: Sequence[Item], looks: Mapping[str, pictures.Look], about: About) -> Iterator[dict[str, Any]]:
    seen = _different(images, looks)
    if len(seen) < LEAST:
        return
    hashes = np.array([looks[i["id"]].hash for i in seen], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    near = apart[(apart < POSE).sum(axis=1).argmax()] < POSE
    if near.sum() >= SHARE * len(seen):
        alike = [i for i, yes in zip(seen, near, strict=True) if yes]
        text = f"{_of(len(alike), len(images))} are built nearly alike: the same pose or view. Add others, from other sides and distances,"
        yield _say("pose", f"{text} or the LoRA can draw little else.", alike)
        return
    alike = [i for i in seen if i["name"] in about.alike]
    if len(alike) >= SHARE * len(seen):
        text = (
            f"{_of(len(alike), len(images))} are nearly the same to the model that captioned them: one differs from another less than from"
        )
        yield _say("variety", f"{text} its own middle. Add pictures with other places, poses, light and distances.", alike)


def _different(images: Sequence[Item], looks: Mapping[str, pictures.Look]) -> list[Item]:
    """The images without the near copies of others, which are told of themselves."""
    seen = [i for i in images if i["id"] in looks]
    copies = {k for group in pictures.twins([looks[i["id"]] for i in seen]) for k in group[1:]}
    return [i for k, i in enumerate(seen) if k not in copies]


RULES: tuple[Rule, ...] = (
    _few, _duplicates, _other_triggers, _badge("small"), _badge("blurred"), _badge("bars"), _missing, _trigger, _identical, _style,
    _long_captions, _background, _pose, _badge("long"), _badge("crop"), _many,
)  # fmt: skip
