"""Sample images: the loop against diffusers' own pipelines, what is kept between calls, what happens when something ends it."""

import contextlib

import diffusers
import numpy as np
import pytest
import torch
from small_models import make_folder
from torch.profiler import ProfilerActivity, profile

from trainer import adapters, families, plan, preview, sampler
from trainer.config import ModelConfig
from trainer.families import WINDOW
from trainer.families.sources import DEMO
from trainer.run_dir import RunDir
from trainer.sampler import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LOOK = {"negative": "grey", "steps": 4, "guidance": 4.0, "size": (64, 64)}
PROMPTS, SEEDS = ["zorp, red", "a house", "an owl"], [3, 4, 5]
LONG = "a zorp, " + "red cat, " * 30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, ...): a small model's folder, made once for each kind."""
    made = {}

    def get(name, **options):
        key = name, *sorted(options.items())
        if key not in made:
            made[key] = make_folder(tmp_path_factory.mktemp(name) / "base", name, **options)
        return made[key]

    return get


@pytest.fixture
def load(base):
    def make(name, device=CPU, **options):
        family = families.get(name)
        return family, family.load(base(name, **options), torch.float32, device, ModelConfig())

    return make


@pytest.fixture
def demo():
    return families.get("sd1"), families.get("sd1").load(DEMO, torch.float32, CPU)


@contextlib.contextmanager
def watched(owner, name):
    """The arguments of each call of owner.name meanwhile."""
    whole, seen = getattr(owner, name), []

    def call(*args, **more):
        seen.append(args)
        return whole(*args, **more)

    setattr(owner, name, call)
    try:
        yield seen
    finally:
        delattr(owner, name)


def apart(some, others):
    return [int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(some, others, strict=True)]


def with_adapter(family, models, configure, **changes):
    """An adapter on the denoiser that does something."""
    config = configure({"adapter.targets": ["attention", "feed_forward", "projections", "convolutions"], **changes})
    adapter = adapters.build(config.adapter, models.parts, {"unet": family.targets(models, "unet", config.adapter.targets)}, 0)
    draw = torch.Generator().manual_seed(7)
    adapter.load({k: t if k.endswith(".down") else torch.randn(t.shape, generator=draw) * 0.05 for k, t in adapter.state().items()})
    return config, adapter


# The loop


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize(
    "name, options",
    [
        ("sd1", {}),
        ("sd2", {"prediction": "v_prediction"}),
        ("sdxl", {}),
        ("sdxl", {"prediction": "v_prediction", "zero_snr": True}),
        ("sd3", {}),
    ],
    ids=["sd1", "sd2-v", "sdxl", "sdxl-zero-snr", "sd3"],
)
def test_latents_equal_those_of_diffusers_own_pipeline(name, options, guidance, load, base):
    """To rounding, through its own text encoding and its own loop, on a picture that is no square."""
    family, models = load(name, **options)
    look = LOOK | {"guidance": guidance, "size": (96, 64)}
    with watched(models.vae, "decode") as decoded:
        family.sample(models, PROMPTS, SEEDS, **look)
    ours = torch.cat([z for z, *_ in decoded])
    lacks = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(base(name, **options), **lacks)
    pipe.set_progress_bar_config(disable=True)
    if name != "sd3":
        how = {"timestep_spacing": "trailing"} if "zero_snr" in options else {"use_karras_sigmas": True}
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **how)
    told = {"negative_prompt": ["grey"] * 3, "num_inference_steps": 4, "guidance_scale": guidance, "height": 64, "width": 96}
    if name == "sd3":
        told["max_sequence_length"] = 77
    theirs = pipe(PROMPTS, generator=[torch.Generator().manual_seed(s) for s in SEEDS], output_type="latent", **told).images
    theirs = theirs / models.vae.config.scaling_factor + (models.vae.config.shift_factor or 0)
    assert ours.shape == (3, models.vae.config.latent_channels, 8, 12)
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def test_guidance_is_one_pass_of_twice_the_rows_and_none_is_half_of_it(demo):
    family, models = demo
    for guidance, rows in ((4.0, 6), (1.0, 3)):
        with watched(models.parts["unet"], "forward") as passes:
            family.sample(models, PROMPTS, SEEDS, **LOOK | {"guidance": guidance})
        assert [len(x) for x, *_ in passes] == [rows] * 4
    plain, other = (family.sample(models, PROMPTS[:1], [3], **LOOK | {"guidance": 1.0, "negative": n}) for n in ("grey", "a house"))
    assert apart(plain, other) == [0]


