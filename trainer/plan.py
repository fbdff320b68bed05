"""The whole run on paper, before any model is loaded: images -> buckets, crops, visits, steps and the captions drawn.

Free of torch, so that `--dry-run` and the GUI show exactly what the trainer will do: the trainer walks this plan.
Every draw is a pure function of (seed, n), see trainer/randomness.py.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from trainer import randomness
from trainer.config import DataConfig, TrainConfig
from trainer.data import captions
from trainer.data.buckets import Placement, place, step_of
from trainer.data.scan import Eyes, Image, scan


@dataclass(frozen=True)
class Row:
    """One image in one step: index into `Plan.images`, mirrored or not, index into `Plan.captions`; `prior`: that of what it says of the
    class (loss.prior_weight), or None."""

    image: int
    flip: bool
    caption: int
    prior: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        images: training images, those of the class (kind prior) last; placements: where each is cropped, in the same order.
        held_out: images of the validation folders, or held out of the training images, with their placements.
        steps: for each optimizer step the rows of its batch, all of one bucket.
        captions: every caption that the steps will draw, once each.
        resolution: side of the trained area's square in pixels.
        warnings: sentences for the user.
    """

    images: tuple[Image, ...]
    placements: tuple[Placement, ...]
    held_out: tuple[Image, ...]
    held_out_placements: tuple[Placement, ...]
    steps: tuple[tuple[Row, ...], ...]
    captions: tuple[str, ...]
    resolution: int
    warnings: tuple[str, ...]

    def bucket(self, image: int) -> tuple[int, int]:
        """(width, height) in pixels of an image's bucket."""
        return self.placements[image].width, self.placements[image].height

    def buckets(self) -> dict[tuple[int, int], int]:
        """Number of training images for each bucket, largest first."""
        return dict(Counter(self.bucket(k) for k in range(len(self.images))).most_common())


def make(config: TrainConfig, native_resolution: int, family: str | None = None, eyes: Eyes | None = None) -> Plan:
    """Scan the folders and lay out the run. `native_resolution` is the base's own side in pixels, `family` its family; `eyes` may know images.

    Raises trainer.data.scan.DataError with every problem of the data at once, and ValueError for a bucket step that does not fit.
    """
    resolution = config.dataset.resolution or native_resolution
    step = step_of(resolution, config.dataset.bucket_step, family)
    found = scan(config.data, eyes=eyes)
    warnings = list(found.warnings)
    kinds = [d.kind for d in config.data]
    groups = {k: [i for i in found.images if kinds[i.source] == k] for k in ("train", "validation", "prior")}
    if config.loss.prior_weight and (lacking := [k + 1 for k, d in enumerate(config.data) if d.kind == "train" and not d.class_word]):
        raise ValueError(
            f"loss.prior_weight is {config.loss.prior_weight:g}, which keeps what the base says of the class word, and data.{lacking[0]} has "
            "none. Set class_word there (`woman`, `dog`), or loss.prior_weight to 0."
        )
    groups["validation"] += _hold_out(config, groups)
    groups["train"] += groups.pop("prior")
    placed = {
        kind: tuple(
            place(
                [(i.width, i.height) for i in images],
                resolution=resolution,
                step=step,
                max_aspect=config.dataset.max_aspect,
                batch_size=config.train.batch_size,
                focus=[i.focus for i in images],
            )
        )
        for kind, images in groups.items()
    }
    images, placements = tuple(groups["train"]), placed["train"]
    small = [(i, p) for i, p in zip(images, placements, strict=True) if p.scale > config.dataset.max_upscale]
    if small:
        worst = max(small, key=lambda pair: pair[1].scale)
        warnings.append(
            f"{len(small)} of {len(images)} images are enlarged by more than {config.dataset.max_upscale:g} times (most: {worst[0].path.name}, "
            f"{worst[0].width}x{worst[0].height}, {worst[1].scale:.1f} times) and will look soft; use larger images or a smaller dataset.resolution."
        )
    twice = [name for name, n in Counter(i.digest for i in images).items() if n > 1]
    if twice:
        same = ", ".join(i.path.name for i in images if i.digest == twice[0])
        warnings.append(f"{len(twice)} images are there more than once (the same file: {same}) and count for more; remove the copies.")
    held = {i.digest for i in groups["validation"]}
    both = [i.path.name for i in images if i.digest in held]
    if both:
        warnings.append(
            f"{len(both)} images are both trained and held out ({both[0]}, ...); the held-out loss will look better than it is."
        )
    rows = _order(config, images, placements)
    known: dict[str, int] = {}
    steps = tuple(_draw(config, n, batch, images, known) for n, batch in enumerate(rows))
    return Plan(images, placements, tuple(groups["validation"]), placed["validation"], steps, tuple(known), resolution, tuple(warnings))


