"""`python launch.py demo`: train a LoRA on the embedded base and images, and show what it learnt.

    python -m trainer.demo.run [--concept zorp|owl|sunset] [--out DIR]

The folder gets the run (with the exported LoRA), before-and-after.png and demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
CONCEPTS = {
    "zorp": (
        "a character the base has never seen",
        ("zorp on a blue background", "a big zorp on the right on a yellow background", "zorp in the snow", "zorp at night"),
    ),
    "owl": (
        "a subject the base has never seen",
        ("a red owl on a white background", "a big blue owl on a yellow background", "a purple owl in the snow", "a pink owl on the grass"),
    ),
    "sunset": (
        "a style the base has never seen",
        ("a cat, sunset style", "a house, sunset style", "a robot on the left, sunset style", "a big star, sunset style"),
    ),
}
UNRELATED = (
    "a red star on a blue background",
    "a yellow cat on a purple background",
    "a green house on a white background",
    "an orange fish on a teal background",
    "a white rabbit on a red background",
    "a brown bear on a yellow background",
    "a blue car on an orange background",
    "a pink heart on a black background",
)
LEAN = {  # the demo looks at the end alone; in the app the same preset samples and saves along the way
    "preview": {"enabled": False},
    "validation": {"every": 0},
    "output": {"save_every": 0, "checkpoint_every": 0},
}
SAMPLING = {"negative": "", "steps": 15, "guidance": 4.0, "size": (128, 128)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="launch.py demo", description="Train a LoRA on the embedded toy base model; about a minute on two CPU cores."
    )
    parser.add_argument("--concept", choices=tuple(CONCEPTS), default="zorp", help="what to learn (default: zorp)")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results (default: runs/DATE-demo-CONCEPT)")
    args = parser.parse_args(argv)
    try:
        demo(args.concept, args.out)
    except ValueError as error:
        if type(error) is ValueError or type(error).__module__.startswith("trainer"):
            print(f"Error: {error}", file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt:
        return 130
    return 0


def demo(concept: str, out: Path | None) -> dict[str, Any]:
    """Run the demo into `out` and return what demo.json holds."""
    begin = time.time()
    print(f"Training a LoRA for {concept!r} ({CONCEPTS[concept][0]}) on the embedded toy base. Nothing is downloaded.", flush=True)
    from trainer import events, run
    from trainer.__main__ import Terminal
    from trainer.config.load import load, merge
    from trainer.run_dir import RunError, default_run_dir

    folder = DEMO / "data" / concept
    data = [
        {"folder": str(folder / "train"), "trigger": concept if concept == "zorp" else ""},
        {"folder": str(folder / "held_out"), "kind": "validation"},
    ]
    config = load(preset="sd1/demo", values=merge(LEAN, {"data": data, "output": {"name": f"demo-{concept}"}}))
    outcome, done = run.train(config, out or default_run_dir(f"demo-{concept}"), show=Terminal())
    if outcome != "finished":
        raise RunError("The demo was stopped before its end; start it again in another folder.")
    trained = time.time()

    losses = {e["step"]: e["held_out"] for e in events.read(done.events) if e["type"] == "validation"}
    before_loss, after_loss = losses[0], losses[max(losses)]
    lora = done.lora(config.output.name)
    pictures = _before_and_after(lora, CONCEPTS[concept][1] + UNRELATED)
    sheet = done.root / "before-and-after.png"
    told = CONCEPTS[concept][1]
    moved = {p: _moved(a, b) for p, (a, b) in pictures.items()}
    _sheet(concept, pictures, told, sorted((DEMO / "data" / concept / "train").glob("*.png"))[:4], (before_loss, after_loss)).save(sheet)
    end = time.time()
    result = {
        "concept": concept,
        "base": str(DEMO / "base"),
        "lora": str(lora),
        "lora_bytes": lora.stat().st_size,
        "sheet": str(sheet),
        "held_out": str(folder / "held_out"),
        "concept_prompts": list(told),
        "unrelated_prompts": list(UNRELATED),
        "loss_before": before_loss,
        "loss_after": after_loss,
        "concept_moved": round(sum(moved[p] for p in told) / len(told), 1),
        "unrelated_moved": round(sum(moved[p] for p in UNRELATED) / len(UNRELATED), 1),
        "seconds": {"train": round(trained - begin, 1), "pictures": round(end - trained, 1), "total": round(end - begin, 1)},
    }
    (done.root / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"""
