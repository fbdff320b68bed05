"""Sample images during a run. They draw from generators of their own, so training never notices them."""

from __future__ import annotations

from trainer.adapters import Adapter
from trainer.config import TrainConfig
from trainer.families import Family, Models
from trainer.run_dir import RunDir


def make(
    config: TrainConfig,
    family: Family,
    models: Models,
    adapter: Adapter,
    prompts: tuple[str, ...],
    size: tuple[int, int],
    run: RunDir,
    step: int,
) -> list[str]:
    """Sample every prompt with its fixed seed and save the pictures; returns their file names in `run.previews`."""
    adapter.train(False)
    images = family.sample(
        models,
        prompts,
        [config.preview.seed + k for k in range(len(prompts))],
        negative=config.preview.negative,
        steps=config.preview.steps,
        guidance=config.preview.guidance,
        size=(config.preview.width or size[0], config.preview.height or size[1]),
    )
    adapter.train(True)
    names = []
    for k, image in enumerate(images):
        path = run.preview(step, k)
        temp = path.with_suffix(".tmp")
        image.save(temp, "PNG")
        temp.replace(path)
        names.append(path.name)
    return names
