"""`python -m trainer compare RUN_DIR`: what a run's exported LoRAs do, measured and in pictures, as a job in RUN_DIR/results/.

The job's folder follows the protocol of a run's (trainer/job.py). Beside it stand the pictures and results.json:

    pair         {prompt, without, with, file, step}: file names of two pictures from one seed
    matrix       {prompts, strengths, rows: [{file, step, cells: [[picture per strength] per prompt]}]}
    scores       [{file, step, gain, drift}], by step
    recommended  {file, step, why}
    hints        [sentences]
    measured     what the hints rest on: {gain_at: {strength: gain}, drift_at: {strength: drift}, file}, of the last file

results.json is replaced as a whole when each part is there, so that a page fills while the job works.

Events besides the frame's: `stage` (name: loading | measuring | drawing), `started` (name, total, device, dtype, reasons),
`scored` and `picture` (done, total, file; scored also step, gain, drift), `warning` (text).

## What is measured

gain    1 - loss / loss of the base alone: of the fixed-noise loss (trainer/validation.py) on held-out images where there are some,
        else on training images. 0: nothing learnt; 1 can't be reached, since noise can't be told in full.
drift   how far prompts without the trigger move: the mean square of (prediction with the LoRA - prediction of the base) on fixed
        noise over pictures that the base itself made of GENERIC prompts, divided by the mean square of (the base's prediction with
        the prompt - without any). At 1 the LoRA pushes these pictures as hard as their own prompt does.

## Where the thresholds come from

Trainings of the demo base on one H200: owl, zorp and sunset (a style), each under-trained (a quarter of the length), of the right length
(preset sd1/demo), over-trained (2 and 4 times as long, constant rate), and owl and zorp on pictures of one pose ("same"); two seeds each:
tests/trainer/compare_calibration.json has every file's figures. For the subjects the judge is the demo's classifier, for sunset the colours
at the top and bottom of a picture; neither knows gain or drift. `right`: share of 24 bare nouns ("a cat") that still show their own subject
(0.96 for the base alone); `shown`: share of the concept's prompts that show it. Of the last files (gain on training images), both seeds, and
`more`, what is learnt at strength 1.3 by that at 1.0:

    run                gain       drift        more         right        shown
    zorp, under-trained 0.79 0.76   6.8  6.0   0.95 0.98    0.92 1.00    0.06 0.00
    zorp, right length  0.92 0.92  22.5 24.8   0.86 0.87    0.71 0.75    1.00 1.00
    zorp, over-trained  0.97 0.97  78.0 72.7   0.82 0.82    0.38 0.46    1.00 1.00
    owl, under-trained  0.83 0.83   6.2  6.7   0.98 0.99    1.00 1.00    0.38 0.50
    owl, right length   0.94 0.94  25.7 31.1   0.88 0.92    0.88 0.88    1.00 1.00
    owl, over-trained   0.97 0.98  48.7 55.2   0.85 0.85    0.58 0.58    1.00 1.00

DRIFT_LIMIT: zorp files up to 15 have right >= 0.79. SPILLS: no run of the right length ends above 40.5, no over-trained one below 44.9.
STRONGER_IS_AS_GOOD: the six under-trained have `more` >= 0.949, all others <= 0.916, on training and on held-out images alike; leaving out
each run in turn, the middle of the gap is right on all 28. WEAKER_IS_BETTER says what its hint says and was not fitted.
There is no hint on poses or on backgrounds of training images: likeness of the pictures to each other never told the runs on one pose from
the others (leaving out each run in turn, at least 2 of 20 wrong), nor likeness of their borders to the training images' the over-trained from
the rest (at least 3 of 16 wrong). Nothing was measured on SD1.5 yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import events, plan, randomness
from trainer.config import TrainConfig
from trainer.data.captions import contains
from trainer.data.scan import Known
from trainer.job import Job, Show, work
from trainer.run_dir import RunDir, RunError, replace, write_json

if TYPE_CHECKING:
    from trainer.generate import Studio

STRENGTHS = (0.6, 0.8, 1.0)
ROWS = 6  # checkpoints in the matrix
SCORED = 12  # files that get scores, evenly chosen where there are more
GENERIC = (
    "a cat on the grass",
    "a red car on a road",
    "a house by the sea",
    "a tree in the snow",
    "a blue fish on a white background",
    "a brown bear at night",
    "a big yellow star",
    "a bowl of fruit on a table",
)
NINE_TENTHS = 0.9
DRIFT_LIMIT = 15.0
SPILLS = 42.0
WEAKER_IS_BETTER = 1.02
STRONGER_IS_AS_GOOD = 0.935
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "on",
        "in",
        "at",
        "by",
        "with",
        "and",
        "or",
        "to",
        "from",
        "is",
        "are",
        "it",
        "its",
        "his",
        "her",
        "their",
        "this",
        "that",
    ]
)


def compare(root: Path, *, device: str = "auto", show: Show = lambda event: None) -> str:
    """Measure and draw what the LoRAs of the run in `root` do, into `root`/results; returns "finished" or "stopped".

    Raises ValueError with a sentence for what the user can mend.
    """
    run = RunDir(root)
    if not run.config.exists():
        raise RunError(f"There is no run in {run.root}: config.json is missing. Give the folder of a run.")
    return work(
        run.root / "results", {"job": "compare", "run": str(run.root), "device": device}, lambda job: _compare(job, run, device), show
    )


def _compare(job: Job, run: RunDir, device: str) -> dict[str, Any]:
    job.emit("stage", name="loading")
    try:
        config = TrainConfig.model_validate_json(run.config.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{run.config} cannot be read as this version's settings. Compare by hand: python -m trainer generate.") from None
    files = exported(run)
    if not files:
        raise RunError(f"The run in {run.root} has exported no LoRA yet. Let it finish, or save one while it runs.")

    from trainer.generate import Studio

    def say(text: str) -> None:
        job.emit("stage", name="loading", text=text)

    model = config.model
    studio: Studio = job.wait(lambda: Studio(model.source, device=device, say=say, model=model))
    studio.models.windows, studio.models.weighted = config.dataset.text_windows, config.dataset.prompt_weights
    laid = plan.make(config, studio.native, studio.family.name, eyes=Known(run.images))
    prompts, plain = choose_prompts(config, laid)
    scored, shown = spread(files, SCORED), spread(files, ROWS)
    total = len(scored) + 2 + 2 + len(shown) * len(prompts) * len(STRENGTHS)  # two more measures of the last file; two pictures
    hardware = studio.hardware
    start = {"name": config.output.name, "total": total, "device": hardware.name, "dtype": hardware.dtype}
    job.emit("started", **start, reasons=list(hardware.reasons))
    done = 0

    def count(kind: str, **fields: Any) -> None:
        nonlocal done
        done += 1
        job.emit(kind, done=done, total=total, **fields)
        job.check()

    # 1. scores
    job.emit("stage", name="measuring")
    measure = Measure(studio, config, laid, plain, job.check)
    found: dict[str, Any] = {"pair": None, "matrix": None, "scores": [], "recommended": None, "hints": []}

    def keep() -> None:
        write_json(job.run.root / "results.json", found)

    for step, path in scored:
        studio.wear(path)
        gain, drift = measure.gain(), measure.drift()
        found["scores"].append({"file": path.name, "step": step, "gain": round(gain, 4), "drift": round(drift, 4)})
        count("scored", **found["scores"][-1])
    has_trigger = bool(told_words(config, laid))
    best = found["recommended"] = recommend(found["scores"], has_trigger)
    last_step, last = scored[-1]
    measured: dict[str, Any] = {
        "file": last.name,
        "gain_at": {"1.0": found["scores"][-1]["gain"]},
        "drift_at": {"1.0": found["scores"][-1]["drift"]},
    }
    for strength in (0.6, 1.3):
        studio.wear(last, strength)
        measured["gain_at"][f"{strength}"] = round(measure.gain(), 4)
        measured["drift_at"][f"{strength}"] = round(measure.drift(), 4)
        count("scored", file=last.name, step=last_step, strength=strength)
    found["measured"] = measured
    found["hints"] = hints(measured, has_trigger=has_trigger)

    # 2. pictures
    job.emit("stage", name="drawing")
    drawn: set[str] = set()
    size = picture_size(config, laid)
    look = {"negative": config.preview.negative, "steps": config.preview.steps, "guidance": config.preview.guidance}

    def draw(which: Sequence[int], names: Sequence[str]) -> None:
        """Pictures of the prompts `which`, as the studio stands, saved as `names`."""
        seeds = [config.preview.seed + k for k in which]
        for name, image in zip(names, studio.sample([prompts[k] for k in which], seeds, size=size, tick=job.check, **look), strict=True):
            save(image, job.run.root / name)
            drawn.add(name)
            count("picture", file=name)

    studio.wear(None)
    first = min(1, len(prompts) - 1)  # the trigger in a new place: what was learnt, not what was seen
    draw([first], ["without.png"])
    chosen = next(path for _, path in files if path.name == best["file"])
    studio.wear(chosen)
    draw([first], ["with.png"])
    pair = {"prompt": prompts[first], "without": "without.png", "with": "with.png", "file": best["file"], "step": best["step"]}
    found["pair"] = pair
    keep()
    rows: list[dict[str, Any]] = []
    for step, path in shown:
        cells: list[list[str]] = [[] for _ in prompts]
        for strength in STRENGTHS:
            studio.wear(path, strength)
            names = [f"{step:06d}-{k + 1}-{strength}.png" for k in range(len(prompts))]
            draw(range(len(prompts)), names)
            for k, name in enumerate(names):
                cells[k].append(name)
        rows.append({"file": path.name, "step": step, "cells": cells})
        found["matrix"] = {"prompts": list(prompts), "strengths": list(STRENGTHS), "rows": list(rows)}
        keep()
    for old in job.run.root.glob("*.png"):  # of an earlier comparison
        if old.name not in drawn:
            old.unlink()
    return {"recommended": best["file"]}


# ---- what is compared -------------------------------------------------------------------------------------------------------------


def exported(run: RunDir) -> list[tuple[int, Path]]:
    """(step, file) of every LoRA that a run has exported and that is still there, by step; where two have one step, the final one."""
    found: dict[str, tuple[int, bool]] = {}
    for event in events.read(run.events):
        if event["type"] == "exported":
            found[event["file"]] = event["step"], event["final"]
    by_step: dict[int, Path] = {}
    for name, (step, _) in sorted(found.items(), key=lambda entry: entry[1]):
        if (run.root / name).is_file():
            by_step[step] = run.root / name
    return sorted(by_step.items())


def spread(files: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most `most` of the files, evenly chosen, the first and the last among them."""
    if len(files) <= most:
        return list(files)
    return [files[round(k * (len(files) - 1) / (most - 1))] for k in range(most)]


