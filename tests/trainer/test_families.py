"""What every family promises, on small models of random weights: the arithmetic of a step, and the whole way from images to a file."""

import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_folder
from torch.func import functional_call
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer import adapters, bases, families, optimizers, plan
from trainer.adapters import Delta
from trainer.config import LossConfig, ModelConfig
from trainer.config.load import validate
from trainer.data.buckets import Placement
from trainer.data.store import Store
from trainer.families import sources
from trainer.formats.export import export
from trainer.formats.metadata import Facts
from trainer.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
TARGETS = ["attention", "feed_forward", "projections", "convolutions"]
STEP = {"dataset.bucket_step": 16}  # SD3 takes multiples of 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(family, ...): a small model's folder, made once for each kind."""
    made = {}

    def get(family, **options):
        key = family, *sorted(options.items())
        if key not in made:
            made[key] = make_folder(tmp_path_factory.mktemp(family) / "base", family, **options)
        return made[key]

    return get


@pytest.fixture
def load(base):
    """load(family, folder options..., model={...}): the family and its loaded models."""

    def make(name, model=None, **options):
        family = families.get(name)
        return family, family.load(base(name, **options), torch.float32, CPU, ModelConfig(**(model or {})))

    return make


def both(family):
    """All text encoders trained."""
    return {f"part.{part}.train": True for part in families.get(family).parts if part != "unet"}


@pytest.fixture
def build(configure, base):
    """build(family, changes, **folder options): what a run puts together before its first step, with an adapter that does something."""

    def make(name, changes=None, **options):
        folder = base(name, **options)
        basic = {"model.source": str(folder), "adapter.targets": TARGETS, "adapter.alpha": 3.0, **STEP, **both(name)}
        config = configure({**basic, **(changes or {})})
        family = families.get(sources.family_of(folder, "auto"))
        assert family.name == name
        laid = plan.make(config, 64)
        models = bases.load(folder, family, torch.float32, CPU, config.model)
        models.windows, models.weighted = config.dataset.text_windows, config.dataset.prompt_weights
        parts = [part for part in family.parts if getattr(config.part, part).train]
        store = Store(config, laid, family, models, parts)
        targets = {part: family.targets(models, part, config.adapter.targets) for part in parts}
        adapter = adapters.build(config.adapter, models.parts, targets, config.train.seed)
        draw = torch.Generator().manual_seed(7)
        adapter.load({k: t if k.endswith(".down") else torch.randn(t.shape, generator=draw) * 0.05 for k, t in adapter.state().items()})
        adapter.train(True)
        groups = [{"params": params, "lr": 1e-3 * rate, "part": p} for p in parts for rate, params in adapter.groups(p)]
        optimizer = optimizers.build(config.optimizer, groups, CPU)
        step = Step(config, family, models, adapter, optimizer, dict.fromkeys(parts, len(laid.steps)))
        return SimpleNamespace(
            config=config, plan=laid, folder=folder, family=family, models=models, store=store, adapter=adapter, step=step, parts=parts
        )

    return make


# The arithmetic of a step


