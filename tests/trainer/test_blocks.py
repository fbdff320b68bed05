"""Ranks, scales and learning rates of single blocks and of convolutions (adapter.blocks, conv_rank, conv_alpha)."""

import pytest
import torch
from small_models import make_folder

from trainer import adapters, families, optimizers
from trainer.adapters.lora import block_of, rank_of
from trainer.config import AdamWConfig, LoraConfig, ModelConfig
from trainer.config.load import ConfigError, validate
from trainer.families.sources import DEMO
from trainer.run_dir import RunError

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = ("attention", "feed_forward", "projections", "convolutions")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("base") / "sdxl", "sdxl")


@pytest.fixture
def attach():
    """attach(options, ...): (models, adapter) of a fresh base."""

    def make(options, parts=("unet", "text_1"), family="sd1", source=DEMO, ranks=None):
        found = families.get(family)
        models = found.load(source, torch.float32, CPU, ModelConfig())
        config = LoraConfig(**{"rank": 4, "alpha": 8, "targets": EVERYTHING, **options})
        targets = {p: found.targets(models, p, config.targets) for p in parts}
        return models, adapters.build(config, models.parts, targets, 0, ranks)

    return make


def seen(adapter) -> dict:
    """{part.path: (rank, scale)}"""
    return {f"{d.part}.{d.path}": (len(d.tensors["down"]), d.scale) for d in adapter.deltas()}


def is_large(models, name: str) -> bool:
    part, _, path = name.partition(".")
    layer = models.parts[part].get_submodule(path)
    return getattr(layer.base_layer, "kernel_size", (1, 1)) != (1, 1)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"conv_rank": 2}, (2, 2.0)),
        ({"conv_rank": 2, "conv_alpha": 1}, (2, 0.5)),
        ({"conv_alpha": 1}, (4, 0.25)),
        ({}, (4, 2.0)),
    ],
)
def test_convolutions_larger_than_1x1_have_a_rank_of_their_own(options, wanted, attach):
    models, adapter = attach(options)
    found = seen(adapter)
    large = {name for name in found if is_large(models, name)}
    assert 10 < len(large) < len(found)
    assert any(name.endswith("conv_shortcut") for name in found.keys() - large)
    assert {found[name] for name in large} == {wanted}
    assert {found[name] for name in found.keys() - large} == {(4, 2.0)}
    for d in adapter.deltas():
        layer = models.parts[d.part].get_submodule(d.path)
        kernel = layer.base_layer.weight.shape[2:]
        assert d.tensors["down"].shape[2:] == kernel
        assert layer.r["default"] == len(d.tensors["down"])
        assert layer.scaling["default"] == d.scale


def test_the_longest_name_holds_alone(attach):
    blocks = {
        "unet": {"rank": 3},
        "unet.mid_block": {"rank": 2, "alpha": 5},
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1": {"alpha": 1},
        "unet.up_blocks.1.resnets": {"rank": 0},
        "text_1.encoder.layers.0": {"rank": 1000},
    }
    models, adapter = attach({"blocks": blocks, "conv_rank": 7, "conv_alpha": 7})
    found = seen(adapter)
    groups = {}
    for name, value in found.items():
        block = next((b for b in sorted(blocks, key=len, reverse=True) if name.startswith(f"{b}.")), "none")
        groups.setdefault((block, is_large(models, name)), set()).add(value)
    sides = groups.pop(("text_1.encoder.layers.0", False))
    assert {scale for _, scale in sides} == {8 / 4}
    assert {rank for rank, _ in sides} == {128}  # the layer's side
    assert groups == {
        ("unet", False): {(3, 2.0)},
        ("unet", True): {(3, 1.0)},  # the convolutions' own scale
        ("unet.mid_block", False): {(2, 2.5)},
        ("unet.mid_block", True): {(2, 2.5)},
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1", False): {(4, 0.25)},
        ("none", False): {(4, 2.0)},  # the other layers of the text encoder
    }
    assert not any(name.startswith("unet.up_blocks.1.resnets") for name in found)
    assert any(name.startswith("unet.up_blocks.1.attentions") for name in found)
    assert any(name.startswith("unet.up_blocks.0.resnets") for name in found)


def test_a_name_is_cut_at_dots_and_knows_no_level_text_model():
    config = LoraConfig(blocks={"text_2.encoder.layers.1": {}, "text_2.text_model.encoder.layers.2": {}, "unet.up_blocks.1": {}})
    assert block_of(config, "text_2", "text_model.encoder.layers.1.mlp.fc1") == "text_2.encoder.layers.1"
    assert block_of(config, "text_2", "encoder.layers.2.mlp.fc1") == "text_2.text_model.encoder.layers.2"
    assert block_of(config, "text_2", "text_model.encoder.layers.11.mlp.fc1") is None
    assert block_of(config, "text_1", "encoder.layers.1.mlp.fc1") is None
    assert block_of(config, "unet", "up_blocks.10.attentions.0.proj_in") is None


