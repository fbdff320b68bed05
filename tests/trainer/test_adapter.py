import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextModel

from trainer import adapters, families
from trainer.config import LoraConfig
from trainer.families.common import TEXT_TARGETS
from trainer.families.sources import DEMO
from trainer.families.unet import UNET_TARGETS

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [("unet", kind) for kind in UNET_TARGETS] + [("text_1", kind) for kind in TEXT_TARGETS]
EVERYTHING = ["attention", "feed_forward", "projections", "convolutions"]
# counted in the demo base's configuration by hand: 7 transformer blocks of the UNet (2 down, 1 mid, 4 up), 3 layers of the text encoder
LAYERS = {
    ("unet", "attention"): 7 * 8,
    ("unet", "feed_forward"): 7 * 2,
    ("unet", "projections"): 7 * 2,
    ("unet", "convolutions"): 31,
    ("text_1", "attention"): 3 * 4,
    ("text_1", "feed_forward"): 3 * 2,
}


@pytest.fixture
def attach():
    """attach(kinds): a fresh base with an adapter whose `up` is filled, unless `filled` is False."""

    def make(kinds=("attention",), parts=("unet", "text_1"), dtype=torch.float32, seed=0, filled=True, **options):
        family = families.get("sd1")
        models = family.load(DEMO, dtype, torch.device("cpu"))
        targets = {p: family.targets(models, p, kinds) for p in parts}
        options = {"rank": 3, "alpha": 4.5, **options}
        adapter = adapters.build(LoraConfig(**options), models.parts, {p: t for p, t in targets.items() if t}, seed)
        if filled:
            draw = torch.Generator().manual_seed(1)
            state = adapter.state()
            adapter.load({k: t if k.endswith(".down") else torch.randn(t.shape, generator=draw) * 0.1 for k, t in state.items()})
        adapter.train(False)
        return models, adapter

    return make


@torch.no_grad()
def outputs(parts) -> list[torch.Tensor]:
    """What the UNet and the text encoder give for fixed inputs."""
    draw = torch.Generator().manual_seed(3)
    unet, text = parts["unet"], parts["text_1"]
    hidden = text(torch.arange(1, 155).view(2, 77)).last_hidden_state
    noisy = torch.randn((2, 4, 8, 8), generator=draw).to(unet.dtype)
    return [hidden, unet(noisy, torch.tensor([10, 700]), hidden).sample]


def base_outputs(changes=()) -> list[torch.Tensor]:
    """The same of a base on its own, loaded by diffusers and transformers, with `changes` (deltas) added to its weights."""
    parts = {"unet": UNet2DConditionModel.from_pretrained(DEMO / "unet", torch_dtype=torch.float32).eval()}
    parts["unet"].to(memory_format=torch.channels_last)
    parts["text_1"] = CLIPTextModel.from_pretrained(DEMO / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        for d in changes:
            weight = parts[d.part].get_submodule(d.path).weight
            weight += (d.scale * d.tensors["up"].flatten(1) @ d.tensors["down"].flatten(1)).view(weight.shape)
    return outputs(parts)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one, other) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("part", "kind"), CASES)
def test_every_kind_attaches_and_is_what_peft_says(part, kind, attach):
    models, adapter = attach([kind], [part])
    live = {n: m for n, m in models.parts[part].named_modules() if isinstance(m, LoraLayer)}
    deltas = list(adapter.deltas())
    assert [(d.part, d.path) for d in deltas] == [(part, n) for n in live]
    assert len(deltas) == LAYERS[part, kind]
    assert len(adapter.parameters(part)) == 2 * len(deltas)
    for d in deltas:
        product = d.scale * d.tensors["up"].flatten(1) @ d.tensors["down"].flatten(1)
        wanted = live[d.path].get_delta_weight("default")
        assert bool(wanted.any())
        torch.testing.assert_close(product.view(wanted.shape), wanted)
    with_adapter = outputs(models.parts)
    assert not equal(with_adapter, base_outputs())
    assert close(with_adapter, base_outputs(deltas))


@pytest.mark.parametrize("part", ["unet", "text_1"])
def test_the_kinds_do_not_overlap(part, attach):
    alone = [d.path for kind in EVERYTHING for d in attach([kind], [part])[1].deltas()]
    assert len(alone) == len(set(alone))
    assert set(alone) == {d.path for d in attach(EVERYTHING, [part])[1].deltas()}


def test_it_starts_as_the_base_alone(attach):
    models, adapter = attach(EVERYTHING, filled=False)
    assert equal(outputs(models.parts), base_outputs())
    assert all(not d.tensors["up"].any() and d.tensors["down"].any() for d in adapter.deltas())


def test_state_and_load_go_round(attach, same):
    models, adapter = attach(EVERYTHING)
    state = {k: t.clone() for k, t in adapter.state().items()}
    other_models, other = attach(EVERYTHING, seed=5, filled=False)
    assert not same(state, other.state())
    other.load(state)
    assert same(state, other.state())
    assert equal(outputs(models.parts), outputs(other_models.parts))


