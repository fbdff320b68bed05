"""What the SD1 family promises, on the demo base."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from trainer import adapters, families, sampler
from trainer.config import LoraConfig, LossConfig, ModelConfig
from trainer.config.load import ROOT
from trainer.data.images import open_rgb
from trainer.families import WINDOW, Cond, Models
from trainer.families.sources import DEMO
from trainer.families.unet import UNET_TARGETS

FAMILY = families.get("sd1")
DATA = DEMO.parent / "data"
SAMPLE = {"negative": "", "steps": 4, "guidance": 5.0, "size": (64, 64)}
PROMPTS = ["a red ball on grass", "a house by the sea", "an owl"]


def load(prediction: str = "auto", source=DEMO) -> Models:
    return FAMILY.load(source, torch.float32, torch.device("cpu"), ModelConfig(prediction=prediction))


@pytest.fixture(scope="module")
def models(one_thread) -> Models:
    return load()


def pixels(images) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in images])


def apart(a, b) -> int:
    """The largest difference of two pictures, in levels of 0 to 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


# Pictures


def test_a_picture_comes_back_from_its_latents(models):
    paths = sorted(DATA.glob("*/train/*.png"))[::5]
    assert len(paths) >= 6
    x = pixels([open_rgb(p) for p in paths])
    mean, std = FAMILY.encode(models, x)
    assert mean.shape == std.shape == (len(paths), models.vae.config.latent_channels, x.shape[2] // 8, x.shape[3] // 8)
    assert (std > 0).all() and 0.5 < mean.std() < 2  # scaled: about the noise's own size
    with torch.no_grad():
        back = models.vae.decode(mean / models.vae.config.scaling_factor).sample.clamp(-1, 1)
    psnr = -10 * ((back - x).square().mean((1, 2, 3)) / 4).log10()
    assert psnr.min() > 26, psnr


def test_sampling_depends_on_its_seed_alone(models):
    torch.manual_seed(1)
    first = FAMILY.sample(models, PROMPTS, [7, 8, 9], **SAMPLE)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = FAMILY.sample(models, PROMPTS, [7, 8, 9], **SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)
    assert [apart(a, b) for a, b in zip(first, again, strict=True)] == [0, 0, 0]
    (other,) = FAMILY.sample(models, PROMPTS[:1], [8], **SAMPLE)
    assert apart(other, first[0]) > 30
    assert all(image.size == (64, 64) for image in first)


def test_sampling_does_not_depend_on_its_neighbours(models, monkeypatch):
    together = FAMILY.sample(models, PROMPTS, [7, 8, 9], **SAMPLE)
    for image, prompt, seed in zip(together, PROMPTS, [7, 8, 9], strict=True):
        (alone,) = FAMILY.sample(models, [prompt], [seed], **SAMPLE)
        assert apart(alone, image) <= 2
    monkeypatch.setattr(sampler, "BATCH_PIXELS", 2 * 64 * 64)  # batches of two and one
    assert [apart(a, b) <= 2 for a, b in zip(together, FAMILY.sample(models, PROMPTS, [7, 8, 9], **SAMPLE), strict=True)] == [True] * 3


def test_prompt_negative_guidance_and_size_reach_the_picture(models):
    (plain,) = FAMILY.sample(models, PROMPTS[:1], [7], **SAMPLE)
    for changes in ({"negative": "grass"}, {"guidance": 1.0}, {"steps": 6}):
        (image,) = FAMILY.sample(models, PROMPTS[:1], [7], **SAMPLE | changes)
        assert apart(plain, image) > 5, changes
    (wide,) = FAMILY.sample(models, PROMPTS[:1], [7], **SAMPLE | {"size": (96, 64)})
    assert wide.size == (96, 64)


# Layers


def test_targets_are_all_layers_of_their_kind(models):
    by_kind = {(p, k): FAMILY.targets(models, p, [k]) for p in FAMILY.parts for k in UNET_TARGETS}
    ends = {
        ("unet", "attention"): {f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")},
        ("unet", "feed_forward"): {"ff.net.0.proj", "ff.net.2"},
        ("unet", "projections"): {"proj_in", "proj_out"},
        ("unet", "convolutions"): {"conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv"},
        ("text_1", "attention"): {f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")},
        ("text_1", "feed_forward"): {"mlp.fc1", "mlp.fc2"},
    }
    for key, paths in by_kind.items():
        found = {e for e in ends.get(key, ()) for p in paths if p.endswith("." + e)}
        assert found == ends.get(key, set()) and all(p.endswith(tuple(ends[key])) for p in paths), key
    for part in FAMILY.parts:
        layers = [n for n, m in models.parts[part].named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        union = [p for k in UNET_TARGETS for p in by_kind[part, k]]
        assert len(union) == len(set(union))
        left = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} if part == "unet" else set()
        assert set(layers) - set(union) == left
        together = FAMILY.targets(models, part, list(UNET_TARGETS))
        assert together == [n for n in layers if n in set(union)]  # the model's own order, whatever the order of the kinds
        assert FAMILY.targets(models, part, list(UNET_TARGETS)[::-1]) == together


@pytest.mark.parametrize("rank", [4, 300])
@pytest.mark.parametrize("kinds", [("attention",), ("projections", "feed_forward"), tuple(UNET_TARGETS)], ids="+".join)
def test_count_is_what_the_adapter_gets(kinds, rank):
    models = load()
    config = LoraConfig(rank=rank, alpha=rank, targets=kinds)
    counted = FAMILY.count(DEMO, config)
    targets = {p: t for p in FAMILY.parts if (t := FAMILY.targets(models, p, kinds))}
    adapter = adapters.build(config, models.parts, targets, 0)
    for part in FAMILY.parts:
        parameters = adapter.parameters(part)
        assert counted[part] == (len(parameters) // 2, sum(w.numel() for w in parameters))
    assert counted["unet"][0] > 0


def test_no_weight_of_the_base_is_trained(models):
    assert not any(w.requires_grad for m in (*models.parts.values(), models.vae) for w in m.parameters())


# What moves between devices


class Module(torch.nn.Module):
    """Says where it was put last."""

    def to(self, where, *args, **options):
        self.where = str(where)
        return self


def test_parked_modules_come_when_borrowed_and_go_back(models):
    names = ("unet", "text_1")
    models = dataclasses.replace(models, parts={n: Module() for n in names}, vae=Module(), device=torch.device("meta"), parked=set())

    def where() -> dict[str, str]:
        return {n: models.module(n).where for n in (*names, "vae")}

    for name in (*names, "vae"):
        models.module(name).to(models.device)
    models.park("vae", "text_1")
    home = {"unet": "meta", "text_1": "cpu", "vae": "cpu"}
    assert where() == home
    with models.borrow("vae"):
        assert where() == home | {"vae": "meta"}
        with models.borrow("text_1", "unet"):
            assert where() == dict.fromkeys(home, "meta")
        assert where() == home | {"vae": "meta"}  # what was not parked stays
    assert where() == home
    with pytest.raises(KeyError), models.borrow("vae", "text_1"):
        raise KeyError
    assert where() == home


# Prediction


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_leads_back_to_the_latents(prediction):
    models = load(prediction)
    assert models.prediction == prediction == models.scheduler["prediction_type"]
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(8, 4, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 1, 10, 100, 300, 500, 900, 999])
    assert len(models.alphas_cumprod) == 1000
    noisy, target = FAMILY.process(models, latents, noise, t)
    a = models.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    if prediction == "epsilon":
        assert torch.equal(target, noise)
        back = (noisy - (1 - a).sqrt() * target) / a.sqrt()
    else:
        back = a.sqrt() * noisy - (1 - a).sqrt() * target
    assert torch.allclose(back, latents, atol=1e-4)
    assert torch.allclose(noisy.var(), torch.tensor(1.0, dtype=torch.float64), atol=0.15)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction):
    models = load(prediction)
    t = torch.arange(0, 1000, 37)
    assert torch.equal(FAMILY.weight(models, t, None), torch.ones(len(t)))
    snr = models.alphas_cumprod[t] / (1 - models.alphas_cumprod[t])
    weight = FAMILY.weight(models, t, 5.0)
    assert torch.allclose(weight, torch.minimum(snr, torch.tensor(5.0)) / (snr + (prediction == "v_prediction")))
    assert (weight > 0).all() and (weight <= 1).all() and (snr > 5).any() and (snr < 5).any()


def test_v_prediction_reaches_the_samples():
    """The same weights, read as another prediction: another picture, by a sampler that was told so."""
    said = {p: load(p) for p in ("epsilon", "v_prediction")}
    assert load("auto").prediction == "epsilon"
    pictures = {p: FAMILY.sample(m, PROMPTS[:1], [7], **SAMPLE)[0] for p, m in said.items()}
    assert apart(pictures["epsilon"], pictures["v_prediction"]) > 30
    for prediction, models in said.items():
        assert DPMSolverMultistepScheduler.from_config(models.scheduler).config.prediction_type == prediction


def test_v_prediction_reaches_the_samplers_numbers(models, monkeypatch):
    """A UNet that knows the answer, in v: one step from pure noise leads to the picture that it has in mind."""
    (latents, _) = FAMILY.encode(models, pixels([open_rgb(next((DATA / "zorp" / "train").glob("*.png")))]))
    latents = latents[..., :8, :8]
    a = models.alphas_cumprod

    def knows(noisy, t, *args, **options):
        at = a[int(t)]
        noise = (noisy - at.sqrt() * latents) / (1 - at).sqrt()
        return (at.sqrt() * noise - (1 - at).sqrt() * latents,)

    found = {}
    for prediction in ("v_prediction", "epsilon"):
        told = load(prediction)
        monkeypatch.setattr(told.parts["unet"], "forward", knows)
        (found[prediction],) = FAMILY.sample(told, ["x"], [0], **SAMPLE | {"guidance": 1.0, "steps": 1})
    with torch.no_grad():
        want = models.vae.decode(latents / models.vae.config.scaling_factor).sample.clamp(-1, 1)
    off = {p: (pixels([image]) - want).abs().mean().item() for p, image in found.items()}
    assert off["v_prediction"] < 0.03 < 0.2 < off["epsilon"], off


def test_the_prediction_of_the_scheduler_is_taken_and_can_be_overridden(tmp_path):
    shutil.copytree(DEMO, tmp_path / "base")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    assert load("auto", tmp_path / "base").prediction == "v_prediction"
    told = load("epsilon", tmp_path / "base")
    assert told.prediction == told.scheduler["prediction_type"] == "epsilon"


def test_timesteps_are_whole_and_from_the_whole_range(models):
    t = FAMILY.timesteps(models, 20_000, torch.Generator().manual_seed(0), LossConfig())
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 10
    assert torch.equal(t, FAMILY.timesteps(models, 20_000, torch.Generator().manual_seed(0), LossConfig()))


def test_predict_is_float32_and_row_by_row(models):
    draw = torch.Generator().manual_seed(0)
    noisy, hidden = torch.randn(3, 4, 8, 8, generator=draw), FAMILY.conditions(models, PROMPTS, (64, 64)).hidden
    t = torch.tensor([3, 400, 990])
    with torch.no_grad():
        out = FAMILY.predict(models, noisy, t, Cond(hidden))
        rows = [FAMILY.predict(models, noisy[k : k + 1], t[k : k + 1], Cond(hidden[k : k + 1])) for k in range(3)]
    assert out.dtype == torch.float32 and out.shape == noisy.shape
    assert torch.allclose(out, torch.cat(rows), atol=1e-4)


# Size and text


def test_native_resolution():
    assert FAMILY.native_resolution(DEMO) == 128
    assert FAMILY.native_resolution(ROOT / "assets" / "models" / "sd1") == 512  # SD1.5's own configuration


def test_captions_of_any_length_have_one_length(models):
    tokens = FAMILY.tokenize(models, "text_1", ["", "zorp", "zorp " * 500])
    assert tokens.ids.shape == (3, 3 * WINDOW) and tokens.ids.dtype == torch.int64 and list(tokens.windows) == [1, 1, 3]
    assert not torch.equal(tokens.ids[0], tokens.ids[1])
    hidden = FAMILY.encode_text(models, "text_1", tokens).hidden
    assert hidden.shape == (3, 3 * WINDOW, models.parts["text_1"].config.hidden_size)
    rows = Cond(hidden).rows(torch.tensor([2, 0]))
    assert torch.equal(rows.hidden, hidden[[2, 0]]) and dataclasses.is_dataclass(rows)


def test_half_precision_leaves_the_vae_alone():
    models = FAMILY.load(DEMO, torch.bfloat16, torch.device("cpu"))
    dtypes = [{w.dtype for w in m.parameters()} for m in (*models.parts.values(), models.vae)]
    assert dtypes == [{torch.bfloat16}, {torch.bfloat16}, {torch.float32}] and models.alphas_cumprod.dtype == torch.float32
    image, exact = (FAMILY.sample(m, PROMPTS[:1], [7], **SAMPLE | {"steps": 20})[0] for m in (models, load()))
    assert np.abs(np.asarray(image, float) - np.asarray(exact, float)).mean() < 3  # levels; 0.1 was measured