def told(made, modules, captions, sizes):
    """(positional and named arguments of the denoiser) as diffusers' example training scripts make them, in float64."""
    name, folder = made.family.name, made.folder

    def read(k, skip):
        end = "" if k == 1 else f"_{k}"
        words = CLIPTokenizer.from_pretrained(folder / f"tokenizer{end}")
        ids = words(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        out = functional_call(*modules[f"text_{k}"], (ids,), {"output_hidden_states": True})
        return out.last_hidden_state if skip == 0 else out.hidden_states[-1 - skip], getattr(out, "text_embeds", None)

    if name in ("sd1", "sd2"):
        return read(1, 0)[0], {}
    (one, pooled), (two, pooled_2) = read(1, 1), read(2, 1)
    hidden = torch.cat([one, two], -1)
    if name == "sdxl":
        return hidden, {"added_cond_kwargs": {"text_embeds": pooled_2, "time_ids": torch.tensor(sizes, dtype=torch.float64)}}
    width = modules["unet"][0].config.joint_attention_dim
    hidden = torch.nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
    hidden = torch.cat([hidden, torch.zeros(len(hidden), 77, width, dtype=torch.float64)], 1)
    return hidden, {"pooled_projections": torch.cat([pooled, pooled_2], -1)}


def reference(made, n, draws):
    """(loss, {tensor: gradient}) of step n by diffusers' and transformers' own models and schedulers, W + alpha / rank * up @ down."""
    name, config = made.family.name, made.config
    second = CLIPTextModelWithProjection
    kinds = {"text_1": second if name == "sd3" else CLIPTextModel, "text_2": second}
    own = {p: kinds[p].from_pretrained(made.folder / f"text_encoder{'' if p == 'text_1' else '_2'}").double() for p in made.parts[1:]}
    kind = diffusers.SD3Transformer2DModel if name == "sd3" else diffusers.UNet2DConditionModel
    own["unet"] = kind.from_pretrained(made.folder / ("transformer" if name == "sd3" else "unet")).double()
    leaves = {k: t.double().clone().requires_grad_() for k, t in made.adapter.state().items()}
    modules = {p: (m, dict(m.named_parameters())) for p, m in own.items()}
    for key in (k.removesuffix(".down") for k in leaves if k.endswith(".down")):
        part, path = key.split("/", 1)
        change = leaves[f"{key}.up"].flatten(1) @ leaves[f"{key}.down"].flatten(1) * (config.adapter.alpha / config.adapter.rank)
        weight = modules[part][1][f"{path}.weight"]
        modules[part][1][f"{path}.weight"] = weight.detach() + change.view(weight.shape)

    rows, t = made.plan.steps[n], draws.t
    places = [made.plan.placements[r.image] for r in rows]
    images = [made.plan.images[r.image] for r in rows]
    sizes = [
        (i.height, i.width, round(p.box[1] * p.scale), round(p.box[0] * p.scale), p.height, p.width)
        for i, p in zip(images, places, strict=True)
    ]
    batch = made.store.batch(n)
    x0 = batch.mean.double() + batch.std.double() * draws.posterior.double()
    noise = draws.noise.double()
    factor = torch.ones(len(rows), dtype=torch.float64)
    if name == "sd3":
        sigma = (t.double() / 1000).view(-1, 1, 1, 1)
        xt, target = (1 - sigma) * x0 + sigma * noise, noise - x0
    else:
        kind = made.models.prediction
        zero = made.models.scheduler["rescale_betas_zero_snr"]
        scheduler = diffusers.DDPMScheduler(**SCHEDULE, prediction_type=kind, rescale_betas_zero_snr=zero)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        xt = scheduler.add_noise(x0, noise, t)
        target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
        a = scheduler.alphas_cumprod[t]
        snr = a / (1 - a)
        factor = snr.clamp(max=config.loss.min_snr_gamma) / (snr if kind == "epsilon" else snr + 1)
    hidden, more = told(made, modules, [made.plan.captions[r.caption] for r in rows], sizes)
    if name == "sd3":
        guess = functional_call(
            *modules["unet"], (), {"hidden_states": xt, "encoder_hidden_states": hidden, "timestep": t.double(), **more}
        )
    else:
        guess = functional_call(*modules["unet"], (xt, t, hidden), more)
    error = (guess.sample - target).square().mean((1, 2, 3))
    loss = (factor * error).mean()
    loss.backward()
    return float(loss.detach()), {k: leaf.grad for k, leaf in leaves.items()}


KINDS = [
    ("sd1", {}, {}),
    ("sd2", {"prediction": "epsilon"}, {}),
    ("sd2", {"prediction": "v_prediction"}, {}),
    ("sdxl", {}, {}),
    ("sdxl", {"prediction": "v_prediction"}, {}),
    ("sdxl", {"prediction": "v_prediction", "zero_snr": True}, {}),
    ("sd3", {}, {}),
]


@pytest.mark.parametrize("name, options, changes", KINDS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())))
def test_loss_and_gradients_equal_a_float64_reference(name, options, changes, build):
    made = build(name, changes, **options)
    batch = made.store.batch(0)
    draws = made.step.begin(0, batch)
    if name != "sd3":
        draws.t.copy_(torch.tensor([20, 150, 600, 999])[: len(draws.t)])
    made.step.grads(0, batch, draws, made.store.total_weight[0])
    loss, grads = reference(made, 0, draws)
    assert float(made.step.loss) == pytest.approx(loss, rel=1e-5)
    names = list(made.adapter.state())
    live = dict(zip(names, (p.grad for part in made.parts for p in made.adapter.parameters(part)), strict=True))
    for part in made.parts:
        assert any(float(grads[k].norm()) > 0 for k in names if k.startswith(part)), part
    largest = max(float(g.norm()) for g in grads.values() if g is not None)
    for key, grad in grads.items():
        if grad is None:  # of a layer whose output nobody reads: the last one of an encoder read before its end
            assert live[key] is None or not live[key].any(), key
        else:  # where a softmax has one key alone, float32 leaves rounding in place of 0
            apart = float((live[key].double() - grad).norm())
            assert apart < 1e-3 * float(grad.norm()) + 1e-6 * largest, f"{key} is {apart:.1e} apart of {float(grad.norm()):.1e}"