def test_rank_of_is_what_is_built(attach):
    blocks = {"unet.mid_block": {"rank": 0}, "unet.down_blocks.1": {"rank": 500}}
    config = LoraConfig(rank=20, conv_rank=3, targets=EVERYTHING, blocks=blocks)
    _, adapter = attach({"rank": 20, "alpha": 20, "conv_rank": 3, "blocks": blocks})
    fresh = families.get("sd1")
    bare = fresh.load(DEMO, torch.float32, CPU, ModelConfig())
    wanted = {}
    for part in ("unet", "text_1"):
        for path in fresh.targets(bare, part, EVERYTHING):
            if rank := rank_of(config, part, path, bare.parts[part].get_submodule(path)):
                wanted[f"{part}.{path}"] = rank
    assert {name: rank for name, (rank, _) in seen(adapter).items()} == wanted
    counted = fresh.count(DEMO, config)
    for part, (layers, parameters) in counted.items():
        assert layers == sum(name.startswith(f"{part}.") for name in wanted)
        assert parameters == sum(p.numel() for p in adapter.parameters(part))


def test_a_block_that_is_not_there_is_refused(attach):
    with pytest.raises(ValueError, match=r"adapter\.blocks names unet\.midblock, text_2, where nothing is trained") as error:
        attach({"blocks": {"unet.midblock": {"rank": 2}, "unet.mid_block": {"rank": 2}, "text_2": {"rate": 0.5}}})
    for name in ("unet.down_blocks.0", "unet.mid_block.attentions.0", "text_1.encoder.layers.2", "train the part"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"rank 0 to all layers of text_1.*set part\.text_1\.train to false"):
        attach({"blocks": {"text_1": {"rank": 0}}})


def test_a_run_says_so_too(train):
    with pytest.raises(RunError, match=r"adapter\.blocks names unet\.midblock"):
        train({"adapter.blocks": {"unet.midblock": {"rank": 2}}})


RATES = {"unet": {"rate": 0.5}, "unet.mid_block": {"rate": 0}, "text_1.encoder.layers.1": {"rate": 3}}


def rate_of(name: str) -> float:
    if name.startswith("unet."):
        return 0 if name.startswith("unet.mid_block.") else 0.5
    return 3 if name.startswith("text_1.encoder.layers.1.") else 1


def test_groups_hold_every_parameter_once(attach):
    _, adapter = attach({"blocks": RATES})
    for part, rates in {"unet": [0.5, 0], "text_1": [1, 3]}.items():
        groups = adapter.groups(part)
        assert [rate for rate, _ in groups] == rates
        ids = [id(p) for _, params in groups for p in params]
        assert len(set(ids)) == len(ids)
        assert set(ids) == {id(p) for p in adapter.parameters(part)}
        assert [[id(p) for p in params] for _, params in groups] == [[id(p) for p in params] for _, params in adapter.groups(part)]


def test_rates_reach_the_optimizer(attach):
    """AdamW's first step moves every weight by its rate: the gradient is divided by its own size."""
    _, adapter = attach({"blocks": RATES})
    parts = {"unet": 1e-3, "text_1": 1e-4}
    groups = [{"params": p, "lr": lr * rate, "part": part} for part, lr in parts.items() for rate, p in adapter.groups(part)]
    optimizer = optimizers.build(AdamWConfig(weight_decay=0), groups, CPU)
    before = {name: t.clone() for name, t in adapter.state().items()}
    for part in parts:
        for p in adapter.parameters(part):
            p.grad = torch.ones_like(p)
    optimizer.step()
    for name, now in adapter.state().items():
        part, _, path = name.partition("/")
        moved = before[name] - now
        torch.testing.assert_close(moved, torch.full_like(moved, parts[part] * rate_of(f"{part}.{path}")), rtol=1e-2, atol=1e-7)


def test_a_run_moves_blocks_by_their_rates(train):
    """AdamW moves each weight by its rate at most, and the first step by nearly that; so `up`, which begins at zero, tells the rates."""
    changes = {"train.visits": 1, "train.batch_size": 7, "optimizer.weight_decay": 0, "schedule.kind": "constant", "schedule.warmup": 0}
    run = train(changes | {"adapter.blocks": RATES})
    tensors, _ = run.state()
    steps = len(run.events("step"))
    most: dict[float, float] = {}
    for name, up in tensors.items():
        if name.startswith("adapter/") and name.endswith(".up"):
            part, _, path = name.removeprefix("adapter/").partition("/")
            rate = {"unet": 1e-3, "text_1": 5e-4}[part] * rate_of(f"{part}.{path}")
            most[rate] = max(most.get(rate, 0), float(up.abs().max()))
    assert sorted(most) == [0, 5e-4, 1.5e-3]
    assert most[0] == 0
    for rate in (5e-4, 1.5e-3):
        assert 0.9 * rate < most[rate] <= 1.01 * steps * rate


