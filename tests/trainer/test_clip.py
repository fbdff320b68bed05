"""Captions into tokens and states: against diffusers' own pipelines, against loops and formulas written out by hand."""

import copy
import dataclasses
import functools

import diffusers
import pytest
import torch
from small_models import make_folder

from trainer import families
from trainer.config import ModelConfig
from trainer.families import clip

pytestmark = pytest.mark.usefixtures("one_thread")
PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
CPU = torch.device("cpu")
SHORT = ["a red cat, the zorp", "", "red " * 75]  # the last fills its window to the brim
LONG = "a red cat on the grass, " * 25  # 175 tokens of CLIP: three windows
PAD = {"sd1": 49407, "sd2": 0, "sdxl": 49407, "sd3": 49407}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family): a small model with all its text encoders."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_folder(tmp_path_factory.mktemp(family) / family, family, t5=family == "sd3")
        return made[family]

    return get


@pytest.fixture(scope="module")
def load(folder):
    """load(family, **settings of the model): (the family, its models)."""

    @functools.cache
    def read(name, **settings):
        return families.get(name).load(folder(name), torch.float32, CPU, ModelConfig(**settings))

    return lambda name, **settings: (families.get(name), dataclasses.replace(read(name, **settings)))


@pytest.fixture(scope="module")
def pipeline(folder):
    """pipeline(family): diffusers' own, loaded by diffusers."""

    @functools.cache
    def read(name):
        found = PIPELINES[name].from_pretrained(folder(name), torch_dtype=torch.float32)
        if not hasattr(found.text_encoder, "text_model"):  # where diffusers 0.42 looks for the last norm, and transformers 5.6 has no level
            object.__setattr__(found.text_encoder, "text_model", found.text_encoder)
        return found

    return read


def states(family, models, captions) -> dict:
    return {part: family.encode_text(models, part, family.tokenize(models, part, captions)) for part in models.text}


def close(one, other) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)


# Weights of words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain words", [("plain words", 1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((twice))", [("twice", 1.21)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("([even])", [("even", 1)]),
        ("(number:1.3)", [("number", 1.3)]),
        ("(number: 0.5 ) after", [("number", 0.5), (" after", 1)]),
        ("(none:0)", [("none", 0)]),
        ("(bare:.5)", [("bare", 0.5)]),
        ("(less than none:-1)", [("less than none", -1)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("((both:1.2))", [("both", 1.32)]),
        ("(not [all:1.5])", [("not ", 1.1), ("all:1.5", 1)]),
        ("(unclosed", [("unclosed", 1.1)]),
        ("[un(closed", [("un", 1 / 1.1), ("closed", 1)]),
        ("too many) here]", [("too many) here]", 1)]),
        ("outside:1.2) of any", [("outside:1.2) of any", 1)]),
        (r"face \(close\), \[x\], \\", [("face (close), [x], \\", 1)]),
        (r"(a\):1.2)", [("a)", 1.2)]),
        ("(time 12:30)", [("time 12", 30)]),
        ("(not a number:1.2.3)", [("not a number:1.2.3", 1.1)]),
        ("(one)(piece)", [("onepiece", 1.1)]),
    ],
)
def test_weights_of_words(text, wanted):
    found = clip.parse_weights(text)
    assert [words for words, _ in found] == [words for words, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])


# Tokens


def test_tokens_are_windows_of_75_with_their_ends(load):
    for name, (first, last) in {"sd1": (49406, 49407), "sd2": (49406, 49407)}.items():
        _, models = load(name)
        words = models.tokenizers["text_1"]
        pad = PAD[name]
        told = clip.tokenize(words, ["", "zorp", "red " * 75, "red " * 76, "red " * 500])
        zorp, red = (words(w, add_special_tokens=False).input_ids for w in ("zorp", "red"))
        assert len(red) == 1
        assert told.windows == (1, 1, 1, 2, 3)
        assert told.ids.dtype == torch.int64
        assert told.weights is None
        empty = [first, last, *[pad] * 75]
        full = [first, *red * 75, last]
        assert told.ids.tolist() == [
            empty * 3,
            [first, *zorp, last, *[pad] * (75 - len(zorp)), *empty, *empty],
            full + empty * 2,
            [*full, first, *red, last, *[pad] * 74, *empty],
            full * 3,
        ]
        assert clip.tokenize(words, ["red " * 500, ""], max_windows=1).ids.tolist() == [full, empty]


def test_count_is_that_of_the_words_alone(load):
    _, models = load("sd1")
    words = models.tokenizers["text_1"]
    assert [clip.count(words, c) for c in ("", "red", "red cat", "red " * 300)] == [0, 1, 2, 300]