def test_zero_terminal_snr(load):
    """The rescale of arXiv:2305.08891, algorithm 1, in float64; by the folder's own word or by the setting."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    wanted = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    for model, options in (({}, {"prediction": "v_prediction", "zero_snr": True}), ({"zero_terminal_snr": True}, {"prediction": ""})):
        family, models = load("sdxl", model, **options)
        assert models.prediction == "v_prediction"
        torch.testing.assert_close(models.alphas_cumprod.double(), wanted, atol=2e-6, rtol=1e-4)
        assert float(models.alphas_cumprod[-1]) < 1e-9
        weight = family.weight(models, torch.tensor([0, 500, 999]), 5.0)
        snr = wanted[[0, 500, 999]] / (1 - wanted[[0, 500, 999]])
        torch.testing.assert_close(weight.double(), snr.clamp(max=5) / (snr + 1), atol=1e-5, rtol=1e-3)
        scheduler = family.preview_scheduler(models)
        scheduler.set_timesteps(4)
        assert int(scheduler.timesteps[0]) == 999 and scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.rescale_betas_zero_snr
    _, models = load("sdxl", {"zero_terminal_snr": False}, prediction="v_prediction", zero_snr=True)
    assert float(models.alphas_cumprod[-1]) > 1e-3
    with pytest.raises(ValueError, match=r"predicts noise \(epsilon\).*set model.zero_terminal_snr to false"):
        load("sdxl", {"zero_terminal_snr": True}, prediction="epsilon")


# Flow matching


def test_flow_matching_is_that_of_diffusers(load):
    family, models = load("sd3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(models.scheduler)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((5, 16, 4, 4), generator=draw) for _ in range(2))
    t = scheduler.timesteps[[0, 3, 400, 900, 999]]
    noisy, target = family.process(models, latents, noise, t)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, t, noise))
    sigma = (t / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, latents, atol=1e-5, rtol=1e-5)  # back to the picture along the target
    evenly = family.spread(models, [1 - k / 1000 for k in (0, 250, 500, 750)])  # diffusers' timesteps are shifted, evenly spaced ones
    torch.testing.assert_close(evenly, scheduler.timesteps[[0, 250, 500, 750]], atol=0.02, rtol=1e-4)


def draws(family, models, **loss):
    return family.timesteps(models, 40_000, torch.Generator().manual_seed(0), LossConfig(**loss)) / 1000


def test_timesteps(load):
    """Quantiles of the logit-normal distribution: sigmoid(mean + std * z), z being those of the normal distribution."""
    family, models = load("sd3")
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    z = torch.special.ndtri(levels)
    for mean, std in ((0.0, 1.0), (0.5, 1.0), (0.0, 0.5), (-1.0, 2.0)):
        u = torch.sigmoid(mean + std * z)
        found = draws(family, models, logit_mean=mean, logit_std=std, shift=1.0).quantile(levels)
        torch.testing.assert_close(found, u, atol=0.012, rtol=0)
    torch.testing.assert_close(draws(family, models, timesteps="uniform", shift=1.0).quantile(levels), levels, atol=0.012, rtol=0)


def test_shift(load):
    family, models = load("sd3")
    plain = draws(family, models, shift=1.0)
    for shift in (3.0, 0.5):
        torch.testing.assert_close(draws(family, models, shift=shift), shift * plain / (1 + (shift - 1) * plain))
    assert torch.equal(draws(family, models), draws(family, models, shift=models.scheduler["shift"]))  # the base's own


# What a family is told


def test_sdxl_is_told_the_true_size_and_crop():
    """An image of 1000 x 500, resized to 400 x 200 and cut to the 300 px from 100 on: diffusers' script gives (original, top left, target)."""
    family = families.get("sdxl")
    placement = Placement(300, 200, (250.0, 0.0, 1000.0, 500.0), 0.4, 0.75)
    assert family.size((1000, 500), placement, False) == (500, 1000, 0, 100, 200, 300)
    assert family.size((1000, 500), placement, True) == (500, 1000, 0, 0, 200, 300)  # mirrored, the 250 px at the left are at the right
    assert families.get("sd1").size((1000, 500), placement, False) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_equal_those_of_diffusers_own_pipeline(name, load, base):
    """The same prompts through the pipeline's own text encoding, scheduler and decoding."""
    family, models = load(name)
    prompts, seeds, size = ["zorp, red", "a house"], [3, 4], (64, 64)
    ours = family.sample(models, prompts, seeds, negative="grey", steps=3, guidance=4.0, size=size)
    lacks = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(base(name), **lacks)
    pipe.set_progress_bar_config(disable=True)
    if name != "sd3":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    told = {"negative_prompt": ["grey", "grey"], "num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}
    if name == "sd3":
        told["max_sequence_length"] = 77
    theirs = pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in seeds], **told).images
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(mine, int) - np.asarray(other, int)).max() <= 2