@pytest.mark.slow
def test_a_run_with_blocks_resumes_to_the_same(train, same):
    changes = {"adapter.blocks": RATES | {"unet.up_blocks.0": {"rank": 1}}, "adapter.conv_rank": 1, "adapter.targets": list(EVERYTHING)}
    whole, part = train(changes), train(changes, stop_at=3)
    part = train(changes, root=part.root, resume=True)
    assert same(whole.lora(), part.lora())


def test_ranks_that_are_given_come_first(attach, sdxl):
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    given = {"unet": {"mid_block.attentions.0.proj_in": 9, "not.there": 3}, "text_2": {text.removeprefix("text_model."): 6}}
    _, adapter = attach({"targets": EVERYTHING}, ("unet", "text_2"), "sdxl", sdxl, given)
    found = seen(adapter)
    assert found.pop("unet.mid_block.attentions.0.proj_in") == (9, 2.0)
    assert found.pop(f"text_2.{text}") == (6, 2.0)
    assert {rank for rank, _ in found.values()} == {4}
    assert not adapter.notes


def test_ranks_of_leaves_out_layers_of_zeros(attach):
    _, adapter = attach({})
    assert adapters.ranks_of(adapter.deltas()) == {}
    some = {k: t + 1 if "mid_block" in k and k.endswith("to_q.up") else t for k, t in adapter.state().items()}
    adapter.load(some)
    path = "mid_block.attentions.0.transformer_blocks.0"
    assert adapters.ranks_of(adapter.deltas()) == {"unet": {f"{path}.attn1.to_q": 4, f"{path}.attn2.to_q": 4}}


def test_files_name_layers_without_the_level_that_the_model_has(attach, sdxl):
    """Deltas of a file reach the layers of a CLIPTextModelWithProjection, and so do their ranks."""
    _, source = attach({"rank": 3, "alpha": 3}, ("text_1", "text_2"), "sdxl", sdxl)
    source.load({k: torch.randn_like(t) for k, t in source.state().items()})
    deltas = [adapters.Delta(d.part, d.path.removeprefix("text_model."), d.kind, d.tensors, d.scale) for d in source.deltas()]
    _, other = attach({}, ("text_1", "text_2"), "sdxl", sdxl, adapters.ranks_of(deltas))
    other.start(deltas)
    assert seen(source).keys() == seen(other).keys()
    for one, two in zip(source.deltas(), other.deltas(), strict=True):
        products = [d.scale * d.tensors["up"].double() @ d.tensors["down"].double() for d in (one, two)]
        torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)


def test_many_ranks_are_attached_at_once(attach, sdxl):
    """Every layer with a rank of its own."""
    family = families.get("sdxl")
    models = family.load(sdxl, torch.float32, CPU, ModelConfig())
    paths = family.targets(models, "unet", EVERYTHING)
    blocks = {f"unet.{path}": {"rank": k % 5 + 1} for k, path in enumerate(paths)}
    _, adapter = attach({"blocks": blocks}, ("unet",), "sdxl", sdxl)
    assert [rank for rank, _ in seen(adapter).values()] == [k % 5 + 1 for k in range(len(paths))]


# The settings


@pytest.mark.parametrize(
    "blocks",
    [
        {"unet.mid_block": {"rank": 4}, "unet": {"rate": 0.5}},
        {"unet": {"rate": 0.5, "mid_block": {"rank": 4}}},
        {"unet": {"rate": 0.5}, "unet.mid_block": {"rank": 4}},
    ],
)
def test_names_go_with_and_without_quotes(blocks, settings, configure):
    found = configure({"adapter.blocks": blocks})
    assert {name: (b.rank, b.rate) for name, b in found.adapter.blocks.items()} == {"unet.mid_block": (4, 1), "unet": (None, 0.5)}
    assert type(found).model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"adapter.blocks": {"rank": 4}}, "adapter.blocks", "must hold one table for each block"),
        ({"adapter.blocks": {"unet.mid_block": {"rnak": 4}}}, "adapter.blocks.unet.mid_block.rnak", "Did you mean rank?"),
        ({"adapter.blocks": {"unet.mid_block": {"rank": -1}}}, "adapter.blocks.unet.mid_block.rank", "must be at least 0"),
        (
            {"adapter.blocks": {"unet": {"rate": 0.5}}, "optimizer": {"kind": "prodigy"}, "part.text_1.train": False},
            "",
            "Prodigy needs one rate for all",
        ),
    ],
)
def test_wrong_settings_are_told(changes, field, text, settings):
    with pytest.raises(ConfigError) as error:
        validate(settings(changes))
    assert text in error.value.errors[field]


def test_prodigy_takes_a_frozen_block(configure):
    configure({"adapter.blocks": {"unet.mid_block": {"rate": 0}}, "optimizer": {"kind": "prodigy"}, "part.text_1.train": False})
