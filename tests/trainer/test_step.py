"""The arithmetic of a step against float64 formulas written here from the papers, with diffusers' and torch's own parts."""

import dataclasses
import math
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextModel, CLIPTokenizer

from trainer import adapters, families, optimizers, plan
from trainer.config import ModelConfig
from trainer.data.store import Store
from trainer.families.sources import DEMO
from trainer.step import LossScale, Step

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TARGETS = ["attention", "feed_forward", "projections", "convolutions"]
WHOLE = torch.ones(1)


@pytest.fixture
def build(configure):
    """build(changes): what a run puts together before its first step, with an adapter that already changes something."""

    def make(changes=None, stops=None, fp16=False, reduce=None):
        config = configure({"adapter.targets": TARGETS, "adapter.alpha": 3.0, **(changes or {})})
        family = families.get("sd1")
        laid = plan.make(config, 128)
        models = family.load(DEMO, torch.float32, CPU, config.model)
        rates = {name: getattr(config.part, name) for name in family.parts if getattr(config.part, name).train}
        store = Store(config, laid, family, models, rates)
        targets = {name: family.targets(models, name, config.adapter.targets) for name in rates}
        adapter = adapters.build(config.adapter, models.parts, targets, config.train.seed)
        adapter.train(True)
        draw = torch.Generator().manual_seed(7)
        state = adapter.state()
        adapter.load({k: t if k.endswith(".down") else torch.randn(t.shape, generator=draw) * 0.02 for k, t in state.items()})
        groups = [{"params": adapter.parameters(name), "lr": part.learning_rate, "part": name} for name, part in rates.items()]
        optimizer = optimizers.build(config.optimizer, groups, CPU)
        total = len(laid.steps)
        step = Step(config, family, models, adapter, optimizer, {n: (stops or {}).get(n, total) for n in rates}, reduce, fp16)
        return SimpleNamespace(config=config, plan=laid, models=models, store=store, adapter=adapter, optimizer=optimizer, step=step)

    return make


def run_step(made, n, rate=1.0):
    batch = made.store.batch(n)
    draws = made.step.begin(n, batch, rate)
    made.step.grads(n, batch, draws, made.store.total_weight[n])
    made.step.update(n)