LoRA           {lora} ({result["lora_bytes"] / 1e6:.1f} MB)
Contact sheet  {sheet}
Concept loss   {before_loss:.3f} -> {after_loss:.3f} on {len(list((folder / "held_out").glob("*.png")))} held-out pictures ({after_loss / before_loss - 1:+.0%})
Moved          prompts with {concept}: {result["concept_moved"]:.0f} of 255 a pixel, unrelated prompts: {result["unrelated_moved"]:.0f} of 255
Took           {result["seconds"]["total"]:.0f} s""")
    return result


def _before_and_after(lora: Path, prompts: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """{prompt: (base alone, with the LoRA)}: the exported file, loaded by diffusers' own loader as another tool would."""
    import torch

    from trainer import families

    family = families.get("sd1")
    models = family.load(DEMO / "base", torch.float32, torch.device("cpu"))
    seeds = [1000 + k for k in range(len(prompts))]
    before = family.sample(models, prompts, seeds, **SAMPLING)
    family.pipeline(models).load_lora_weights(lora.parent, weight_name=lora.name)
    after = family.sample(models, prompts, seeds, **SAMPLING)
    return {p: (a, b) for p, a, b in zip(prompts, before, after, strict=True)}


def _moved(a: Any, b: Any) -> float:
    """Mean absolute change of a pixel's channel, 0 to 255."""
    import numpy as np

    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


def _sheet(
    concept: str, pictures: dict[str, tuple[Any, Any]], told: tuple[str, ...], examples: list[Path], losses: tuple[float, float]
) -> Any:
    """The contact sheet: what was learnt from, then before above after for prompts with and without the concept."""
    from PIL import Image, ImageDraw, ImageFont

    tile, gap, left = 192, 12, 96
    prompts = [*told, *[p for p in pictures if p not in told]]
    bands = [prompts[k : k + 4] for k in range(0, len(prompts), 4)]
    ink, soft, paper = (28, 30, 38), (104, 108, 120), (250, 250, 252)
    width = left + 4 * (tile + gap) + gap
    band = 2 * tile + 4 + 54
    height = 84 + tile + 24 + 2 * 28 + len(bands) * band
    img = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(img)
    big, small = ImageFont.load_default(24), ImageFont.load_default(14)

    def wrap(text: str, limit: int) -> str:
        lines = [""]
        for word in text.split():
            if draw.textlength(f"{lines[-1]} {word}", font=small) > limit:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        return "\n".join(lines[:2])

    draw.text((gap, 14), f"What the LoRA learnt: {concept}", font=big, fill=ink)
    draw.text(
        (gap, 48),
        f"Loss on held-out pictures {losses[0]:.3f} before, {losses[1]:.3f} after ({losses[1] / losses[0] - 1:+.0%}).",
        font=small,
        fill=soft,
    )
    y = 84
    draw.text((gap, y + tile // 2 - 8), "learnt from", font=small, fill=soft)
    for k, path in enumerate(examples):
        img.paste(Image.open(path).convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS), (left + k * (tile + gap), y))
    y += tile + 24
    for n, row in enumerate(bands):
        if n < 2:
            draw.line((gap, y, width - gap, y), fill=(222, 224, 230))
            draw.text(
                (gap, y + 6), ("Unrelated prompts: these should stay as they were", f"Prompts with {concept}")[n == 0], font=small, fill=ink
            )
            y += 28
        for j, word in enumerate(("before", "after")):
            draw.text((gap, y + j * (tile + 4) + tile // 2 - 8), word, font=small, fill=soft)
        for k, prompt in enumerate(row):
            x = left + k * (tile + gap)
            for j in range(2):
                img.paste(pictures[prompt][j].resize((tile, tile), Image.Resampling.LANCZOS), (x, y + j * (tile + 4)))
            draw.multiline_text((x, y + 2 * tile + 8), wrap(prompt, tile), font=small, fill=soft, spacing=2)
        y += band
    return img


if __name__ == "__main__":
    sys.exit(main())