def test_weights_stand_at_their_tokens(load):
    _, models = load("sd1")
    words = models.tokenizers["text_1"]
    told = clip.tokenize(words, ["red (cat:1.5) red", "red"], weighted=True)
    bare = clip.tokenize(words, ["red cat red", "red"])
    assert torch.equal(told.ids, bare.ids)
    assert told.weights.shape == (2, 77)
    assert told.weights[0, :5].tolist() == [1, 1, 1.5, 1, 1]
    assert (told.weights[0, 5:] == 1).all()
    assert (told.weights[1] == 1).all()
    assert clip.tokenize(words, ["red", r"\(red\)"], weighted=True).weights is None
    assert clip.tokenize(words, ["(red:1.5)"]).ids.tolist() != clip.tokenize(words, ["red"]).ids.tolist()


def test_a_weight_moves_to_the_next_window_with_its_token(load):
    _, models = load("sd1")
    told = clip.tokenize(models.tokenizers["text_1"], ["red " * 75 + "(cat:2)"], weighted=True)
    assert told.weights.flatten().nonzero().numel() == 154
    assert (told.weights[0] == 2).nonzero().flatten().tolist() == [78]


def test_rows_take_captions_and_windows(load):
    _, models = load("sd1")
    told = clip.tokenize(models.tokenizers["text_1"], ["red", "(cat:2)", LONG], weighted=True)
    some = told.rows(torch.tensor([1, 0]), 1)
    assert torch.equal(some.ids, told.ids[[1, 0], :77])
    assert torch.equal(some.weights, told.weights[[1, 0], :77])
    assert torch.equal(told.rows(torch.tensor([2])).ids, told.ids[2:])
    moved = told.to(CPU)
    assert moved.windows == told.windows == (1, 1, 3)


# States


@torch.no_grad()
@pytest.mark.parametrize(("name", "skip"), [("sd1", 1), ("sd1", 2), ("sd1", 3), ("sd2", 1)])
def test_sd1_and_sd2_are_what_diffusers_makes(name, skip, load, pipeline):
    family, models = load(name, clip_skip=skip)
    found = states(family, models, SHORT)["text_1"]
    asked = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": skip - 1 or None}
    wanted = pipeline(name).encode_prompt(SHORT, CPU, **asked)[0]
    assert close(found.hidden, wanted)
    assert found.pooled is None
    assert not close(found.hidden, pipeline(name).encode_prompt(SHORT, CPU, **asked | {"clip_skip": skip})[0])


def test_sd2_reads_its_last_layer_whatever_clip_skip_says(load):
    one, two = (states(*load("sd2", clip_skip=k), ["a cat"])["text_1"].hidden for k in (1, 2))
    assert torch.equal(one, two)


@torch.no_grad()
def test_sdxl_is_what_diffusers_makes(load, pipeline):
    family, models = load("sdxl")
    found = family.condition(models, states(family, models, SHORT), torch.zeros(3, 6))
    wanted, _, pooled, _ = pipeline("sdxl").encode_prompt(SHORT, device=CPU, do_classifier_free_guidance=False)
    assert found.hidden.shape == (3, 77, 32 + 24)
    assert close(found.hidden, wanted)
    assert close(found.pooled, pooled)


@torch.no_grad()
@pytest.mark.parametrize("t5", ["auto", "skip"])
def test_sd3_is_what_diffusers_makes(t5, load, pipeline):
    family, models = load("sd3", t5=t5)
    found = family.condition(models, states(family, models, SHORT), None)
    own = copy.copy(pipeline("sd3"))
    if t5 == "skip":
        own.text_encoder_3 = None
    asked = {"device": CPU, "do_classifier_free_guidance": False, "max_sequence_length": 77}
    wanted, _, pooled, _ = own.encode_prompt(SHORT, SHORT, SHORT, **asked)
    assert found.hidden.shape == (3, 154, 80)
    assert close(found.hidden, wanted)
    assert close(found.pooled, pooled)