def alphas_cumprod():
    """Ho et al. 2020, with the scaled-linear betas of Stable Diffusion, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def reference(made, n, draws, masks=WHOLE, classes=None):
    """Loss of step n and its gradient for each adapter tensor, {name: tensor}, by plain models in float64 with W + alpha/rank * up @ down."""
    config, captions = made.config, made.plan.captions
    unet = UNet2DConditionModel.from_pretrained(DEMO / "unet").double()
    text = CLIPTextModel.from_pretrained(DEMO / "text_encoder").double()
    leaves = {k: t.double().clone().requires_grad_() for k, t in made.adapter.state().items()}
    merged = {"unet": dict(unet.named_parameters()), "text_1": dict(text.named_parameters())}
    for name in (k.removesuffix(".down") for k in leaves if k.endswith(".down")):
        part, path = name.split("/", 1)
        down, up = leaves[f"{name}.down"], leaves[f"{name}.up"]
        weight = merged[part][f"{path}.weight"]
        change = up.flatten(1) @ down.flatten(1) * (config.adapter.alpha / config.adapter.rank)
        merged[part][f"{path}.weight"] = weight.detach() + change.view(weight.shape)

    rows = made.plan.steps[n]
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")

    def read(words, weights):
        tokens = tokenizer(words, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        return functional_call(text, weights, (tokens,)).last_hidden_state

    hidden = read([captions[r.caption] for r in rows], merged["text_1"])

    batch, t = made.store.batch(n), draws.t
    x0 = batch.mean.double() + batch.std.double() * draws.posterior.double()
    noise = draws.noise.double()
    a = alphas_cumprod()[t].view(-1, 1, 1, 1)
    xt = a**0.5 * x0 + (1 - a) ** 0.5 * noise
    v = config.model.prediction == "v_prediction"
    target = a**0.5 * noise - (1 - a) ** 0.5 * x0 if v else noise
    guess = functional_call(unet, merged["unet"], (xt, t, hidden)).sample
    error = ((guess - target) ** 2 * masks.double()).flatten(1).mean(1)
    if config.loss.prior_weight:  # what the model says of the class is to be what it says without the adapter
        words = [classes[captions[r.caption]] for r in rows]
        base_text, base_unet = (dict(m.named_parameters()) for m in (text, unet))
        with torch.no_grad():
            before = functional_call(unet, base_unet, (xt, t, read(words, base_text))).sample
        after = functional_call(unet, merged["unet"], (xt, t, read(words, merged["text_1"]))).sample
        error = error + config.loss.prior_weight * ((after - before) ** 2).flatten(1).mean(1)
    snr = (a / (1 - a)).flatten()
    factor = torch.ones_like(snr)
    if config.loss.min_snr_gamma is not None:
        capped = torch.minimum(snr, torch.full_like(snr, config.loss.min_snr_gamma))
        factor = capped / (snr + 1) if v else capped / snr
    weight = torch.tensor([config.data[made.plan.images[r.image].source].weight for r in rows], dtype=torch.float64)
    loss = (weight * factor * error).sum() / weight.sum()
    loss.backward()
    return float(loss.detach()), {k: leaf.grad for k, leaf in leaves.items()}


@pytest.fixture
def two_folders(draw_pictures, tmp_path):
    return [
        {"folder": str(draw_pictures(tmp_path / "a", [(64, 64)] * 3, seed=1)), "weight": 4, "trigger": "zorp"},
        {"folder": str(draw_pictures(tmp_path / "b", [(64, 64)] * 2, seed=2)), "weight": 0.5},
    ]


@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_and_gradients_equal_a_float64_reference(gamma, prediction, build, two_folders):
    offset = 0.1 if gamma == 5.0 else 0.0
    changes = {"data": two_folders, "model.prediction": prediction, "loss.min_snr_gamma": gamma, "loss.noise_offset": offset}
    made = build(changes)
    sources = [{made.plan.images[r.image].source for r in rows} for rows in made.plan.steps]
    n = sources.index({0, 1})
    batch = made.store.batch(n)
    draws = made.step.begin(n, batch)
    draws.t.copy_(torch.tensor([20, 150, 600, 950])[: len(draws.t)])  # min-SNR with gamma 5 acts below 150
    made.step.grads(n, batch, draws, made.store.total_weight[n])
    loss, grads = reference(made, n, draws)
    assert float(made.step.loss) == pytest.approx(loss, rel=1e-5)
    live = {name: p.grad for part in ("unet", "text_1") for name, p in named(made.adapter, part)}
    assert live.keys() == grads.keys()
    for name, grad in grads.items():
        apart = float((live[name].double() - grad).norm() / grad.norm())
        assert apart < 1e-4, f"{name} is {apart:.1e} apart"


def check(made, n, masks=WHOLE, classes=None):
    batch = made.store.batch(n)
    draws = made.step.begin(n, batch)
    made.step.grads(n, batch, draws, made.store.total_weight[n])
    loss, grads = reference(made, n, draws, masks, classes)
    assert float(made.step.loss) == pytest.approx(loss, rel=1e-5)
    live = {name: p.grad for part in ("unet", "text_1") for name, p in named(made.adapter, part)}
    for name, grad in grads.items():
        apart = float((live[name].double() - grad).norm() / grad.norm())
        assert apart < 1e-4, f"{name} is {apart:.1e} apart"


@pytest.mark.parametrize("how", ["file", "alpha"])
def test_a_mask_weighs_the_loss_and_its_area_does_not(how, build, draw_pictures, tmp_path):
    """The left quarter of each odd image counts, the rest a fifth as much; the mean of the weights is 1."""
    folder = draw_pictures(tmp_path / "a", [(64, 64)] * 4)
    grey = PIL.Image.new("L", (64, 64), 0)
    grey.paste(255, (0, 0, 16, 64))
    for k in (1, 3):
        if how == "file":
            grey.save(folder / f"{k:02}-masklabel.png")
        else:
            picture = PIL.Image.open(folder / f"{k:02}.png")
            picture.putalpha(grey)
            picture.save(folder / f"{k:02}.png")
    changes = {"data": [{"folder": str(folder)}], "dataset.unmasked_weight": 0.2, "dataset.flip": True}
    made = build(changes | {"dataset.masks": {"file": "auto", "alpha": "alpha"}[how]})
    n = next(n for n, rows in enumerate(made.plan.steps) if {r.flip for r in rows if r.image % 2} == {False, True})
    weights = torch.full((1, 8, 8), 0.2)
    weights[..., :2] = 1
    weights /= 0.4  # a quarter of 1 and three of .2
    plain = torch.ones(1, 8, 8)
    masks = torch.stack([plain if r.image % 2 == 0 else weights.flip(-1) if r.flip else weights for r in made.plan.steps[n]])
    check(made, n, masks)
    assert build(changes | {"dataset.masks": "off"}).store.batch(n).mask is None


def test_prior_preservation_equals_its_formula_and_does_nothing_at_the_start(build, draw_pictures, tmp_path):
    folder = draw_pictures(tmp_path / "a", [(64, 64)] * 4)
    data = [{"folder": str(folder), "trigger": "zorp", "class_word": "owl"}]
    made = build({"data": data, "loss.prior_weight": 0.7})
    classes = {f"zorp, thing {k}, red, small": f"owl, thing {k}, red, small" for k in range(4)}
    check(made, 0, classes=classes)
    with made.adapter.disabled():
        batch = made.store.batch(0)
        draws = made.step.begin(0, batch)
        made.step.grads(0, batch, draws, made.store.total_weight[0])
        alone = build({"data": data})
        alone.step.grads(0, alone.store.batch(0), draws, alone.store.total_weight[0])
    with alone.adapter.disabled():
        alone.step.begin(0, batch)
        alone.step.grads(0, alone.store.batch(0), draws, alone.store.total_weight[0])
    assert float(made.step.loss) == pytest.approx(float(alone.step.loss), rel=1e-6)


def named(adapter, part):
    """(name as in `state`, parameter): `parameters` has the order of `state`."""
    names = [k for k in adapter.state() if k.startswith(f"{part}/")]
    return zip(names, adapter.parameters(part), strict=True)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_gradients_of_parts_add_up_to_those_of_the_whole(accumulation, build, two_folders):
    from trainer.processes import Processes

    made = build({"data": two_folders})
    n = next(k for k, rows in enumerate(made.plan.steps) if len(rows) == 4)
    batch = made.store.batch(n)
    draws = made.step.begin(n, batch)
    for index, valid in Processes("cpu").rows(4, accumulation):
        index = torch.tensor(index)
        made.step.grads(n, batch.rows(index, torch.tensor(valid)), draws.rows(index), made.store.total_weight[n])
    loss, grads = reference(made, n, draws)
    assert float(made.step.loss) == pytest.approx(loss, rel=1e-5)
    for name, p in named(made.adapter, "unet"):
        assert float((p.grad.double() - grads[name]).norm() / grads[name].norm()) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_targets_are_those_of_diffusers(prediction):
    family = families.get("sd1")
    models = family.load(DEMO, torch.float32, CPU, ModelConfig(prediction=prediction))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((9, 4, 6, 5), generator=draw) for _ in range(2))
    t = torch.tensor([0, 1, 10, 100, 250, 500, 750, 998, 999])
    noisy, target = family.process(models, latents, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, t))
    torch.testing.assert_close(target, noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, t))


def test_noise_offset_shifts_each_channel_and_nothing_else(build):
    plain, shifted = build(), build({"loss.noise_offset": 0.5})
    one, other = (m.step.begin(0, m.store.batch(0)) for m in (plain, shifted))
    assert torch.equal(one.posterior, other.posterior)
    shift = other.noise - one.noise
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-6, rtol=0)
    assert 0.2 < float(shift.mean((2, 3)).std()) < 1.0


def test_draws_depend_on_the_seed_and_the_step_alone(build):
    made = build()
    size = made.store.sizes[0]
    n = next(k for k, s in enumerate(made.store.sizes) if k and s == size)
    batch = made.store.batch(0)
    first = made.step.begin(0, batch)
    torch.manual_seed(99)
    torch.rand(1000)
    made.step.begin(n, made.store.batch(n))
    again, other = made.step.begin(0, batch), made.step.begin(n, made.store.batch(n))
    for name in ("posterior", "noise", "t"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.noise, first.posterior)


def test_latents_are_drawn_from_the_posterior(build):
    """A step's latents are mean + std * draw: with a std of 0 the draw is nothing, with a large one it shows."""
    made = build()
    batch = made.store.batch(0)
    losses = []
    for factor in (0, 1, 30):
        wide = dataclasses.replace(batch, std=batch.std * factor)
        draws = made.step.begin(0, wide)
        made.step.grads(0, wide, draws, made.store.total_weight[0])
        losses.append(float(made.step.loss))
    assert len(set(losses)) == 3