def test_nothing_in_the_loop_waits_for_the_device(load):
    """No value is read back between the first step and the last."""
    for name in ("sd1", "sd3"):
        family, models = load(name)
        counts = []
        with profile(activities=[ProfilerActivity.CPU]) as seen:

            def tick(seen=seen, counts=counts):
                with torch.profiler.record_function("tick"):
                    counts.append(1)

            family.sample(models, PROMPTS, SEEDS, **LOOK, tick=tick)
        ticks = sorted(e.time_range.start for e in seen.events() if e.name == "tick")
        read = [e for e in seen.events() if e.name == "aten::_local_scalar_dense" and ticks[0] < e.time_range.start < ticks[-1]]
        assert len(ticks) == 4 and not read


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_a_picture_does_not_depend_on_how_long_other_prompts_are(name, load):
    family, models = load(name)
    models.windows = 3
    with watched(models.parts["unet"], "forward") as passes:
        together = family.sample(models, ["zorp, red", LONG], [3, 4], **LOOK)
    widths = {x[1 if name == "sd3" else 2].shape[1] for x in passes}
    assert widths == ({2 * WINDOW, 4 * WINDOW} if name == "sd3" else {WINDOW, 2 * WINDOW})
    alone = [family.sample(models, [p], [s], **LOOK)[0] for p, s in (("zorp, red", 3), (LONG, 4))]
    assert max(apart(together, alone)) <= 1


def test_a_size_that_does_not_fit_is_told(load):
    with pytest.raises(ValueError, match=r"size is 100 x 64; both sides must be divisible by 8\. Nearest: 96 x 64\."):
        load("sd1")[0].sample(load("sd1")[1], ["x"], [1], **LOOK | {"size": (100, 64)})
    family, models = load("sd3")
    with pytest.raises(ValueError, match="must be divisible by 16"):
        family.sample(models, ["x"], [1], **LOOK | {"size": (72, 64)})


# What is kept, and what is borrowed


def test_frozen_encoders_read_a_prompt_once(load):
    family, models = load("sdxl")
    models.park("text_1", "vae")
    make = Sampler(family, models, frozen=["text_1"])
    once = lambda prompts=PROMPTS, **more: make(prompts, SEEDS, **LOOK | more)  # noqa: E731
    with watched(models.parts["text_1"], "forward") as first, watched(models.parts["text_2"], "forward") as second:
        before = once()
        assert (len(first), len(second)) == (1, 1)
        again = once()
        assert (len(first), len(second)) == (1, 2)  # the other one may have learnt something
        once(negative="dark")
        once(["zorp, red", "a house", "a cat"])
        assert (len(first), len(second)) == (3, 4)
        once(["zorp, red", "a house", "a cat"], guidance=1.0, negative="not read")
        assert all("not read" not in t.texts for t in make._told.values())
    assert apart(before, again) == [0, 0, 0] and models.parked == {"text_1", "vae"}


def test_what_is_borrowed_comes_back_as_it_was(demo):
    _, models = demo
    models.park("vae")
    before = {n: (p, p.data_ptr(), p.clone()) for n, p in models.vae.named_parameters()}
    models.device = torch.device("meta")  # stands for a device with memory of its own
    with models.borrow("vae", "unet"):
        assert {p.device.type for p in models.vae.parameters()} == {"meta"}
        assert {p.device.type for p in models.parts["unet"].parameters()} == {"cpu"}  # it was not parked
    for name, p in models.vae.named_parameters():
        assert p is before[name][0] and p.data_ptr() == before[name][1] and torch.equal(p, before[name][2])


class Enough(Exception):
    pass


