"""Find out by forward passes whether a UNet predicts noise (epsilon) or v, where its files don't say it.

v = sqrt(a) * noise - sqrt(1 - a) * latents (arXiv:2202.00512, appendix D), a the cumulated alpha of a timestep. At high noise the two
are far apart: epsilon is nearly the noisy latents, v nearly the clean ones turned round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Timesteps are those with the alphas next to these: noisy enough for the targets to differ, and not the last, where the clean
# latents no longer show.
ALPHAS = (0.3, 0.2, 0.1)
# Errors are relative to predicting zero. Even an epsilon model that knows nothing of the images has an error of a / (1 - a) against
# epsilon (0.26 here on average) by giving back what it gets, and one of over 1 against v; against epsilon, a v model has one of 0.6
# to 1. A v model's own error is large at high noise, up to 0.8 for one as weak as the demo base.
EPSILON_BELOW, V_BELOW = 0.4, 0.9


@dataclass(frozen=True)
class Measured:
    """`prediction`: `epsilon`, `v_prediction` or `unclear`; `epsilon`, `v`: mean squared error against each target, 1 for zeros."""

    prediction: str
    epsilon: float
    v: float


@torch.no_grad()
def measure(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    alphas_cumprod: torch.Tensor,
    latents: torch.Tensor,
    generator: torch.Generator,
) -> Measured:
    """Which target the outputs of `predict` are nearer to, over three noise levels.

    Args:
        predict: (noisy latents (B, C, h, w) float32, t (B,) int64) -> (B, C, h, w) float32.
        alphas_cumprod: (steps,) of the noise schedule.
        latents: (B, C, h, w), scaled, of images of the kind that the model knows.
        generator: of the noise, on any device.
    """
    wrong = {"epsilon": 0.0, "v": 0.0}
    size = {"epsilon": 0.0, "v": 0.0}
    for alpha in ALPHAS:
        step = int((alphas_cumprod - alpha).abs().argmin())
        a = alphas_cumprod[step].to(latents.device, torch.float32)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents.device)
        clean = latents.float()
        out = predict(a.sqrt() * clean + (1 - a).sqrt() * noise, torch.full((len(latents),), step, device=latents.device)).float()
        for name, target in (("epsilon", noise), ("v", a.sqrt() * noise - (1 - a).sqrt() * clean)):
            wrong[name] += float((out - target).square().mean())
            size[name] += float(target.square().mean())
    epsilon, v = wrong["epsilon"] / size["epsilon"], wrong["v"] / size["v"]
    if epsilon < EPSILON_BELOW and v > 1:
        return Measured("epsilon", epsilon, v)
    if v < V_BELOW and epsilon > EPSILON_BELOW:
        return Measured("v_prediction", epsilon, v)
    return Measured("unclear", epsilon, v)