@pytest.mark.parametrize("limit", [0.002, 1e9, None])
def test_clipping_and_adamw_equal_the_formulas(limit, build):
    """Three steps of Loshchilov & Hutter 2019, algorithm 2, in float64, from the gradients of the step."""
    made = build({"train.max_grad_norm": limit, "optimizer.weight_decay": 0.1, "optimizer.beta1": 0.8, "optimizer.beta2": 0.95})
    rates = {p: rate for part, rate in (("unet", 1e-3), ("text_1", 5e-4)) for p in made.adapter.parameters(part)}
    w = {p: p.detach().double() for p in rates}
    m, v = ({p: torch.zeros_like(x) for p, x in w.items()} for _ in range(2))
    clipped = 0
    for n, factor in enumerate((0.25, 1.0, 0.5)):
        batch = made.store.batch(n)
        made.step.grads(n, batch, made.step.begin(n, batch, factor), made.store.total_weight[n])
        grads = {p: p.grad.double().clone() for p in rates}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        clipped += limit is not None and norm > limit
        made.step.update(n)
        for p, rate in rates.items():
            g = grads[p] * min(1.0, limit / norm if limit else 1.0)
            m[p] = 0.8 * m[p] + 0.2 * g
            v[p] = 0.95 * v[p] + 0.05 * g**2
            direction = (m[p] / (1 - 0.8 ** (n + 1))) / ((v[p] / (1 - 0.95 ** (n + 1))).sqrt() + 1e-8)
            w[p] = w[p] - rate * factor * (direction + 0.1 * w[p])
    assert clipped == (3 if limit == 0.002 else 0)
    for p in rates:
        assert float((p.detach().double() - w[p]).abs().max()) < 1e-6