def test_what_tick_raises_ends_it_and_leaves_nothing_behind(demo, configure, tmp_path):
    family, models = demo
    config, adapter = with_adapter(family, models, configure)
    models.park("text_1", "vae")
    run = RunDir(tmp_path)
    run.create()
    shown = preview.Previews(config, family, models, ["unet"], (64, 64), run, pytest.fail)
    shown.adapter = adapter
    count = []

    def tick():
        count.append(1)
        if len(count) == 2:
            raise Enough

    with pytest.raises(Enough), adapter.at_rest():
        shown.sampler(PROMPTS, SEEDS, **LOOK, tick=tick)
    assert len(count) == 2 and models.parked == {"text_1", "vae"} and shown.sampler._pass is None
    assert all(m.training for m in adapter.layers["unet"].values()) and not any(g.fresh for g in adapter.weights.groups)
    assert len(shown.make(("zorp",), 0)) == 1 and len(list(run.previews.iterdir())) == 1


# The adapter's work copies


def test_work_copies_are_read_only_while_they_are_fresh(demo, configure):
    family, _ = demo
    models = family.load(DEMO, torch.bfloat16, CPU)
    _, adapter = with_adapter(family, models, configure)
    draw = torch.Generator().manual_seed(0)
    noisy, t = torch.randn((2, 4, 8, 8), generator=draw), torch.tensor([100, 800])
    cond = family.conditions(models, ["zorp", "a"], (64, 64))

    @torch.no_grad()
    def look():
        return family.predict(models, noisy, t, cond)

    base = adapter.weights.work.clone()
    first = look()
    with adapter.at_rest():
        assert (look() - first).abs().max() < 0.03 * first.abs().max()  # the same to rounding
    with torch.no_grad():
        for p in adapter.parameters("unet"):
            p.mul_(3)
    second = look()
    assert (second - first).abs().max() > 0.05 * first.abs().max()  # nothing old is read
    with adapter.at_rest():
        assert (look() - second).abs().max() < 0.03 * second.abs().max()
    assert not torch.equal(base, adapter.weights.work)
    adapter.weights.work.zero_()  # now they are old
    assert torch.equal(look(), second)


# Memory that is short


def test_a_picture_too_large_to_decode_is_decoded_in_tiles(demo, monkeypatch):
    family, models = demo
    whole, said, tried = models.vae.decode, [], []

    def decode(z, **more):
        tried.append((len(z), models.vae.use_tiling))
        if not models.vae.use_tiling:
            raise torch.OutOfMemoryError("no")
        return whole(z, **more)

    make = Sampler(family, models, say=said.append)
    look = LOOK | {"size": (136, 104)}
    want = make(PROMPTS, SEEDS, **look)
    monkeypatch.setattr(models.vae, "decode", decode)
    found = make(PROMPTS, SEEDS, **look)
    assert tried == [(3, False), (1, False), (1, True), (1, True), (1, True)]
    make(PROMPTS[:1], SEEDS[:1], **look)
    assert tried[5:] == [(1, True)] and len(said) == 1 and "decoded in overlapping tiles" in said[0]
    assert not models.vae.use_tiling and models.vae.tile_latent_min_size == models.vae.config.sample_size // 8
    near = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(found, want, strict=True)]
    assert all(image.size == (136, 104) for image in found) and max(near) < 12  # of 255, in tiles of 32 pixels


@pytest.mark.filterwarnings("ignore:The GPU's memory is too small")
@pytest.mark.parametrize("short", ["forward", "decode", "borrow"])
def test_where_memory_is_short_others_give_theirs_back_first(short, demo, monkeypatch):
    """What fails is tried again then, as it was: no tiles, no smaller batch, no less room next time."""
    family, models = demo
    full, asked = [True], []
    owner, name = {"forward": (models.parts["unet"], "forward"), "decode": (models.vae, "decode"), "borrow": (models.vae, "to")}[short]
    whole = getattr(owner, name)

    def work(*args, **more):
        if full[0]:
            raise torch.OutOfMemoryError("no")
        return whole(*args, **more)

    def room():
        asked.append(1)
        full[0] = False

    models.park("text_1", "vae")
    make = Sampler(family, models, room=room, say=pytest.fail)
    want = family.sample(models, PROMPTS, SEEDS, **LOOK)
    monkeypatch.setattr(owner, name, work)
    with watched(models.parts["unet"], "forward") if short != "forward" else contextlib.nullcontext([]) as passes:
        for turn in (1, 2):
            full[0] = True
            assert apart(make(PROMPTS, SEEDS, **LOOK), want) == [0, 0, 0] and len(asked) == turn
    assert {len(x) for x, *_ in passes} <= {6}
    full[0] = True
    with pytest.raises(torch.OutOfMemoryError):
        family.sample(models, PROMPTS, SEEDS, **LOOK)  # there is nobody to ask
    assert len(asked) == 2 and models.parked == {"text_1", "vae"} and not models.vae.use_tiling


