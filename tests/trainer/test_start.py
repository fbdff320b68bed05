"""Training that starts from a LoRA file (adapter.start)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import optimizers
from trainer.config.load import load
from trainer.formats.metadata import read_header
from trainer.run_dir import RunError
from trainer.tools.convert import convert
from trainer.tools.inspect import read_lora


@pytest.fixture(scope="module")
def first(train):
    return train({"train.visits": 8})


def products(path) -> dict:
    """{(part, path): the change of that layer's weight} of a LoRA file."""
    return {(d.part, d.path): d.scale * d.tensors["up"].flatten(1) @ d.tensors["down"].flatten(1) for d in read_lora(path)[1]}


@pytest.fixture
def before_training(train, monkeypatch):
    """before_training(changes): the file that a run exports whose optimizer never steps."""

    def go(changes, **options):
        monkeypatch.setattr(optimizers.AdamW, "step", lambda self, closure=None: None)
        try:
            return train({"train.visits": 1, **changes}, **options).root / "lora.safetensors"
        finally:
            monkeypatch.undo()

    return go


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_training_starts_from_exactly_what_the_file_does(naming, first, before_training, tmp_path):
    file = first.root / "lora.safetensors"
    if naming == "peft":
        convert(file, tmp_path / "peft.safetensors", "peft")
        file = tmp_path / "peft.safetensors"
    told = products(file)
    now = products(before_training({"adapter.start": str(file)}))
    assert told.keys() == now.keys()
    assert max(float(d.abs().max()) for d in told.values()) > 1e-4
    for layer in told:
        torch.testing.assert_close(now[layer], told[layer], rtol=1e-6 if naming == "kohya" else 1e-5, atol=0 if naming == "kohya" else 1e-9)


@pytest.mark.parametrize("alpha", [1, 7.5])
def test_another_alpha_is_folded_in(alpha, first, before_training):
    file = first.root / "lora.safetensors"
    told, now = products(file), products(before_training({"adapter.start": str(file), "adapter.alpha": alpha}))
    for layer in told:
        torch.testing.assert_close(now[layer], told[layer], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_a_run_that_starts_from_a_file_learns_and_resumes_to_the_same(first, train, same):
    """Without the file, too: the checkpoint has all."""
    copy = first.root / "copy.safetensors"
    copy.write_bytes((first.root / "lora.safetensors").read_bytes())
    changes = {"adapter.start": str(copy)}
    whole, part = train(changes), train(changes, stop_at=4)
    copy.unlink()
    part = train(changes, root=part.root, resume=True)
    assert same(whole.lora(), part.lora())
    assert not same(whole.lora(), first.lora())
    assert not same(whole.lora(), train().lora())
    with pytest.raises(RunError, match=r"other settings in \[adapter\]"):
        train(root=whole.root, resume=True)


@pytest.mark.parametrize("rank", [1, 5])
def test_the_files_ranks_are_taken(rank, first, train, same):
    """And kept when the run is resumed, without the file. Layers that the file has not get the configured rank."""
    copy = first.root / f"ranks-{rank}.safetensors"
    copy.write_bytes((first.root / "lora.safetensors").read_bytes())
    changes = {"adapter.start": str(copy), "adapter.rank": rank, "adapter.targets": ["attention", "feed_forward"]}
    whole, part = train(changes), train(changes, stop_at=4)
    copy.unlink()
    part = train(changes, root=part.root, resume=True)
    assert same(whole.lora(), part.lora())
    had = {(d.part, d.path) for d in read_lora(first.root / "lora.safetensors")[1] if d.tensors["up"].any()}
    ranks = {(d.part, d.path): len(d.tensors["down"]) for d in read_lora(whole.root / "lora.safetensors")[1]}
    assert len(had) > 0
    assert ranks.keys() > had
    assert {ranks[layer] for layer in had} == {2}
    assert {r for layer, r in ranks.items() if layer not in had} == {rank}


@pytest.mark.parametrize("rank", [1, 5])
def test_a_start_with_other_ranks_does_what_the_file_does(rank, first, before_training):
    file = first.root / "lora.safetensors"
    told, now = products(file), products(before_training({"adapter.start": str(file), "adapter.rank": rank}))
    assert told.keys() == now.keys()
    for layer in told:
        torch.testing.assert_close(now[layer], told[layer], rtol=1e-5, atol=1e-9)


def test_layers_that_the_file_has_not_start_as_without_it(first, before_training):
    file = first.root / "lora.safetensors"
    now = products(before_training({"adapter.start": str(file), "adapter.targets": ["attention", "feed_forward"]}))
    told = products(file)
    assert {layer for layer, d in now.items() if d.any()} == {layer for layer, d in told.items() if d.any()}
    assert now.keys() > told.keys()


def test_layers_of_zeros_are_no_obstacle(train, before_training):
    """The exporter adds such layers of rank 1 for the readers' sake."""
    other = train({"adapter.targets": ["projections"], "part.text_1.train": False})
    ((_, path),) = [layer for layer, d in products(other.root / "lora.safetensors").items() if not d.any()]
    assert path.endswith("attn2.to_k")
    changes = {"adapter.start": str(other.root / "lora.safetensors"), "adapter.targets": ["projections"], "part.text_1.train": False}
    before_training(changes)


def changed(source, target, change, metadata=True):
    """A copy of a file whose {key: tensor} went through `change`; without `metadata` only its keys say what it is."""
    state = {k: t.contiguous() for k, t in change(load_file(source)).items()}
    save_file(state, target, read_header(source)[0] if metadata else None)
    return target


def test_what_does_not_fit_is_refused_in_a_sentence(first, train, tmp_path):
    file = first.root / "lora.safetensors"

    def refused(path, **more):
        with pytest.raises(RunError) as error:
            train({"adapter.start": str(path), **more})
        assert str(path) in str(error.value)
        return str(error.value)

    text = refused(file, **{"part.text_1.train": False})
    assert "it changes 12 layers that this run does not train, the first is text_1 encoder.layers.0.self_attn." in text
    assert "does not exist" in refused(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    assert "is not a .safetensors file" in refused(tmp_path / "bad.safetensors")
    save_file({"first_stage_model.x": torch.ones(1)}, tmp_path / "vae.safetensors")
    assert "which is a VAE" in refused(tmp_path / "vae.safetensors")

    def sdxl(state):
        return {k.replace("lora_te_", "lora_te2_"): t for k, t in state.items()}

    large = changed(file, tmp_path / "xl.safetensors", sdxl, metadata=False)
    assert "which is a LoRA for Stable Diffusion XL; the base is sd1" in refused(large)

    def wider(state):
        return {k: torch.cat([t, t], 1) if "lora_down" in k and "attn1" in k else t for k, t in state.items()}

    assert "has other sizes than the base's" in refused(changed(file, tmp_path / "wide.safetensors", wider))

    def loha(state):
        return {k.replace("lora_down", "hada_w1_a"): t for k, t in state.items()}

    assert "does not belong to a plain LoRA" in refused(changed(file, tmp_path / "loha.safetensors", loha))


def test_an_empty_start_is_none_and_a_relative_one_is_taken_from_the_file(configure, settings, tmp_path):
    assert configure({"adapter.start": ""}).adapter.start is None
    (tmp_path / "c.json").write_text(json.dumps(settings({"adapter.start": "loras/a.safetensors"})))
    assert load(tmp_path / "c.json").adapter.start == tmp_path / "loras" / "a.safetensors"
