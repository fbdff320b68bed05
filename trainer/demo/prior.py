"""What prior preservation keeps, measured on the demo base: zorp trained with and without it, otherwise alike, over several seeds.

    python -m trainer.demo.build measure-prior [--seeds 3] [--work .build]     # trains in .build/prior, writes assets/demo/prior.json

Each way of training has the preset sd1/demo, the trigger zorp and the class word ghost: of the base's subjects the one nearest to a
zorp, round, with eyes. Of each trained file:

    loss     of 24 held-out zorps (trainer/validation.py): what is learnt. The base's own stands first in the table.
    class    drift (trainer/compare.py) of prompts with the class word and without the trigger
    others   drift of prompts with neither
    right    share of pictures of bare nouns ("a cat"), one of each subject, that the classifier still takes for that subject
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer import events, plan, run
from trainer.compare import Measure
from trainer.config.load import load, merge
from trainer.demo import measure, world
from trainer.demo.run import DEMO, LEAN, SAMPLING, UNRELATED
from trainer.generate import Studio
from trainer.run_dir import RunDir

CLASS = "ghost"
OF_CLASS = (
    "a ghost",
    "a ghost on a blue background",
    "a white ghost on a red background",
    "a green ghost on a yellow background",
    "a big ghost on the grass",
    "a ghost in the snow",
    "a purple ghost at night",
    "a small ghost on the left on a grey background",
)
WAYS: dict[str, tuple[float, bool]] = {  # loss.prior_weight, whether there are class images
    "neither": (0.0, False),
    "prior_weight 1": (1.0, False),
    "class images": (0.0, True),
}


def compare_ways(work: Path, out: Path, seeds: int) -> None:
    """Train each way with each seed (a run that is finished in `work` is not trained again), measure, print and write the table."""
    studio = Studio(str(DEMO / "base"), device="auto", say=print)
    pictures = _class_images(studio, work / "class images")
    classifier = measure.load_classifier(DEMO / "classifier.safetensors")
    nouns = [f"an {n}" if n[0] in "aeiou" else f"a {n}" for n in world.SUBJECTS]
    config = _config("neither", 0, pictures)
    laid = plan.make(config, studio.native, studio.family.name)
    drifts = {name: Measure(studio, config, laid, told, lambda: None) for name, told in (("class", OF_CLASS), ("others", UNRELATED))}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for way in WAYS:
            trained = RunDir(work / f"{way} {seed}")
            config = _config(way, seed, pictures)
            lora = trained.lora(config.output.name)
            if not lora.is_file():
                run.train(config, trained.root)
            losses = {e["step"]: e["held_out"] for e in events.read(trained.events) if e["type"] == "validation"}
            studio.wear(lora)
            drawn = studio.sample(nouns, range(len(nouns)), **SAMPLING)
            right = sum(a == b for a, b in zip(measure.name_subjects(classifier, drawn), world.SUBJECTS, strict=True))
            row = {"way": way, "seed": seed, "steps": max(losses), "loss_before": losses[0], "loss": losses[max(losses)]}
            row |= {name: round(of.drift(), 2) for name, of in drifts.items()} | {"right": round(right / len(nouns), 3)}
            rows.append(row)
            print(row, flush=True)
    (out / "prior.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"\nloss of the base {rows[0]['loss_before']:.3f}\n\n| way | steps | loss | class | others | right |\n|---|---|---|---|---|---|")
    for way in WAYS:
        own = [r for r in rows if r["way"] == way]
        cells = [" ".join(f"{r[key]:{digits}}" for r in own) for key, digits in _COLUMNS.items()]
        print(f"| {way} | {own[0]['steps']} | {' | '.join(cells)} |")


_COLUMNS = {"loss": ".3f", "class": ".1f", "others": ".1f", "right": ".2f"}


def _config(way: str, seed: int, pictures: Path) -> Any:
    weight, with_pictures = WAYS[way]
    data: list[dict[str, Any]] = [
        {"folder": str(DEMO / "data" / "zorp" / "train"), "trigger": "zorp", "class_word": CLASS},
        {"folder": str(DEMO / "data" / "zorp" / "held_out"), "kind": "validation"},
    ]
    data += [{"folder": str(pictures), "kind": "prior"}] if with_pictures else []
    more = {"data": data, "loss": {"prior_weight": weight}, "train": {"seed": seed}, "output": {"name": "zorp"}}
    return load(preset="sd1/demo", values=merge(LEAN, more))


def _class_images(studio: Studio, folder: Path) -> Path:
    """14 pictures of the class, made by the base itself of prompts in the form of zorp's captions, as Ruiz et al. have it."""
    folder.mkdir(parents=True, exist_ok=True)
    zorps = sorted((DEMO / "data" / "zorp" / "train").glob("*.txt"))
    told = [path.read_text(encoding="utf-8").strip().replace("zorp", CLASS) for path in zorps]
    prompts = [t if t.startswith("a ") else f"a {t}" for t in told]
    for path, prompt, image in zip(zorps, prompts, studio.sample(prompts, range(500, 500 + len(prompts)), **SAMPLING), strict=True):
        image.save(folder / f"{path.stem}.png")
        (folder / path.name).write_text(prompt + "\n", encoding="utf-8")
    return folder
