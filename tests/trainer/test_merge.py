"""LoRAs merged into the base before training (model.merge)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_folder

from trainer import adapters, bases, families
from trainer.adapters.merge import merge
from trainer.config import LoraConfig, MergeConfig, ModelConfig
from trainer.config.load import load
from trainer.families.sources import DEMO
from trainer.formats.metadata import read_header
from trainer.run_dir import RunError
from trainer.tools.inspect import read_lora

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = ("attention", "feed_forward", "projections", "convolutions")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, dtype): fresh models of a small base."""
    folders = {"sd1": DEMO}

    def make(name, dtype=torch.float32):
        if name not in folders:
            folders[name] = make_folder(tmp_path_factory.mktemp(name) / name, name)
        return families.get(name).load(folders[name], dtype, CPU, ModelConfig())

    return make


def adapted(name, models, seed=1):
    """A filled adapter on every kind of layer of every part."""
    family = families.get(name)
    targets = {p: family.targets(models, p, EVERYTHING) for p in family.parts}
    adapter = adapters.build(LoraConfig(rank=3, alpha=4.5, targets=EVERYTHING), models.parts, targets, 0)
    draw = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(t.shape, generator=draw) * 0.1 for k, t in adapter.state().items()}
    adapter.load(state)
    adapter.train(False)
    return adapter


@torch.no_grad()
def outputs(name, models) -> torch.Tensor:
    """What the denoiser says at one timestep, of what the text encoders make of a caption."""
    family = families.get(name)
    cond = family.conditions(models, ["a red cat"], (64, 64))
    channels = models.vae.config.latent_channels
    noisy = torch.randn((1, channels, 8, 8), generator=torch.Generator().manual_seed(2))
    return family.predict(models, noisy, torch.tensor([500]), cond)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_a_merged_base_is_the_base_with_the_adapter(name, strength, base):
    models = base(name)
    bare = outputs(name, models)
    adapter = adapted(name, models)
    deltas = list(adapter.deltas())
    assert {d.part for d in deltas} == set(families.get(name).parts)
    adapter.strength = strength
    with_adapter = outputs(name, models)
    merged = base(name)
    (note,) = merge(merged.parts, deltas, strength)
    assert note == f"A LoRA of {len(deltas)} layers was merged into the base at strength {strength:g}."
    found = outputs(name, merged)
    torch.testing.assert_close(found, with_adapter, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    assert not torch.allclose(found, bare, rtol=1e-2, atol=1e-2 * float(bare.abs().max()))


def test_the_sum_is_float32_and_rounded_once(base):
    models, whole = base("sd1", torch.bfloat16), base("sd1", torch.float32)
    deltas = list(adapted("sd1", base("sd1")).deltas())
    before = {d.path: models.parts[d.part].get_submodule(d.path).weight.clone() for d in deltas}
    assert merge(models.parts, deltas, 0.7)
    for d in deltas:
        weight = models.parts[d.part].get_submodule(d.path).weight
        change = 0.7 * d.scale * d.tensors["up"].double().flatten(1) @ d.tensors["down"].double().flatten(1)
        wanted = before[d.path].double() + change.view(weight.shape)
        assert weight.dtype == torch.bfloat16
        assert not weight.requires_grad
        assert weight.stride() == before[d.path].stride()
        torch.testing.assert_close(weight.double(), wanted, rtol=2**-8, atol=1e-7)  # half a step of bf16
    changed = {id(models.parts[d.part].get_submodule(d.path).weight) for d in deltas}
    for part in models.parts:
        for (path, mine), theirs in zip(models.parts[part].named_parameters(), whole.parts[part].parameters(), strict=True):
            assert id(mine) in changed or torch.equal(mine, theirs.bfloat16()), path


def test_files_may_flatten_1x1_convolutions_and_name_no_text_model(base):
    """SDXL's second text encoder has a level that files leave out; linear layers may be stored as 1x1 convolutions."""
    deltas = list(adapted("sdxl", base("sdxl")).deltas())
    other = []
    for d in deltas:
        tensors = dict(d.tensors)
        if tensors["down"].ndim == 2:
            tensors = {k: t[:, :, None, None] for k, t in tensors.items()}
        elif tensors["down"].shape[2:] == (1, 1):
            tensors = {k: t.flatten(1) for k, t in tensors.items()}
        other.append(adapters.Delta(d.part, d.path.removeprefix("text_model."), d.kind, tensors, d.scale))
    assert any(a.path != b.path for a, b in zip(deltas, other, strict=True))
    one, two = base("sdxl"), base("sdxl")
    merge(one.parts, deltas, 1.0)
    merge(two.parts, other, 1.0)
    for part in one.parts:
        for a, b in zip(one.parts[part].parameters(), two.parts[part].parameters(), strict=True):
            assert torch.equal(a, b)


def weights(models) -> list:
    return [p.clone() for part in models.parts.values() for p in part.parameters()]


def test_what_does_not_fit_is_refused_and_nothing_has_changed(base):
    models = base("sd1")
    deltas = list(adapted("sd1", base("sd1")).deltas())
    before = weights(models)

    def refused(*more):
        with pytest.raises(ValueError) as error:
            merge(models.parts, [*deltas, *more], 1.0)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(models), strict=True))
        return str(error.value)

    d = deltas[0]
    wide = {"down": torch.ones(3, d.tensors["down"].shape[1] + 1), "up": d.tensors["up"]}
    assert "layers that the base does not have, the first is text_2 a.b." in refused(
        adapters.Delta("text_2", "a.b", "lora", d.tensors, 1.0)
    )
    assert "the first is unet not.there." in refused(adapters.Delta("unet", "not.there", "lora", d.tensors, 1.0))
    assert f"its layer unet {d.path} has other sizes" in refused(adapters.Delta("unet", d.path, "lora", wide, 1.0))
    norm = adapters.Delta("unet", "conv_norm_out", "lora", {"down": torch.ones(1, 1), "up": torch.ones(64, 1)}, 1.0)
    assert "unet conv_norm_out is a GroupNorm" in refused(norm)
    models.parts["unet"].get_submodule(d.path).weight = torch.nn.Parameter(torch.zeros(d.tensors["up"].shape[0], 8).to(torch.int8), False)
    before = weights(models)
    assert "not quantised" in refused()