HOLD_OUT_FROM, HOLD_OUT_SHARE, HOLD_OUT_MOST = 20, 1 / 20, 8


def _hold_out(config: TrainConfig, groups: dict[str, list[Image]]) -> list[Image]:
    """Take the images out of `groups["train"]` that are held out instead. Copies of an image that is trained on never are."""
    images, wanted = groups["train"], config.dataset.hold_out
    if wanted is None:
        few = len(images) < HOLD_OUT_FROM or groups["validation"] or not config.validation.enabled
        wanted = 0 if few else min(HOLD_OUT_MOST, round(len(images) * HOLD_OUT_SHARE))
    once = Counter(i.digest for i in images)
    single = sorted((i for i in images if once[i.digest] == 1), key=lambda i: i.digest)
    if (wanted and wanted >= max(2, len(images))) or wanted > len(single):
        raise ValueError(f"dataset.hold_out is {wanted}; {len(images)} images are there, and some must be left to train on. Lower it.")
    chosen = {i.digest for i in randomness.host(config.train.seed, 0, "hold out").sample(single, wanted)}
    groups["train"] = [i for i in images if i.digest not in chosen]
    return [i for i in images if i.digest in chosen]


def visits(config: TrainConfig, source: DataConfig) -> int:
    """How often each image of a folder of kind train is seen, or one of any kind that says it."""
    return source.visits or config.train.visits


def with_visits(config: TrainConfig, visits: int) -> TrainConfig:
    """`config` with another length; folders with visits of their own keep their proportion to the others."""
    scaled = [d.visits and max(1, round(d.visits * visits / config.train.visits)) for d in config.data]
    data = tuple(d.model_copy(update={"visits": v}) for d, v in zip(config.data, scaled, strict=True))
    return config.model_copy(update={"train": config.train.model_copy(update={"visits": visits}), "data": data})


def relaid(laid: Plan, config: TrainConfig, n: int) -> Plan:
    """`laid` as it goes on after `n` steps with the length of `config`, which differs in its visits alone: the steps done, then
    those of the new plan from `n` on. The captions known so far keep their places.

    Raises TooShort when the new plan has no step left.
    """
    if length(laid, config) <= n:
        least = next(v for v in count(1) if length(laid, with_visits(config, v)) > n)
        raise TooShort(f"visits is {config.train.visits}, which {n} steps have used up already; it must be at least {least} now.")
    known = {text: k for k, text in enumerate(laid.captions)}
    rows = _order(config, laid.images, laid.placements)[n:]
    ahead = tuple(_draw(config, k, batch, laid.images, known) for k, batch in enumerate(rows, n))
    return replace(laid, steps=laid.steps[:n] + ahead, captions=tuple(known))