# From images to a file


def run_of(train, base, name, changes=None, **options):
    # random weights of this size change nothing visible at usual rates
    settings = {
        "model.source": str(base(name)),
        "adapter.targets": TARGETS,
        **STEP,
        "part.unet.learning_rate": 5e-3,
        **both(name),
        **{f"part.{part}.learning_rate": 5e-3 for part in families.get(name).parts[1:]},
        **(changes or {}),
    }
    return train(settings, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, train, base, same):
    drawn = {"adapter.dropout": 0.2, "dataset.flip": True, "dataset.caption_dropout": 0.3, "train.visits": 3}
    whole = run_of(train, base, name, drawn)
    stopped = run_of(train, base, name, drawn, stop_at=3)
    assert stopped.outcome == "stopped"
    settings = {"output.checkpoint_every": 3, **drawn}
    resumed = run_of(train, base, name, settings, root=stopped.root, resume=True)
    assert resumed.outcome == whole.outcome == "finished"
    assert same(whole.lora(), resumed.lora()) and same(whole.state()[0], resumed.state()[0])
    for part in families.get(name).parts:
        ups = [t for k, t in whole.state()[0].items() if k.startswith(f"adapter/{part}/") and k.endswith(".up")]
        assert ups and sum(bool(t.any()) for t in ups) > len(ups) / 2, part


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ("sd2", "sdxl") else ()) for n in FAMILIES])
def test_the_exported_file_does_in_diffusers_what_the_adapter_did(name, train, base, load):
    """A fresh pipeline with the file, and with the weights of the last preview: the same pictures, and others than the base's."""
    done = run_of(
        train, base, name, {"preview.enabled": True, "preview.steps": 3, "preview.prompts": ["zorp", "a house"], "train.visits": 6}
    )
    last = done.events("preview")[-1]
    assert len(last["images"]) == 2 and done.events("preview")[0]["step"] == 0
    exported = done.events("exported")[-1]
    file = next((f for f in exported["also"] if f.endswith("_diffusers.safetensors")), exported["file"])
    assert (name == "sd3") == (file != exported["file"])

    family, models = load(name)
    images = [np.asarray(Image.open(done.root / "previews" / n), int) for n in last["images"]]
    options = {"negative": "", "steps": 3, "guidance": last.get("guidance", 7.5), "size": images[0].shape[1::-1]}
    from trainer.config.load import load as read

    config = read(done.root / "config.json")
    options |= {"negative": config.preview.negative, "guidance": config.preview.guidance}
    seeds = [config.preview.seed, config.preview.seed + 1]
    before = [np.asarray(i, int) for i in family.sample(models, last["prompts"], seeds, **options)]
    pipe = family.pipeline(models)
    pipe.load_lora_weights(done.root, weight_name=file)
    after = [np.asarray(i, int) for i in family.sample(models, last["prompts"], seeds, **options)]
    for live, loaded, alone in zip(images, after, before, strict=True):
        change = np.abs(live - alone).mean()
        assert change > 1 and np.abs(live - loaded).mean() < 0.02 * change + 0.1