def test_what_is_no_number_is_refused(base):
    deltas = list(adapted("sd1", base("sd1")).deltas())
    deltas[5].tensors["up"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not a number any more"):
        merge(base("sd1").parts, deltas, 1.0)
    with pytest.raises(ValueError, match="is not a number any more"):
        merge(base("sd1", torch.float16).parts, list(adapted("sd1", base("sd1")).deltas()), 1e7)


def test_a_lora_of_zeros_says_so(base):
    models = base("sd1")
    before = weights(models)
    zero = {"down": torch.ones(1, 3), "up": torch.zeros(3, 1)}
    assert merge(models.parts, [adapters.Delta("unet", "not.there", "lora", zero, 1.0)], 1.0) == [
        "The LoRA that was to be merged changes nothing: all its layers are zero."
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(models), strict=True))


# In a run


@pytest.fixture(scope="module")
def first(train):
    return train({"train.visits": 4})


@pytest.mark.slow
def test_a_run_trains_on_the_merged_base(first, train, same):
    file = first.root / "lora.safetensors"
    family = families.get("sd1")
    entries = (MergeConfig(file=file, strength=0.5), MergeConfig(file=file, strength=0.25))
    models = bases.load(DEMO, family, torch.float32, CPU, ModelConfig(merge=entries))
    assert len(models.notes) == 2
    once = family.load(DEMO, torch.float32, CPU)
    merge(once.parts, read_lora(file)[1], 0.75)
    for part in once.parts:
        for a, b in zip(models.parts[part].parameters(), once.parts[part].parameters(), strict=True):
            torch.testing.assert_close(a, b)
    run = train({"model.merge": [{"file": str(file), "strength": 3}]})
    assert any("was merged into the base at strength 3." in e["text"] for e in run.events("warning"))
    assert not same(run.lora(), train().lora())


@pytest.mark.slow
def test_a_run_with_a_merge_resumes_to_the_same(first, train, same):
    changes = {"model.merge": [{"file": str(first.root / "lora.safetensors")}]}
    whole, part = train(changes), train(changes, stop_at=3)
    part = train(changes, root=part.root, resume=True)
    assert same(whole.lora(), part.lora())


def test_a_file_that_does_not_fit_is_named(first, train, tmp_path):
    def refused(path):
        with pytest.raises(RunError) as error:
            train({"model.merge": [{"file": str(path)}]})
        assert f"model.merge names {path}:" in str(error.value)
        return str(error.value)

    assert "none.safetensors" in refused(tmp_path / "none.safetensors")
    state = {k: torch.cat([t, t], 1) if "lora_down" in k else t for k, t in load_file(first.root / "lora.safetensors").items()}
    save_file(state, tmp_path / "wide.safetensors", read_header(first.root / "lora.safetensors")[0])
    assert "has other sizes than the base's" in refused(tmp_path / "wide.safetensors")


def test_relative_files_are_taken_from_the_settings_file(settings, tmp_path):
    changes = {"model.merge": [{"file": "loras/a.safetensors"}, {"file": str(tmp_path / "b.safetensors")}], "model.text_encoders": "texts"}
    (tmp_path / "c.json").write_text(json.dumps(settings(changes)))
    found = load(tmp_path / "c.json").model
    assert [e.file for e in found.merge] == [tmp_path / "loras" / "a.safetensors", tmp_path / "b.safetensors"]
    assert found.text_encoders == tmp_path / "texts"
