"""Options that change how a run computes, not what it learns."""

from __future__ import annotations

import pytest
import torch

WIDE = {"adapter.targets": ["attention", "feed_forward", "projections", "convolutions"], "train.visits": 2}


def far(a: dict, b: dict) -> float:
    """Largest difference of two exports, over the largest weight."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a) / max(float(t.abs().max()) for t in a.values())


def test_checkpointing_is_really_on(train, monkeypatch):
    """Its point is the backward pass that computes the forward again: the UNet's convolution blocks run twice a step."""
    from trainer.lean import frozen

    calls = {"n": 0}
    forward = frozen._resnet

    def counted(self, *args, **kwargs):
        calls["n"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(frozen, "_resnet", counted)
    train(WIDE | {"train.visits": 1})
    plain, calls["n"] = calls["n"], 0
    train(WIDE | {"train.visits": 1, "train.memory": "checkpointing"})
    assert plain > 0 and calls["n"] > 1.5 * plain


def test_a_bf16_base_trains_fp32_adapters(train):
    done = train({"train.dtype": "bf16", "train.visits": 2})
    assert done.events("started")[0]["dtype"] == "bf16"
    tensors, _ = done.state()
    adapter = {k: t for k, t in tensors.items() if k.startswith("adapter/")}
    assert adapter and all(t.dtype == torch.float32 for t in adapter.values())
    assert any(t.any() for k, t in adapter.items() if k.endswith(".up"))


@pytest.mark.parametrize("part", ["unet", "text_1"])
def test_one_part_alone(train, part):
    other = {"unet": "text_1", "text_1": "unet"}[part]
    done = train({f"part.{other}.train": False, "train.visits": 2})
    exported = done.events("exported")[-1]["modules"]
    trained = {k for k, t in done.lora().items() if k.endswith("lora_up.weight") and t.any()}
    prefix = {"unet": "lora_unet_", "text_1": "lora_te_"}[part]
    assert trained and all(k.startswith(prefix) for k in trained)
    assert exported[part] > 0


def test_a_text_encoder_whose_captions_do_not_fit_stays(train, monkeypatch):
    """Past the budget for cached text states a frozen encoder encodes each step, with the same result."""
    from trainer.data import store

    changes = {"part.text_1.train": False, "train.visits": 2}
    cached = train(changes)
    monkeypatch.setattr(store, "TEXT_BUDGET", 0)
    assert far(cached.lora(), train(changes).lora()) < 1e-5


def test_relative_paths_mean_the_same_when_resumed_elsewhere(train, pictures, tmp_path, monkeypatch):
    from trainer.config.load import load

    monkeypatch.chdir(pictures.parent)
    config = load(assignments=[f'data=[{{folder="{pictures.name}"}}]'])
    assert config.data[0].folder == pictures


def test_a_run_that_failed_before_its_first_step_can_start_again_in_its_folder(train, configure, tmp_path):
    from trainer import run

    with pytest.raises(ValueError, match="there is no such file or folder"):
        run.train(configure({"model.source": "nowhere.safetensors"}), tmp_path)
    again = train(root=tmp_path)
    assert again.outcome == "finished" and not again.events("failed")
    with pytest.raises(ValueError, match="already holds a run"):
        run.train(configure(), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"), [("[1, 2]", "holds list instead of an object"), ('{"preset": 3}', "preset is 3; it must be a name")]
)
def test_a_json_file_of_another_shape_is_refused(text, said, tmp_path):
    from trainer.config.load import load

    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "c.json")