# Settings


def differs(train, base, name, change, same):
    plain, other = (run_of(train, base, name, {"train.visits": 1, **more}) for more in ({}, change))
    return not same(plain.state()[0], other.state()[0])


def test_clip_skip(train, base, same, load):
    assert differs(train, base, "sd1", {"model.clip_skip": 2}, same)
    states = []
    for skip in (1, 2):
        family, models = load("sd1", {"clip_skip": skip})
        states.append(family.conditions(models, ["zorp"], (64, 64)).hidden)
    assert not torch.allclose(*states)


@pytest.fixture
def long_captions(draw_pictures, tmp_path):
    folder = draw_pictures(tmp_path / "long", [(64, 64)] * 4)
    for k, file in enumerate(sorted(folder.glob("*.txt"))):
        file.write_text("zorp, " + "red cat, " * 60 + f"(a house:1.{k + 2})")
    return [{"folder": str(folder), "trigger": "zorp"}]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ("sd2", "sdxl") else ()) for n in FAMILIES])
def test_text_windows(name, train, base, same, long_captions, build):
    changes = {"data": long_captions, "part.text_1.train": False}
    assert differs(train, base, name, {**changes, "dataset.text_windows": 1}, same)
    many, one = (build(name, {**changes, "dataset.text_windows": n}).store.batch(0) for n in (3, 1))
    for part in many.text:
        frozen = part == "text_1"
        wide, narrow = (b.text[part].hidden.shape[1] if frozen else b.text[part].ids.shape[1] for b in (many, one))
        assert (wide, narrow) == (3 * 77, 77)
    if name == "sdxl":
        assert torch.equal(many.size, one.size) and many.size.tolist()[0] == [64, 64, 0, 0, 64, 64]


def test_prompt_weights(train, base, same, long_captions):
    assert differs(train, base, "sd1", {"data": long_captions, "dataset.prompt_weights": True}, same)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_text_2(name, train, base):
    """Each encoder is trained or left alone by its own switch, at its own rate, up to its own end."""
    for text_1, text_2 in ((True, False), (False, True)):
        done = run_of(
            train, base, name, {"part.text_1.train": text_1, "part.text_2.train": text_2, "part.text_2.stop": 0.5, "train.visits": 2}
        )
        trained = {k.split("/")[1] for k in done.state()[0] if k.startswith("adapter/")}
        assert trained == {"unet"} | ({"text_1"} if text_1 else set()) | ({"text_2"} if text_2 else set())
        stems = {k.split("_")[1] for k in done.lora()}
        assert stems == {"unet"} | ({"te1"} if text_1 else set()) | ({"te2"} if text_2 else set())
        if text_2:
            rates = [e["rate"].get("text_2", 0) for e in done.events("step")]
            assert rates[0] > 0 and rates[-1] == 0