def told_words(config: TrainConfig, laid: plan.Plan) -> tuple[str, ...]:
    """The words by which the concept is called: the triggers, or else the words that stand in every caption."""
    if triggers := tuple(dict.fromkeys(d.trigger for d in config.data if d.trigger)):
        return triggers
    words = [{w for w in _words(image.caption) if w not in STOP_WORDS} for image in laid.images]
    return tuple(sorted(set.intersection(*words))) if len(words) > 1 else ()


def choose_prompts(config: TrainConfig, laid: plan.Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(at most three prompts to draw, generic prompts to measure drift by).

    Drawn are a training-like caption, the trigger in a new place and one prompt without it. No generic prompt has a word of the
    trigger or class in it.
    """
    made = plan.preview_prompts(config, laid.images)
    told = told_words(config, laid)
    own = [*told, *(w for d in config.data for w in _words(d.class_word))]
    plain = tuple(p for p in GENERIC if not any(contains(p, word) for word in own)) or GENERIC
    without = [p for p in made if told and not any(contains(p, word) for word in told)]
    with_it = [p for p in made if p not in without]
    third = (without or [plain[0]])[:1] if told else []
    return tuple(dict.fromkeys([*with_it[: 3 - len(third)], *third])), plain


def picture_size(config: TrainConfig, laid: plan.Plan) -> tuple[int, int]:
    """(width, height) as the run's previews have it."""
    biggest = next(iter(laid.buckets()))
    return config.preview.width or biggest[0], config.preview.height or biggest[1]


def save(image: Any, path: Path) -> None:
    temp = path.with_name(f".{path.name}.tmp")
    image.save(temp, "PNG")
    replace(temp, path)


def _words(text: str) -> list[str]:
    return [w for w in "".join(c if c.isalnum() else " " for c in text.lower()).split() if w]


# ---- measures -----------------------------------------------------------------------------------------------------------------------


class Measure:
    """Gain and drift of a studio as it stands, on draws that are the same at each measurement. Made with no LoRA on."""

    IMAGES, DRAWS, DRIFT_DRAWS = 8, 4, 4

    def __init__(self, studio: Studio, config: TrainConfig, laid: plan.Plan, plain: Sequence[str], check: Callable[[], None]) -> None:
        import torch

        from trainer.validation import FixedLoss

        self.studio, self.config, self.check = studio, config, check
        models, family = studio.models, studio.family
        images, placements = (laid.held_out, laid.held_out_placements) if laid.held_out else (laid.images, laid.placements)
        chosen = sorted(randomness.host(config.train.seed, 0, "compare").sample(range(len(images)), min(self.IMAGES, len(images))))
        self.fixed = FixedLoss(
            family,
            models,
            [images[k] for k in chosen],
            [placements[k] for k in chosen],
            background=config.dataset.background,
            draws=self.DRAWS,
            seed=config.train.seed,
            trained=models.text,  # a LoRA may be on the text encoder: captions are encoded anew at each measurement
        )
        self.base_loss = self.fixed.measure(_Worn())
        self.size = picture_size(config, laid)
        pictures = studio.sample(plain, [100 + k for k in range(len(plain))], steps=12, guidance=5.0, size=self.size, tick=check)
        with torch.no_grad():
            latents = torch.cat([family.encode(models, _pixels(p).to(models.device))[0] for p in pictures])
            generator = torch.Generator().manual_seed(randomness.key(config.train.seed, 0, "drift"))
            draws, self.plain = self.DRIFT_DRAWS, list(plain)
            self.rows = []  # (noisy latents, t, prediction of the base), a draw of all prompts each
            spread = 0.0
            empty = family.conditions(models, [""] * len(plain), self.size)
            for draw in range(draws):
                noise = torch.randn(latents.shape, generator=generator).to(models.device)
                order = [(k * draws + draw + 0.5) / (len(plain) * draws) for k in range(len(plain))]
                t = family.spread(models, order)
                noisy, _ = family.process(models, latents, noise, t)
                base = self._predict(noisy, t)
                spread += float((base - self._one_by_one(noisy, t, empty)).square().mean())
                self.rows.append((noisy, t, base))
            self.spread = spread / draws

    def gain(self) -> float:
        """Share of the base's loss on images of the concept that the LoRA takes away; negative where it adds."""
        self.check()
        return 1 - self.fixed.measure(_Worn()) / self.base_loss

    def drift(self) -> float:
        """How hard the LoRA pushes prompts without the trigger, in units of what their own words do."""
        import torch

        self.check()
        with torch.no_grad():
            moved = [float((self._predict(noisy, t) - base).square().mean()) for noisy, t, base in self.rows]
        return sum(moved) / len(moved) / self.spread

    def _predict(self, noisy: Any, t: Any) -> Any:
        return self._one_by_one(noisy, t, self.studio.family.conditions(self.studio.models, self.plain, self.size))

    def _one_by_one(self, noisy: Any, t: Any, cond: Any) -> Any:
        """Predictions for all rows, in pieces that fit into memory."""
        import torch

        from trainer.validation import BATCH_PIXELS

        size = max(1, BATCH_PIXELS // (self.size[0] * self.size[1]))
        pieces = torch.arange(len(noisy), device=noisy.device).split(size)
        return torch.cat([self.studio.family.predict(self.studio.models, noisy[p], t[p], cond.rows(p)) for p in pieces])


class _Worn:
    """What FixedLoss needs of an adapter, for one that diffusers has put on the model: dropout is off already."""

    def train(self, on: bool) -> None:
        pass


def _pixels(image: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


# ---- what follows from them ---------------------------------------------------------------------------------------------------------


def learnt(gain: float) -> float:
    """How much a file has learnt, from its gain: the logarithm of (loss of the base / its loss).

    The first part of a gain comes cheap (the look of the pictures), the last part is the subject: on the demo's zorp a third of the
    way to the least loss is made before any zorp shows. For small gains, as on SD1.5, it is the gain itself.
    """
    return -math.log(max(1e-6, 1 - gain))


def recommend(scores: Sequence[dict[str, Any]], has_trigger: bool) -> dict[str, Any]:
    """{file, step, why}: the earliest file with nine tenths of the most that any learnt, before prompts without the trigger drift.

    Where the drift comes first: the one that learnt most before it, if that is at least half; else the one that drifts least. Without a trigger (a style that is
    meant to show everywhere) drift is no fault. `scores` are sorted by step and not empty.
    """

    def choice(score: dict[str, Any], why: str) -> dict[str, Any]:
        return {"file": score["file"], "step": score["step"], "why": why}

    most = max(learnt(s["gain"]) for s in scores)
    if most <= 0:
        return choice(scores[-1], "No file lowers the loss on your images, so nothing was learnt yet; this is the last one.")
    first = next(s for s in scores if learnt(s["gain"]) >= NINE_TENTHS * most)
    if not has_trigger:
        return choice(first, "The earliest with nine tenths of what the best file has learnt; the later ones add little.")
    if first["drift"] <= DRIFT_LIMIT:
        return choice(
            first, "The earliest with nine tenths of what the best file has learnt; pictures without the trigger word stay as they were."
        )
    calm = [s for s in scores if s["drift"] <= DRIFT_LIMIT and learnt(s["gain"]) >= most / 2]
    if calm:
        best = max(calm, key=lambda s: s["gain"])
        share = learnt(best["gain"]) / most
        return choice(
            best, f"It has {share:.0%} of what the best file has learnt; the later ones change pictures without the trigger word too."
        )
    half = [s for s in scores if learnt(s["gain"]) >= most / 2]
    return choice(
        min(half, key=lambda s: s["drift"]),
        "Every file that has learnt enough changes pictures without the trigger word too; this one least.",
    )


def hints(measured: dict[str, Any], *, has_trigger: bool) -> list[str]:
    """What to do next, at most one sentence, from what was measured of the last file; see the top of this module for the thresholds."""
    file, gain, drift = measured["file"], measured["gain_at"], measured["drift_at"]
    if max(gain.values()) <= 0:
        return [f"{file} has learnt nothing that shows in the loss: raise the learning rate or train further."]
    weak, full, strong = (learnt(gain[strength]) for strength in ("0.6", "1.0", "1.3"))
    spills = has_trigger and drift["1.0"] > SPILLS
    if weak > WEAKER_IS_BETTER * full or (spills and drift["0.6"] <= SPILLS):
        return [f"{file} is good only below a strength of about 0.7: it is over-trained. Take an earlier one."]
    if spills:
        says = "what it learnt appears in pictures without the trigger word, even at strength 0.6"
        return [f"With {file}, {says}: it is over-trained. Take an earlier one."]
    if strong >= STRONGER_IS_AS_GOOD * full:
        return [f"{file} is about as good at strength 1.3 as at 1.0, or better: it has more to learn. Train further (+50 %)."]
    return []