def test_another_adapters_state_is_refused(attach):
    state = attach()[1].state()
    for options in ({"rank": 4}, {"kinds": ["feed_forward"]}, {"parts": ["unet"]}):
        with pytest.raises(ValueError, match="other layers or ranks than the configured one"):
            attach(**options)[1].load(state)


@pytest.mark.parametrize("training", [False, True])
def test_disabled_is_exactly_the_base(training, attach):
    models, adapter = attach(EVERYTHING, dropout=0.3)
    adapter.train(training)
    assert not equal(outputs(models.parts), base_outputs())
    with adapter.disabled():
        assert equal(outputs(models.parts), base_outputs())
    assert not equal(outputs(models.parts), base_outputs())


def test_disabled_ends_after_an_error_too(attach):
    _, adapter = attach()
    with pytest.raises(RuntimeError), adapter.disabled():
        raise RuntimeError
    assert adapter.strength == 1


def test_strength_scales_the_change(attach):
    models, adapter = attach(EVERYTHING)
    whole = list(adapter.deltas())
    adapter.strength = 0.5
    half = list(adapter.deltas())
    assert [d.scale for d in half] == [d.scale / 2 for d in whole]
    at_half = outputs(models.parts)
    assert close(at_half, base_outputs(half))
    assert not close(at_half, base_outputs(whole))
    with adapter.disabled():
        pass
    assert adapter.strength == 0.5
    adapter.strength = 1
    assert close(outputs(models.parts), base_outputs(whole))


@pytest.mark.parametrize(("rank", "alpha"), [(3, 4.5), (100, 50.0), (1000, 1000.0)])
def test_small_layers_have_a_smaller_rank_and_the_same_scale(rank, alpha, attach):
    models, adapter = attach(EVERYTHING, rank=rank, alpha=alpha)
    ranks = set()
    for d in adapter.deltas():
        layer = models.parts[d.part].get_submodule(d.path)
        sides = layer.base_layer.weight.shape[:2]
        assert d.tensors["down"].shape[0] == d.tensors["up"].shape[1] == min(rank, *sides)
        assert d.scale == pytest.approx(alpha / rank)
        assert layer.scaling["default"] == pytest.approx(alpha / rank)
        ranks.add(d.tensors["down"].shape[0])
    assert len(ranks) > 1 if rank > 64 else ranks == {rank}
    smaller = sum(d.tensors["down"].shape[0] < rank for d in adapter.deltas())
    assert list(adapter.notes) == (
        [f"{smaller} layers are smaller than the rank that is set and get their own size as rank."] if smaller else []
    )
    assert close(outputs(models.parts), base_outputs(list(adapter.deltas())))


def test_the_adapter_stays_fp32_on_a_bf16_base(attach):
    models, adapter = attach(EVERYTHING, dtype=torch.bfloat16)
    for part in ("unet", "text_1"):
        assert all(p.dtype == torch.float32 for p in adapter.parameters(part))
        others = {p.dtype for n, p in models.parts[part].named_parameters() if ".lora_" not in n}
        assert others == {torch.bfloat16}
    adapter.train(True)
    adapter.weights.begin()
    hidden = models.parts["text_1"](torch.arange(77).view(1, 77)).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    out = models.parts["unet"](torch.ones(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([3]), hidden).sample
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    adapter.weights.collect()
    for part in ("unet", "text_1"):
        grads = [adapter.weights.grads[p] for p in adapter.parameters(part)]
        assert all(g.dtype == torch.float32 and g.any() for g in grads)


def test_the_start_depends_on_the_seed_alone(attach, same):
    torch.manual_seed(1)
    one = attach(EVERYTHING, filled=False)[1].state()
    torch.manual_seed(2)
    torch.rand(10)
    assert same(one, attach(EVERYTHING, filled=False)[1].state())
    some = attach(filled=False)[1].state()  # a layer's start doesn't hang on which others there are
    assert same(some, {k: one[k] for k in some})
    other = attach(EVERYTHING, seed=1, filled=False)[1].state()
    downs = [k for k in one if k.endswith(".down")]
    assert not any(torch.equal(one[k], other[k]) for k in downs)
    for k in downs:  # uniform within 1 / sqrt(fan in)
        bound = one[k][0].numel() ** -0.5
        assert 0.5 * bound < float(one[k].abs().max()) <= bound
    first = [tuple(one[k].flatten()[:4].tolist()) for k in downs]
    assert len(set(first)) == len(first)


def test_dropout_acts_in_training_alone(attach):
    models, adapter = attach(dropout=0.5)
    still = outputs(models.parts)
    assert equal(still, outputs(models.parts))
    adapter.train(True)
    assert not equal(outputs(models.parts), outputs(models.parts))
    adapter.train(False)
    assert equal(still, outputs(models.parts))


def test_parameters_are_those_of_the_state_in_one_order(attach):
    _, adapter = attach(EVERYTHING)
    both = [*adapter.parameters("unet"), *adapter.parameters("text_1")]
    assert [p.data_ptr() for p in both] == [t.data_ptr() for t in adapter.state().values()]
    assert adapter.parameters("text_2") == []
    assert [(rate, len(params)) for rate, params in adapter.groups("unet")] == [(1.0, len(adapter.parameters("unet")))]
    assert adapter.groups("text_2") == []