def test_the_mean_loss_is_read_and_begun_anew(build):
    made = build()
    seen = []
    for n in range(3):
        run_step(made, n)
        seen.append(float(made.step.loss))
    assert made.step.read_loss(3) == pytest.approx(sum(seen) / 3, rel=1e-6)
    run_step(made, 3)
    assert made.step.read_loss(1) == pytest.approx(float(made.step.loss))


def count_reads(call):
    """How often the host reads a number of the device, but for torch's CPU kernel of AdamW, which reads its own step counts."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    reads = 0
    for event in seen.events():
        if event.name == "aten::_local_scalar_dense":
            above = event.cpu_parent
            while above is not None and above.name != "aten::_fused_adamw_":
                above = above.cpu_parent
            reads += above is None
    return reads


def test_the_counter_of_reads_counts():
    assert count_reads(lambda: torch.ones(3).sum().item()) == 1
    assert count_reads(lambda: bool(torch.ones(3).sum() > 2)) == 1


LOOKED_AT = {
    "trained": {},
    "text encoder frozen": {"part.text_1.train": False, "adapter.dropout": 0.1},
    "noise offset, no clipping": {"loss.noise_offset": 0.1, "train.max_grad_norm": None},
}


@pytest.mark.parametrize("changes", LOOKED_AT.values(), ids=LOOKED_AT.keys())
@pytest.mark.parametrize("fp16", [False, True], ids=["", "fp16"])
def test_a_step_never_waits_for_the_device(changes, fp16, build):
    made = build(changes, fp16=fp16)
    run_step(made, 0)
    index, valid = torch.tensor([1, 0]), torch.tensor([1.0, 0.0])

    def step():
        batch = made.store.batch(1)
        draws = made.step.begin(1, batch, 0.5)
        made.step.grads(1, batch.rows(index, valid), draws.rows(index), made.store.total_weight[1])
        made.step.update(1)

    assert count_reads(step) == 0


def test_a_part_that_has_stopped_gets_no_gradient_and_stays(build, same):
    made = build(stops={"text_1": 2})
    run_step(made, 0)
    run_step(made, 1)
    assert all(float(p.grad.abs().sum()) > 0 for part in ("unet", "text_1") for p in made.adapter.parameters(part))
    before = {k: t.clone() for k, t in made.adapter.state().items()}
    batch = made.store.batch(2)
    made.step.grads(2, batch, made.step.begin(2, batch), made.store.total_weight[2])
    assert all(p.grad is None and not p.requires_grad for p in made.adapter.parameters("text_1"))
    made.step.update(2)
    after = made.adapter.state()
    assert [k for k in after if torch.equal(after[k], before[k])] == [k for k in after if k.startswith("text_1/")]


def test_nothing_of_the_base_gets_a_gradient(build):
    made = build()
    run_step(made, 0)
    trained = {id(p) for part in ("unet", "text_1") for p in made.adapter.parameters(part)}
    others = [p for module in (*made.models.parts.values(), made.models.vae) for p in module.parameters() if id(p) not in trained]
    assert len(others) > 400
    assert all(p.grad is None and not p.requires_grad for p in others)


def test_gradients_are_reduced_over_processes_with_the_loss(build):
    """Two processes with the same rows: the sum is twice one's, which is what `total_weight` over all rows makes of them."""
    seen = []

    def double(tensors):
        seen.append(len(tensors))
        for t in tensors:
            t.mul_(2)

    made, alone = build(reduce=double), build()
    for m, share in ((made, 2), (alone, 1)):
        batch = m.store.batch(0)
        m.step.grads(0, batch, m.step.begin(0, batch), m.store.total_weight[0] * share)
        m.step.exchange(0)
        m.step.update(0)
    assert seen == [2]  # all gradients as one tensor, and the loss
    for part in ("unet", "text_1"):
        for p, q in zip(made.adapter.parameters(part), alone.adapter.parameters(part), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)
    assert float(made.step.loss) == pytest.approx(float(alone.step.loss), rel=1e-6)


