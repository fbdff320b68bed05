"""Whether a UNet predicts noise or v is measured on the demo base, as it is, turned into v, and trained to be v."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from trainer.data.images import open_rgb
from trainer.families import prediction
from trainer.families.sources import DEMO
from trainer.formats import single_file


@pytest.fixture(scope="module")
def demo(one_thread):
    """(UNet, alphas, latents of twelve demo images, text states of an empty caption)."""
    models = single_file.load_any(DEMO, torch.float32)
    images = [open_rgb(p).resize((64, 64)) for p in sorted((DEMO.parent / "data").glob("*/train/*.png"))[::3][:12]]
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])
    with torch.no_grad():
        latents = models["vae"].encode(pixels).latent_dist.mean * models["vae"].config.scaling_factor
        ids = models["tokenizer"]([""], padding="max_length", return_tensors="pt").input_ids
        hidden = models["text_encoder"](ids).last_hidden_state
    assert len(latents) == 12
    return models["unet"].requires_grad_(False), DDPMScheduler.from_config(models["scheduler"]).alphas_cumprod, latents, hidden


def run(unet, hidden, noisy, t):
    return unet(noisy, t, hidden.expand(len(noisy), -1, -1)).sample


def measure(predict, alphas, latents, seed=3):
    return prediction.measure(predict, alphas, latents, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [slice(0, 12), slice(0, 4), slice(0, 1), slice(5, 6)], ids=["twelve", "four", "one", "another"])
def test_epsilon_is_found_and_so_is_the_same_model_as_v(demo, rows):
    unet, alphas, latents, hidden = demo
    asked = []

    def epsilon(noisy, t):
        assert noisy.dtype == torch.float32 and t.dtype == torch.int64 and t.shape == noisy.shape[:1]
        asked.append(int(t[0]))
        return run(unet, hidden, noisy, t)

    def v(noisy, t):
        a = alphas[t].view(-1, 1, 1, 1)
        noise = epsilon(noisy, t)
        clean = (noisy - (1 - a).sqrt() * noise) / a.sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * clean

    for seed in (1, 2, 3):
        found = measure(epsilon, alphas, latents[rows], seed)
        assert found.prediction == "epsilon" and found.epsilon < 0.3 and found.v > 1.3, found
        found = measure(v, alphas, latents[rows], seed)  # its error as v is that as epsilon / a: with one image it may be unclear
        assert found.prediction == "v_prediction" or (len(latents[rows]) == 1 and found.prediction == "unclear"), found
    assert all(400 < t < 900 for t in asked) and len(set(asked)) == 3  # noisy, and not the last


def test_the_errors_are_those_of_the_targets(demo):
    """Outputs that are exactly one target: that error is 0, the other one follows from the schedule."""
    _, alphas, latents, _ = demo
    clean = latents[:2]

    def noise(noisy, t):
        a = alphas[t].view(-1, 1, 1, 1)
        return (noisy - a.sqrt() * clean) / (1 - a).sqrt()

    def v(noisy, t):
        a = alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * noise(noisy, t) - (1 - a).sqrt() * clean

    found = measure(noise, alphas, clean)
    assert found.prediction == "epsilon" and found.epsilon == pytest.approx(0, abs=1e-9) and 1 < found.v < 2
    found = measure(v, alphas, clean)
    assert found.prediction == "v_prediction" and found.v == pytest.approx(0, abs=1e-9)
    zeros = measure(lambda noisy, t: torch.zeros_like(noisy), alphas, clean)
    assert (zeros.prediction, zeros.epsilon, zeros.v) == ("unclear", pytest.approx(1), pytest.approx(1))


def test_random_weights_are_unclear(demo):
    unet, alphas, latents, hidden = demo
    for seed in range(3):
        torch.manual_seed(seed)
        other = type(unet).from_config(unet.config).eval()
        found = measure(lambda noisy, t, other=other: run(other, hidden, noisy, t), alphas, latents)
        assert found.prediction == "unclear", found
    assert measure(lambda noisy, t: torch.randn_like(noisy), alphas, latents).prediction == "unclear"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_the_demo_base_trained_both_ways(demo, target):
    """Some hundred steps on the demo's own latents: the same UNet becomes v, and stays epsilon where epsilon is trained."""
    unet, alphas, latents, hidden = demo
    trained = copy.deepcopy(unet).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = torch.randint(len(latents), (8,), generator=generator)
        t = torch.randint(len(alphas), (8,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents[rows] + (1 - a).sqrt() * noise
        goal = noise if target == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents[rows]
        loss = (run(trained, hidden, noisy, t) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for rows in (slice(0, 12), slice(0, 1), slice(4, 8)):
        found = measure(lambda noisy, t: run(trained, hidden, noisy, t), alphas, latents[rows])
        assert found.prediction == target, found
        assert min(found.epsilon, found.v) < 0.5 and max(found.epsilon, found.v) > 0.8, found