@pytest.mark.slow
def test_merge(train, base, load, tmp_path):
    """A base with a LoRA merged in is the base with the LoRA on it."""
    done = run_of(train, base, "sdxl", {"train.visits": 2})
    file = done.root / "lora.safetensors"
    merged = ModelConfig(source=str(base("sdxl")), merge=({"file": file, "strength": 0.7},))
    family, models = load("sdxl")
    other = bases.load(base("sdxl"), family, torch.float32, CPU, merged)
    pipe = family.pipeline(models)
    pipe.load_lora_weights(done.root, weight_name=file.name)
    pipe.set_adapters(pipe.get_active_adapters(), 0.7)
    draw = torch.Generator().manual_seed(0)
    noisy, t = torch.randn((2, 4, 8, 8), generator=draw), torch.tensor([100, 800])
    with torch.no_grad():
        found = [family.predict(m, noisy, t, family.conditions(m, ["zorp", "a"], (64, 64))) for m in (models, other)]
        bare = load("sdxl")[1]
        alone = family.predict(bare, noisy, t, family.conditions(bare, ["zorp", "a"], (64, 64)))
    change = (found[0] - alone).norm()
    assert change > 1e-3 and (found[0] - found[1]).norm() < 1e-3 * change
    again = run_of(train, base, "sdxl", {"model.merge": [{"file": str(file), "strength": 0.7}], "train.visits": 1})
    assert again.outcome == "finished"


@pytest.mark.parametrize("field, value", [("thumbnail", True), ("sidecars", ["png"])])
def test_pictures_of_a_lora_on_request(field, value, train, base):
    from trainer.formats.metadata import read_header

    shown = {"preview.enabled": True, "preview.steps": 1, "preview.prompts": ["zorp"], "train.visits": 1}
    for asked in (False, True):
        done = run_of(train, base, "sd1", {**shown, **({f"output.{field}": value} if asked else {"output.sidecars": []})})
        metadata, _ = read_header(done.root / "lora.safetensors")
        assert ("modelspec.thumbnail" in metadata) == (asked and field == "thumbnail")
        assert (done.root / "lora.png").exists() == (asked and field == "sidecars")
        assert (done.root / "lora.json").exists() == (asked and field == "thumbnail")


def test_training_starts_from_a_lora_with_the_files_own_ranks(train, base):
    """Ranks 3 and 5 in the file, 2 in the settings: the run goes on with 3 and 5, and starts where the file ended."""
    family = families.get("sdxl")
    models = family.load(base("sdxl"), torch.float32, CPU)
    paths = family.targets(models, "unet", ["attention"])[:2]
    draw = torch.Generator().manual_seed(0)
    layers = dict(models.parts["unet"].named_modules())
    deltas = []
    for path, rank in zip(paths, (3, 5), strict=True):
        out, size = layers[path].weight.shape
        pair = {"down": torch.randn((rank, size), generator=draw), "up": torch.randn((out, rank), generator=draw)}
        deltas.append(Delta("unet", path, "lora", pair, 0.25))
    from trainer.formats import kohya

    file = base("sdxl").parent / "start.safetensors"
    facts = Facts(base="small", rank=5, alpha=5.0)
    export(file, deltas, family="sdxl", naming="kohya", dtype="fp32", facts=facts, layers=kohya.layers(models.parts))
    done = run_of(train, base, "sdxl", {"adapter.start": str(file), "adapter.targets": ["attention"], "train.visits": 1}, stop_at=1)
    state = done.state()[0]
    assert [state[f"adapter/unet/{path}.down"].shape[0] for path in paths] == [3, 5]
    moved = state[f"adapter/unet/{paths[0]}.up"].double() @ state[f"adapter/unet/{paths[0]}.down"].double()
    wanted = deltas[0].tensors["up"].double() @ deltas[0].tensors["down"].double() * 0.25
    assert float((moved - wanted).norm() / wanted.norm()) < 0.2
    resumed = run_of(
        train,
        base,
        "sdxl",
        {"adapter.start": str(file), "adapter.targets": ["attention"], "train.visits": 1, "output.checkpoint_every": 1},
        root=done.root,
        resume=True,
    )
    assert resumed.outcome == "finished"
    assert [resumed.state()[0][f"adapter/unet/{path}.down"].shape[0] for path in paths] == [3, 5]