def test_a_batch_too_large_to_denoise_is_halved(demo, monkeypatch):
    family, models = demo
    want = family.sample(models, PROMPTS, SEEDS, **LOOK)
    whole, passes = family.predict, []

    def predict(models, noisy, t, cond):
        passes.append(len(t))
        if len(t) > 2:
            raise torch.OutOfMemoryError("no")
        return whole(models, noisy, t, cond)

    monkeypatch.setattr(type(family), "predict", lambda self, *args: predict(*args))
    assert max(apart(family.sample(models, PROMPTS, SEEDS, **LOOK), want)) <= 2
    assert passes == [6, *[2] * 4, 4, *[2] * 8]


# The time they take


@pytest.mark.parametrize("cost", [0.0, 1.0, 10.0, 16.0, 18.0, 30.0, 60.0, 200.0])
@pytest.mark.parametrize("total", [40, 1500])
def test_previews_of_a_run_take_a_tenth_of_it_at_most(cost, total):
    """Of steps of one second; those at the start and the end apart."""
    cost *= total / 1500
    made = []
    for k in range(1, plan.TIMES):
        step = round(k * total / plan.TIMES)
        if plan.spares(len(made) * cost, cost, 1.0, step, total):
            made.append(step)
    share = (len(made) + 2) * cost / ((len(made) + 2) * cost + total)
    assert share <= plan.PREVIEW_SHARE + 1e-9 or not made
    assert len(made) == 7 or (len(made) + 3) * cost / ((len(made) + 3) * cost + total) > 0.8 * plan.PREVIEW_SHARE
    gaps = np.diff([0, *made, total])
    assert not made or max(gaps) <= 2.5 * total / (len(made) + 1)


@pytest.mark.slow
def test_fewer_previews_change_nothing_that_is_learnt(train, monkeypatch, same):
    shown = {"preview.enabled": True, "preview.steps": 2, "preview.prompts": ["zorp"], "train.visits": 8, "adapter.dropout": 0.2}
    done = {}
    for share in (1e-9, 1 - 1e-9):
        monkeypatch.setattr(plan, "PREVIEW_SHARE", share)
        done[share] = train(shown)
    few, many = done.values()
    assert [e["step"] for e in few.events("preview")] == [0, 16]
    assert [e["step"] for e in many.events("preview")] == [0, 5, 11, 16]
    assert same(few.lora(), many.lora())
    notes = [[e["text"] for e in run.events("warning") if e["text"].startswith("Sample images take")] for run in (few, many)]
    assert len(notes[0]) == 1 and not notes[1]
    monkeypatch.setattr(plan, "PREVIEW_SHARE", 1e-9)
    own = train(shown | {"preview.every": 4})
    assert [e["step"] for e in own.events("preview")] == [0, 4, 8, 12, 16] and same(few.lora(), own.lora())


# Graphs


def test_only_previews_on_cuda_are_captured(demo):
    family, models = demo
    assert "this run is on cpu" in Sampler(family, models, graphs=True, say=pytest.fail).why_eager
    assert Sampler(family, models).why_eager == "this is a single call"


class StandIn:
    """A graph that does its work again when it is replayed."""

    def __init__(self, work):
        self.work, self.out = work, work()

    def replay(self):
        self.out.copy_(self.work())


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_the_passes_of_a_batch_are_one_graph_that_gets_all_that_changes(name, load, monkeypatch):
    family, models = load(name)
    made = []

    def capture(work):
        made.append(StandIn(work))
        return made[-1], made[-1].out

    monkeypatch.setattr(sampler, "_capture", capture)
    monkeypatch.setattr(sampler, "BATCH_PIXELS", 64 * 64)
    make = Sampler(family, models)
    prompts, seeds = [*PROMPTS, LONG], [3, 4, 5, 6]
    eager = make(prompts, seeds, **LOOK)
    make.why_eager = None  # as on CUDA
    assert apart(make(prompts, seeds, **LOOK), eager) == [0] * 4
    assert len(made) == 2 and make.replays == 14 and make._pass is None  # batches of one picture; the long prompt's is another graph