def length(laid: Plan, config: TrainConfig) -> int:
    """The number of steps that `config` gives with the images of `laid`."""
    return sum(
        -(-sum(times.values()) // min(config.train.batch_size, len(times))) for times in _times(config, laid.images, laid.placements)
    )


def pixels(laid: Plan, config: TrainConfig) -> int:
    """How many pixels of images `config` trains on in all with the images of `laid`, each as often as it is seen."""
    seen = _times(config, laid.images, laid.placements)
    return sum(n * laid.placements[k].width * laid.placements[k].height for times in seen for k, n in times.items())


class TooShort(ValueError):
    """A run's new length leaves nothing to do; the text names the shortest that does."""


def _order(config: TrainConfig, images: Sequence[Image], placements: Sequence[Placement]) -> list[list[int]]:
    """Batches of image indices, one for each step.

    In each bucket the images pass by in shuffled rounds, and the stream of rounds is cut into batches, so that only the
    bucket's last batch may be short; a bucket with fewer images than the batch has batches of that size. The buckets'
    batches are then spread evenly over the run.
    """
    placed: list[tuple[float, int, list[int]]] = []
    for b, times in enumerate(_times(config, images, placements)):
        members, longest = list(times), max(times.values())
        stream: list[int] = []
        for turn in range(longest):
            due = [k for k in members if (turn + 1) * times[k] // longest > turn * times[k] // longest]
            randomness.host(config.train.seed, turn, f"order {b}").shuffle(due)
            stream += due
        size = min(config.train.batch_size, len(members))
        batches = [stream[k : k + size] for k in range(0, len(stream), size)]
        jitter = randomness.host(config.train.seed, b, "interleave")
        placed += [((k + jitter.random()) / len(batches), b, batch) for k, batch in enumerate(batches)]
    return [batch for _, _, batch in sorted(placed, key=lambda entry: entry[:2])]


def _times(config: TrainConfig, images: Sequence[Image], placements: Sequence[Placement]) -> Iterator[dict[int, int]]:
    """For each bucket, smallest first: how often each of its images is seen."""
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k, p in enumerate(placements):
        buckets[p.width, p.height].append(k)
    sources = [config.data[i.source] for i in images]
    subject, classes = ([s for s in sources if (s.kind == "prior") == prior] for prior in (False, True))
    even = -(-sum(visits(config, s) for s in subject) // max(1, len(classes)))  # so that the class is seen as often as the subject
    for _, members in sorted(buckets.items()):
        yield {k: even if sources[k].kind == "prior" and not sources[k].visits else visits(config, sources[k]) for k in members}


def _draw(config: TrainConfig, n: int, batch: Sequence[int], images: Sequence[Image], known: dict[str, int]) -> tuple[Row, ...]:
    flips, words = randomness.host(config.train.seed, n, "flip"), randomness.host(config.train.seed, n, "caption")
    rows = []
    for k in batch:
        source = config.data[images[k].source]
        text = captions.draw(images[k].caption, source, config.dataset, words)
        prior = None
        if config.loss.prior_weight and source.kind == "train":
            prior = known.setdefault(captions.as_class(text, source.trigger, source.class_word), len(known))
        rows.append(Row(k, config.dataset.flip and flips.random() < 0.5, known.setdefault(text, len(known)), prior))
    return tuple(rows)


def seen(laid: Plan, config: TrainConfig, step: int) -> list[dict[str, Any]]:
    """What step `step` (the first is 1) really sees, a row for each image of its batch.

    `file` (Path), `caption`, `mirrored`, `crop` (left, top, width, height in shares of the image), `bucket` (pixels), `masked`, `weight` in
    the loss, `prior` (what it says of the class, or None).
    Raises ValueError for a step that the run does not have.
    """
    if not 1 <= step <= len(laid.steps):
        raise ValueError(f"step is {step}; this run has steps 1 to {len(laid.steps)}.")
    rows = []
    for row in laid.steps[step - 1]:
        image, spot = laid.images[row.image], laid.placements[row.image]
        left, top, right, bottom = spot.box
        rows.append({
            "file": image.path,
            "caption": laid.captions[row.caption],
            "mirrored": row.flip,
            "crop": [left / image.width, top / image.height, (right - left) / image.width, (bottom - top) / image.height],
            "bucket": [spot.width, spot.height],
            "masked": image.mask is not None and config.dataset.masks != "off",
            "weight": config.data[image.source].weight,
            "prior": None if row.prior is None else laid.captions[row.prior],
        })  # fmt: skip
    return rows


def preview_prompts(config: TrainConfig, images: Sequence[Image]) -> tuple[str, ...]:
    """The prompts of the sample images: the user's, or four made from the data, each after the words of `preview.quality`.

    A training caption; the trigger in a new place; the trigger in another form; and one without the trigger, which shows
    what the LoRA does to everything else.
    """
    if config.preview.prompts:
        return config.preview.prompts
    quality = config.preview.quality.strip().rstrip(",")
    return tuple(f"{quality}, {text}" if quality else text for text in _made_prompts(config, images))


def _made_prompts(config: TrainConfig, images: Sequence[Image]) -> tuple[str, ...]:
    source = config.data[images[0].source]
    subject = " ".join(w for w in (source.trigger, source.class_word) if w)
    first = max((i.caption for i in images), key=len)
    if not subject:
        others = [i.caption for i in images if i.caption != first]
        return tuple(dict.fromkeys([first, *others[:1], "a photo of a cat", "a house by the sea"]))
    plain = f"{source.class_word} on a beach" if source.class_word else "a house by the sea"
    return first, f"{subject} on a beach", f"a drawing of {subject}", plain


def factor(config: TrainConfig, n: int, total: int) -> float:
    """The learning rate's factor in [0, 1] at step `n` (counted from 0) of `total`.

    A run that was made longer or shorter follows the curve of its new total from then on: one that is trained further after its
    end goes back up to where step `n` stands on the longer curve.
    """
    schedule = config.schedule
    warm = round(schedule.warmup * total)
    if n < warm:
        return (n + 1) / (warm + 1)
    done = (n - warm) / max(1, total - warm)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "linear":
        return 1 - done * (1 - schedule.floor)
    if schedule.kind == "cosine_restarts":
        done = done * schedule.restarts % 1.0
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))


TIMES = 8  # what is done along the way comes so often over a run, its end included
LEAST = 5  # steps between two such times
PREVIEW_SHARE = 0.1  # of a run's time that previews take at most where their interval is None


@dataclass(frozen=True)
class Due:
    """After which steps something is done, the run's start and end left out: `n in due.save`."""

    validation: Container[int]
    preview: Container[int]
    save: Container[int]
    checkpoint: Container[int]


def due(config: TrainConfig, total: int) -> Due:
    """When a run of `total` steps stops to look and to save.

    An interval of None means eight evenly spread times, the end being the eighth; fewer in a run of less than 40 steps.
    """

    def times(every: int | None) -> Sequence[int]:
        if every is None:
            n = min(TIMES, total // LEAST)
            return tuple(round(k * total / n) for k in range(1, n))
        return range(every, total, every) if every else ()

    return Due(
        validation=times(config.validation.every) if config.validation.enabled else (),
        preview=times(config.preview.every) if config.preview.enabled else (),
        save=times(config.output.save_every),
        checkpoint=times(config.output.checkpoint_every),
    )


def spares(spent: float, cost: float, each: float, step: int, total: int) -> bool:
    """Whether a run of `total` steps can spare the time for a preview after `step` of them.

    `spent`: seconds that previews along the way took so far; `cost`: of the last one; `each`: of a step without them. All of a run's
    previews together take PREVIEW_SHARE of its time at most, spread evenly; only those of its start and end are made in any case.
    """
    whole = PREVIEW_SHARE / (1 - PREVIEW_SHARE) * each * total
    return spent + cost <= min((whole - cost) * step / total, whole - 2 * cost)


PARTS = {"unet": "UNet", "text_1": "text encoder", "text_2": "second text encoder"}
DENOISERS = {"sd3": "transformer"}  # what the part `unet` is where it is none


def describe_schedule(config: TrainConfig, family: str | None = None) -> str:
    """The learning rates over the run in words, such as `cosine from 1e-4 to 10 % after 2 % warm-up`."""
    schedule = config.schedule
    names = PARTS | {"unet": DENOISERS.get(family or "", PARTS["unet"])}
    rates = {
        names[name]: _rate(part.learning_rate) + (f" until {part.stop * 100:g} % of the run" if part.stop < 1 else "")
        for name, part in config.part
        if part.train
    }
    alike = len(set(rates.values())) == 1
    said = next(iter(rates.values())) if alike else ", ".join(f"{rate} ({name})" for name, rate in rates.items())
    floor = f"{schedule.floor * 100:g} %"
    text = {
        "constant": f"constant at {said}",
        "linear": f"linear from {said} to {floor}",
        "cosine": f"cosine from {said} to {floor}",
        "cosine_restarts": f"{schedule.restarts} cosine cycles from {said} to {floor}",
    }[schedule.kind]
    return text + (f" after {schedule.warmup * 100:g} % warm-up" if schedule.warmup else "")


def _rate(value: float) -> str:
    """1e-4 for 0.0001, 0.5 for 0.5."""
    if value >= 0.01:
        return f"{value:g}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def stop_step(stop: float, total: int) -> int:
    """The first step that no longer trains a part whose share of the run is `stop`."""
    return total if stop >= 1 else max(1, round(stop * total))
