"""What prior preservation keeps, measured on the demo base: zorp trained with loss.prior_weight 0 and 1, otherwise alike.

    python -m trainer.demo.build measure-prior [--seeds 2] [--work .build]     # trains in .build/prior, writes assets/demo/prior.json

The preset is sd1/demo at half its length, the trigger zorp, and the class word ghost: of the base's subjects the one nearest to a zorp,
round, with eyes. Of each trained file:

    loss     of 24 held-out zorps (trainer/validation.py): what is learnt. The base's own is `loss_before`.
    class    drift (trainer/compare.py) of prompts with the class word and without the trigger
    others   drift of prompts with neither
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from trainer import events, plan, run
from trainer.compare import Measure
from trainer.config.load import load, merge
from trainer.demo.run import DEMO, LEAN, UNRELATED
from trainer.generate import Studio
from trainer.run_dir import RunDir

WEIGHTS, VISITS, CLASS = (0.0, 1.0), 38, "ghost"
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


def configuration(weight: float, seed: int) -> Any:
    data = [
        {"folder": str(DEMO / "data" / "zorp" / "train"), "trigger": "zorp", "class_word": CLASS},
        {"folder": str(DEMO / "data" / "zorp" / "held_out"), "kind": "validation"},
    ]
    more = {"data": data, "loss": {"prior_weight": weight}, "train": {"seed": seed, "visits": VISITS}, "output": {"name": "zorp"}}
    return load(preset="sd1/demo", values=merge(LEAN, more))


def compare_weights(work: Path, seeds: int) -> list[dict[str, Any]]:
    """Train and measure each weight with each seed; a run that is finished in `work` is not trained again."""
    studio, config = Studio(str(DEMO / "base"), device="auto", say=print), configuration(0.0, 0)
    laid = plan.make(config, studio.native, studio.family.name)
    drifts = {name: Measure(studio, config, laid, told, lambda: None) for name, told in (("class", OF_CLASS), ("others", UNRELATED))}
    rows = []
    for seed in range(seeds):
        for weight in WEIGHTS:
            trained, config = RunDir(work / f"weight {weight:g} seed {seed}"), configuration(weight, seed)
            lora = trained.lora(config.output.name)
            if not lora.is_file():
                run.train(config, trained.root)
            losses = {e["step"]: e["held_out"] for e in events.read(trained.events) if e["type"] == "validation"}
            row = {"prior_weight": weight, "seed": seed, "steps": max(losses), "loss_before": losses[0], "loss": losses[max(losses)]}
            studio.wear(lora)
            rows.append(row | {name: of.drift() for name, of in drifts.items()})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and each seed's figure, as Markdown."""
    lines = ["| `loss.prior_weight` | loss of held-out zorps | drift of the class | drift of other prompts |", "|---|---|---|---|"]
    for weight in sorted({r["prior_weight"] for r in rows}):
        own = [r for r in rows if r["prior_weight"] == weight]
        columns = [([r[key] for r in own], digits) for key, digits in (("loss", ".3f"), ("class", ".1f"), ("others", ".1f"))]
        cells = [f"{mean(values):{digits}} ({', '.join(f'{v:{digits}}' for v in values)})" for values, digits in columns]
        lines.append(f"| {weight:g} | {' | '.join(cells)} |")
    return "\n".join(lines)