def moments(made):
    state = made.optimizer.state
    return [{k: v.clone() for k, v in state[p].items()} for part in ("unet", "text_1") for p in made.adapter.parameters(part)]


def test_the_loss_scale_takes_itself_out_again(build, same):
    scaled, plain = build(fp16=True), build()
    for n in range(2):
        run_step(scaled, n)
        run_step(plain, n)
    one, other = scaled.adapter.state(), plain.adapter.state()
    assert all(torch.allclose(one[k], other[k], rtol=0, atol=1e-6) for k in one)
    assert float(scaled.step.loss) == pytest.approx(float(plain.step.loss), rel=1e-6)
    assert float(scaled.step.scale.scale) == 2.0**14
    assert float(scaled.step.scale.good) == 2


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_overflow_leaves_parameters_and_moments_and_halves_the_scale(value, build, same):
    made = build(fp16=True)
    run_step(made, 0)
    before, kept = {k: t.clone() for k, t in made.adapter.state().items()}, moments(made)
    batch = made.store.batch(1)
    made.step.grads(1, batch, made.step.begin(1, batch), made.store.total_weight[1])
    made.adapter.parameters("text_1")[3].grad.view(-1)[5] = value
    made.step.update(1)
    assert same(before, made.adapter.state())
    assert all(same(a, b) for a, b in zip(kept, moments(made), strict=True))
    assert float(made.step.scale.scale) == 2.0**13
    assert float(made.step.scale.good) == 0
    run_step(made, 2)
    assert not same(before, made.adapter.state())


def test_an_overflow_in_the_first_step_leaves_no_trace(build, same):
    """The optimizer makes its moments in its first step; an overflow there must not count as a step of Adam's bias correction."""
    made, other = build(fp16=True), build(fp16=True)
    batch = made.store.batch(0)
    made.step.grads(0, batch, made.step.begin(0, batch), made.store.total_weight[0])
    made.adapter.parameters("unet")[0].grad.fill_(math.inf)
    made.step.update(0)
    for m in (made, other):
        run_step(m, 1)
        run_step(m, 2)
    one, two = made.adapter.state(), other.adapter.state()
    assert all(torch.allclose(one[k], two[k], rtol=0, atol=1e-6) for k in one)


def test_the_loss_scale_grows_after_1000_good_steps_and_has_bounds():
    scale, good, bad = LossScale(CPU), torch.tensor(True), torch.tensor(False)
    start = float(scale.scale)
    for _ in range(999):
        scale.update(good)
    assert float(scale.scale) == start
    scale.update(good)
    assert float(scale.scale) == 2 * start
    for _ in range(999):
        scale.update(good)
    scale.update(bad)
    assert float(scale.scale) == start
    for _ in range(999):
        scale.update(good)
    assert float(scale.scale) == start
    for _ in range(60):
        scale.update(bad)
    assert float(scale.scale) == 1
    kept = LossScale(CPU)
    kept.load({k: t.clone() for k, t in scale.state().items()})
    assert float(kept.scale) == 1
    for _ in range(40_000):
        scale.update(good)
    assert float(scale.scale) == 2.0**24