def test_a_base_that_says_nothing_of_its_prediction_is_measured_or_asked_for(train, base):
    """Random weights predict neither: the run ends with the sentence that says what to set."""
    from trainer.run_dir import RunError

    with pytest.raises((RunError, ValueError), match=r"does not say whether it predicts noise.*Set model\.prediction"):
        train({"model.source": str(base("sdxl", prediction=""))})
    done = train({"model.source": str(base("sdxl", prediction="")), "model.prediction": "v_prediction", "train.visits": 1})
    assert done.outcome == "finished"


def test_settings_of_another_family_are_no_silent_change(configure):
    """Defaults for all families are in one config; what does not apply has no effect there, and what contradicts is refused."""
    config = configure({"model.prediction": "v_prediction", "model.zero_terminal_snr": True})
    assert validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        configure({"model.prediction": "epsilon", "model.zero_terminal_snr": True})
    assert math.isclose(LossConfig().logit_std, 1.0)


# What comes after a run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_a_run_is_compared_and_its_file_worn(name, train, base, tmp_path):
    """The comparison and the playground's studio take a run of any family, and the LoRA changes what the studio draws."""
    import json

    from trainer.compare import compare
    from trainer.generate import Studio

    done = run_of(train, base, name, {"train.visits": 6, "preview.prompts": ["zorp"], "output.save_every": 6})
    assert compare(done.root, device="cpu") == "finished"
    found = json.loads((done.root / "results" / "results.json").read_text())
    assert found["pair"]["file"] in ("lora.safetensors", "lora-000006.safetensors") and len(found["scores"]) == 2
    studio = Studio(str(base(name)), device="cpu", say=pytest.fail)
    pictures = []
    for strength in (None, 1.0, 0.0):
        studio.wear(None if strength is None else done.root / "lora.safetensors", strength or 0.0)
        (image,) = studio.sample(["zorp"], [1], steps=2, size=(64, 64))
        pictures.append(np.asarray(image, int))
    assert np.abs(pictures[1] - pictures[0]).mean() > 1 and np.abs(pictures[2] - pictures[0]).max() <= 1


def test_t5(train, base, same):
    """SD3's third encoder is read where it is there, in 8 bits nearly alike, and left out on request with a sentence."""
    source = {"model.source": str(base("sd3", t5=True)), "train.visits": 1}
    done = {t5: run_of(train, base, "sd3", {**source, "model.t5": t5}) for t5 in ("auto", "8bit", "skip")}
    without = run_of(train, base, "sd3", {"train.visits": 1})
    ups = {k: torch.cat([t.flatten() for n, t in run.state()[0].items() if n.endswith(".up")]) for k, run in done.items()}
    assert not torch.equal(ups["auto"], ups["8bit"])
    assert (ups["auto"] - ups["8bit"]).norm() < (ups["auto"] - ups["skip"]).norm()
    assert same(done["skip"].lora(), without.lora())
    assert any("T5 is left out" in e["text"] for e in done["skip"].events("warning"))
    assert not any("T5" in e["text"] for e in done["auto"].events("warning"))


def test_an_attention_that_a_denoiser_does_not_take_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"train\.attention is xformers, which the transformer of sd3 does not take\. Set it to sdpa\."):
        families.get("sd3").load(tmp_path / "nothing there", torch.float32, torch.device("cpu"), attention="xformers")