def test_a_pass_that_cannot_be_captured_runs_eagerly_ever_after(demo, monkeypatch):
    family, models = demo
    said = []

    def capture(work):
        raise RuntimeError("operation not permitted.\nMore of it.")

    monkeypatch.setattr(sampler, "_capture", capture)
    make = Sampler(family, models, say=said.append)
    eager = make(PROMPTS, SEEDS, **LOOK)
    make.why_eager = None  # as on CUDA
    assert [apart(make(PROMPTS, SEEDS, **LOOK), eager) for _ in range(2)] == [[0] * 3] * 2
    assert said == ["Sample images are made without CUDA graphs, which is slower: operation not permitted."] and make.replays == 0


@pytest.fixture
def on_gpu(configure):
    """on_gpu(dtype, ...): (family, models, adapter) of the demo base on CUDA."""

    def make(dtype, **changes):
        family = families.get("sd1")
        models = family.load(DEMO, dtype, torch.device("cuda"))
        return family, models, with_adapter(family, models, configure, **changes)[1]

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_graphs_draw_what_eager_passes_draw(dtype, guidance, on_gpu):
    family, models, adapter = on_gpu(dtype)
    look = LOOK | {"guidance": guidance, "steps": 12, "size": (128, 128)}
    make = Sampler(family, models, frozen=models.text, graphs=True, say=pytest.fail)
    for turn in (1, 2):  # captured anew at each call
        with adapter.at_rest():
            graphs = make([*PROMPTS, LONG], [3, 4, 5, 6], **look)
            eager = family.sample(models, [*PROMPTS, LONG], [3, 4, 5, 6], **look)
        assert max(apart(graphs, eager)) <= (2 if dtype == torch.float32 else 16)
        assert make.replays == turn * 2 * 11 and make._pass is None  # two batches, of other widths
        with torch.no_grad():
            for p in adapter.parameters("unet"):
                p.mul_(1.5)
    with adapter.at_rest():
        assert max(apart(graphs, make([*PROMPTS, LONG], [3, 4, 5, 6], **look))) > 5  # the weights are read anew


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_every_family_has_graphs(name, load):
    family, models = load(name, torch.device("cuda"))
    make = Sampler(family, models, graphs=True, say=pytest.fail)
    assert max(apart(make(PROMPTS, SEEDS, **LOOK), family.sample(models, PROMPTS, SEEDS, **LOOK))) <= 2 and make.replays == 3


@pytest.mark.gpu
def test_replayed_passes_do_not_wait_for_the_device_and_leave_no_memory(on_gpu):
    family, models, adapter = on_gpu(torch.bfloat16)
    models.park("text_1", "vae")
    make = Sampler(family, models, frozen=models.text, graphs=True, say=pytest.fail)
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) % 8 == 2:  # the second step's pass was captured
            torch.cuda.set_sync_debug_mode("error")
        if len(ticks) % 8 == 0:
            torch.cuda.set_sync_debug_mode("default")

    held = []
    try:
        for _ in range(3):
            with adapter.at_rest():
                make(PROMPTS, SEEDS, **LOOK | {"steps": 8}, tick=tick)
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(ticks) == 24 and held[1] == held[2]
    assert all(p.device.type == "cpu" for part in ("text_1", "vae") for p in models.module(part).parameters())


@pytest.mark.gpu
def test_a_capture_that_fails_is_told_and_the_picture_made_without(on_gpu, monkeypatch):
    family, models, _ = on_gpu(torch.bfloat16)
    whole, said = family.predict, []

    def predict(self, models, noisy, t, cond):
        if torch.cuda.is_current_stream_capturing():
            noisy.sum().item()
        return whole(models, noisy, t, cond)

    want = family.sample(models, PROMPTS, SEEDS, **LOOK)
    monkeypatch.setattr(type(family), "predict", predict)
    make = Sampler(family, models, graphs=True, say=said.append)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        assert max(apart(make(PROMPTS, SEEDS, **LOOK), want)) <= 2
    assert len(said) == 1 and "without CUDA graphs" in said[0] and make.replays == 0
    assert torch.cuda.current_stream() == stream
    x, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the steps of the run can still be captured
        x += 1
    graph.replay()
    assert x.tolist() == [1] * 4