@torch.no_grad()
@pytest.mark.parametrize("caption", ["", "a red cat", "red " * 76, "red " * 77, LONG])
def test_t5_reads_as_many_times_77_as_a_caption_takes(caption, load, pipeline):
    family, models = load("sd3")
    told = family.tokenize(models, "text_3", [caption])
    (windows,) = told.windows
    own = pipeline("sd3")
    length = len(own.tokenizer_3(caption).input_ids)
    assert windows == min(3, -(-length // 77))
    wanted = own._get_t5_prompt_embeds(caption, max_sequence_length=77 * windows, device=CPU)
    assert close(family.encode_text(models, "text_3", told).hidden, wanted)
    together = family.tokenize(models, "text_3", ["a", caption, LONG])
    assert close(family.encode_text(models, "text_3", together).hidden[1:2, : 77 * windows], wanted)
    cut = together.rows(torch.tensor([1]), windows)
    assert close(family.encode_text(models, "text_3", cut).hidden, wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "part"), [("sd1", "text_1"), ("sd2", "text_1"), ("sdxl", "text_1"), ("sdxl", "text_2"), ("sd3", "text_2")]
)
def test_windows_are_read_one_by_one(name, part, load):
    family, models = load(name)
    captions = [LONG, "a red cat"]
    found = states(family, models, captions)[part]
    words, model = models.tokenizers[part], models.parts[part]
    for row, caption in enumerate(captions):
        ids = words(caption, add_special_tokens=False, verbose=False).input_ids
        hidden, pooled = [], []
        for at in (0, 75, 150):
            own = ids[at : at + 75]
            window = [words.bos_token_id, *own, words.eos_token_id]
            window += [words.pad_token_id] * (77 - len(window))
            out = model(torch.tensor([window]), output_hidden_states=True)
            hidden.append(out.last_hidden_state if name in ("sd1", "sd2") else out.hidden_states[-2])
            pooled.append(getattr(out, "text_embeds", None))
        assert close(found.hidden[row], torch.cat(hidden, 1)[0])
        assert found.pooled is None if pooled[0] is None else close(found.pooled[row], pooled[0][0])


@torch.no_grad()
def test_a_captions_states_do_not_hang_on_the_others(load):
    for name in ("sdxl", "sd3"):
        family, models = load(name)
        alone, together = (states(family, models, c) for c in (["a red cat"], ["a red cat", LONG]))
        for part, told in alone.items():
            row = together[part].rows(torch.tensor([0]), told.hidden.shape[1] // 77)
            assert close(row.hidden, told.hidden)
            assert told.pooled is None or close(row.pooled, told.pooled)


@torch.no_grad()
@pytest.mark.parametrize(("name", "part"), [("sd1", "text_1"), ("sdxl", "text_2"), ("sd3", "text_3")])
def test_weights_multiply_states_and_keep_each_windows_mean(name, part, load):
    family, models = load(name)
    models.weighted = True
    words = models.tokenizers[part]
    caption = "a (red:1.5) cat, " + "the red " * 50 + "[zorp]"
    told, bare = (
        family.tokenize(models, part, [c, "red"]) for c in (caption, caption.replace("(red:1.5)", "red").replace("[zorp]", "zorp"))
    )
    assert torch.equal(told.ids, bare.ids)
    hit = {1.5: words("red", add_special_tokens=False).input_ids, 1 / 1.1: words("zorp", add_special_tokens=False).input_ids}
    assert {round(w, 4) for w in told.weights.unique().tolist()} == {1.0, 1.5, round(1 / 1.1, 4)}
    for weight, ids in hit.items():
        assert told.ids[0][(told.weights[0] - weight).abs() < 1e-6].tolist() == ids
    found, plain = (family.encode_text(models, part, t) for t in (told, bare))
    z = plain.hidden[0].double()
    wanted = z * told.weights[0].double()[:, None]
    for window in range(len(z) // 77):
        own = slice(77 * window, 77 * window + 77)
        wanted[own] *= z[own].mean() / wanted[own].mean()
    torch.testing.assert_close(found.hidden[0].double(), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.hidden[0], plain.hidden[0], rtol=1e-2)
    torch.testing.assert_close(found.hidden[1], plain.hidden[1])
    if plain.pooled is not None:
        assert torch.equal(found.pooled, plain.pooled)


@pytest.mark.parametrize(("name", "part", "pooled"), [("sd1", "text_1", False), ("sdxl", "text_1", False), ("sdxl", "text_2", True)])
def test_gradients_reach_the_layers_that_are_read(name, part, pooled, load):
    family, models = load(name)
    model = copy.deepcopy(models.parts[part]).requires_grad_(True)
    models.parts = models.parts | {part: model}
    found = family.encode_text(models, part, family.tokenize(models, part, [LONG]))
    (found.hidden.square().mean() + (found.pooled.square().mean() if pooled else 0)).backward()
    layers = getattr(model, "text_model", model).encoder.layers
    reached = [bool(layer.self_attn.q_proj.weight.grad is not None and layer.self_attn.q_proj.weight.grad.any()) for layer in layers]
    assert reached == [True, True, name == "sd1" or pooled]


@torch.no_grad()
def test_bf16_states_stay_bf16(folder):
    family = families.get("sd1")
    models = family.load(folder("sd1"), torch.bfloat16, CPU)
    models.weighted = True
    found = states(family, models, ["a (red:1.3) cat"])["text_1"].hidden
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
