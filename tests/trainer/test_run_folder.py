"""What a run leaves in its folder, what it answers, and what it says when something is wrong."""

import errno
import json
import os

import pytest
import torch

import trainer.loop
from trainer import control, events, run
from trainer.config import TrainConfig
from trainer.families.sd1 import SD1
from trainer.formats.metadata import read_header
from trainer.run_dir import RunDir, RunError

LOOKED_AT = {
    "preview.enabled": True,
    "preview.every": 4,
    "preview.steps": 1,
    "preview.guidance": 1.0,
    "preview.prompts": ["zorp", "a cat"],
    "validation.enabled": True,
    "validation.every": 4,
    "validation.draws": 1,
    "output.checkpoint_every": 4,
    "output.save_every": 4,
    "output.name": "my zorp",
}


@pytest.fixture(scope="module")
def finished(train):
    return train(LOOKED_AT)


def files(folder) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_leaves_these_files_and_no_others(finished):
    assert files(finished.root) == {
        "config.json",
        "versions.json",
        "process.json",
        "lock",
        "events.jsonl",
        *(f"previews/step-{n:06}-{k}.png" for n in (0, 4, 8) for k in (1, 2)),
        "checkpoints/step-000004.safetensors",
        "checkpoints/step-000008.safetensors",
        "my zorp-000004.safetensors",
        "my zorp-000004.json",
        "my zorp.safetensors",
        "my zorp.json",
    }


def test_the_events_come_in_order(finished):
    assert [(e["type"], e.get("step", e.get("name"))) for e in finished.events() if e["type"] != "warning"] == [
        ("stage", "loading"),
        ("started", "my zorp"),
        ("memory", None),
        ("stage", "encoding"),
        ("stage", "training"),
        ("validation", 0),
        ("preview", 0),
        ("step", 1),
        ("validation", 4),
        ("preview", 4),
        ("exported", 4),
        ("checkpoint", 4),
        ("step", 8),
        ("stage", "exporting"),
        ("checkpoint", 8),
        ("exported", 8),
        ("validation", 8),
        ("preview", 8),
        ("finished", 8),
    ]


def test_every_event_has_its_fields(finished):
    seen = finished.events()
    assert [e["seq"] for e in seen] == list(range(len(seen)))
    assert all(e["v"] == 1 for e in seen)
    times = [e["time"] for e in seen]
    assert times == sorted(times)
    (started,) = finished.events("started")
    assert (started["total"], started["images"], started["buckets"]) == (8, 7, [[64, 64, 4], [88, 40, 3]])
    assert started["dtype"] == "fp32"
    assert len(started["reasons"]) == 3
    assert (started["family"], started["resolution"], started["visits"], started["batch_size"]) == ("sd1", 64, 4, 4)
    assert started["schedule"] == "cosine from 1e-3 (UNet), 5e-4 (text encoder) to 10 % after 2 % warm-up"
    last = finished.events("step")[-1]
    assert last["epoch"] == 4
    assert last["eta_s"] == 0
    assert last["images_per_s"] > 0
    assert 0.1 < last["memory_gib"] < 100
    assert set(last["rate"]) == {"unet", "text_1"}
    assert last["rate"]["unet"] == pytest.approx(2 * last["rate"]["text_1"], rel=1e-3)
    for e in finished.events("preview"):
        assert e["prompts"] == ["zorp", "a cat"]
        assert all((finished.root / "previews" / name).is_file() for name in e["images"])
    for e in finished.events("checkpoint"):
        assert (finished.root / e["file"]).is_file()
    for e in finished.events("exported"):
        assert (finished.root / e["file"]).stat().st_size == e["bytes"]
        assert e["modules"] == {"unet": 56, "text_1": 12}
    assert [e["final"] for e in finished.events("exported")] == [False, True]
    assert all(e["held_out"] is None for e in finished.events("validation"))


def test_the_lora_has_kohyas_names_and_says_what_it_is(finished):
    metadata, tensors = read_header(finished.root / "my zorp.safetensors")
    layers = {k.partition(".")[0] for k in tensors}
    assert len(layers) == 68
    assert tensors.keys() == {f"{layer}.{end}" for layer in layers for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in layers
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in layers
    assert all(layer.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for layer in layers)
    assert tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"] == ("F32", (2, 128))
    said = {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2.0",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "0.0005",
        "ss_steps": "8",
        "ss_num_train_images": "28",
        "ss_optimizer": "adamw",
        "ss_output_name": "my zorp",
        "modelspec.trigger_phrase": "zorp",
        "modelspec.prediction_type": "epsilon",
    }
    assert {k: metadata.get(k) for k in said} == said
    ((folder, found),) = json.loads(metadata["ss_dataset_dirs"]).items()
    assert folder.startswith("4_")
    assert found == {"n_repeats": 4, "img_count": 7}
    assert json.loads(metadata["ss_tag_frequency"])[folder]["zorp"] == 7
    assert json.loads((finished.root / "my zorp.json").read_text())["activation text"] == "zorp"
    assert read_header(finished.root / "my zorp-000004.safetensors")[0]["ss_steps"] == "4"


def test_the_exported_weights_are_those_of_the_checkpoint(finished):
    lora, (state, _) = finished.lora("my zorp.safetensors"), finished.state()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    name = f"lora_unet_{path.replace('.', '_')}"
    product = lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"] * (lora[f"{name}.alpha"] / 2)
    live = state[f"adapter/unet/{path}.up"] @ state[f"adapter/unet/{path}.down"]
    assert float(live.abs().max()) > 0
    torch.testing.assert_close(product, live)


def test_config_and_versions_are_written(finished, configure):
    text = (finished.root / "config.json").read_text(encoding="utf-8")
    assert TrainConfig.model_validate_json(text) == configure(LOOKED_AT)
    assert json.loads(text)["loss"].items() >= {"min_snr_gamma": 5.0, "noise_offset": 0.0}.items()  # fully resolved, defaults too
    versions = json.loads((finished.root / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert {"diffusers", "transformers", "peft", "accelerate", "safetensors"} <= versions.keys()
    assert json.loads((finished.root / "process.json").read_text())["pid"] == os.getpid()


def test_held_out_images_are_measured(train, pictures, draw_pictures, tmp_path):
    data = [{"folder": str(pictures)}, {"folder": str(draw_pictures(tmp_path, [(64, 64)] * 2, seed=9)), "kind": "validation"}]
    first, last = train({"data": data, "validation.enabled": True, "validation.every": 0}).events("validation")
    assert (first["step"], last["step"]) == (0, 8)
    assert 0 < first["held_out"] != first["train"] > 0


def test_naming_for_diffusers(train):
    names = train({"output.naming": "peft"}).lora().keys()
    assert all(k.startswith(("unet.", "text_encoder.")) for k in names)


def test_requests_are_answered(train):
    ids = {}

    def ask(event):
        if event["type"] == "step" and event["step"] == 1:
            for kind in ("save", "preview"):
                ids[control.send(folder, kind)] = kind
            (folder.control / "abc.json").write_text('{"kind": "dance"}')
            ids["abc"] = "dance"

    folder = RunDir(train(LOOKED_AT, stop_at=0).root)
    asked = train({**LOOKED_AT, "preview.every": 0}, root=folder.root, resume=True, show=ask)
    answers = {e["id"]: (e["request"], e["step"], e["detail"]) for e in asked.events("answered")}
    assert {k: answers[k] for k in ids} == {k: (kind, 1, "unknown request" if kind == "dance" else "done") for k, kind in ids.items()}
    order = [(e["type"], e.get("step")) for e in asked.events("checkpoint", "exported", "preview", "answered")]
    at = order.index(("checkpoint", 1))
    assert order[at : at + 6] == [("checkpoint", 1), ("exported", 1), ("preview", 1), *[("answered", 1)] * 3]
    assert {"my zorp-000001.safetensors", "previews/step-000001-1.png"} <= files(asked.root)
    assert list(folder.control.iterdir()) == []


def test_an_unknown_request_cannot_be_sent(tmp_path):
    with pytest.raises(ValueError, match=r"request is 'dance'; it must be one of stop, save, preview, prompts, visits\."):
        control.send(RunDir(tmp_path), "dance")


def test_checkpoints_are_pruned_and_exported_loras_never(train):
    kept = train({"output.checkpoint_every": 1, "output.keep_checkpoints": 3, "output.save_every": 1})
    assert [p.name for p in kept.checkpoints()] == [f"step-{n:06}.safetensors" for n in (6, 7, 8)]
    assert sorted(p.name for p in kept.root.glob("*.safetensors")) == [
        *(f"lora-{n:06}.safetensors" for n in range(1, 8)),
        "lora.safetensors",
    ]
    assert len({(kept.root / f"lora-{n:06}.safetensors").read_bytes() for n in range(1, 8)}) == 7


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(finished, configure):
    before = {name: (finished.root / name).read_bytes() for name in files(finished.root) - {"process.json"}}
    with pytest.raises(RunError, match=r"already holds a run\. Add --resume to go on with it, or choose another --run-dir"):
        run.train(configure(), finished.root)
    assert before == {name: (finished.root / name).read_bytes() for name in files(finished.root) - {"process.json"}}


@pytest.mark.parametrize(
    ("changes", "section"),
    [
        ({"part.unet.learning_rate": 2e-3}, "part"),
        ({"train.seed": 1}, "train"),
        ({"adapter.rank": 4}, "adapter"),
        ({"schedule.kind": "linear"}, "schedule"),
        ({"optimizer.kind": "adamw8bit"}, "optimizer"),
        ({"dataset.flip": True}, "dataset"),
        ({"loss.min_snr_gamma": None}, "loss"),
        ({"model.prediction": "v_prediction"}, "model"),
        ({"output.name": "other"}, "output"),
        ({"output.dtype": "bf16"}, "output"),
    ],
)
def test_a_run_is_not_resumed_with_what_it_would_learn_otherwise_by(changes, section, finished, configure):
    before = (finished.root / "config.json").read_bytes(), (finished.root / "events.jsonl").read_bytes()
    with pytest.raises(RunError, match=rf"was made with other settings in \[{section}\], so it cannot be resumed with these"):
        run.train(configure(LOOKED_AT | changes), finished.root, resume=True)
    assert before == ((finished.root / "config.json").read_bytes(), (finished.root / "events.jsonl").read_bytes())


def test_a_run_is_resumed_with_other_looks(train, same):
    stopped = train(stop_at=4)
    looks = {
        "preview.enabled": True,
        "preview.prompts": ["a new prompt"],
        "preview.steps": 1,
        "validation.enabled": True,
        "output.save_every": 6,
        "output.title": "T",
    }
    resumed = train(looks, root=stopped.root, resume=True)
    assert [e["prompts"] for e in resumed.events("preview")] == [["a new prompt"]]
    assert json.loads((stopped.root / "config.json").read_text())["output"]["title"] == "T"
    assert read_header(stopped.root / "lora.safetensors")[0]["modelspec.title"] == "T"
    assert same(resumed.lora(), train().lora())


@pytest.mark.parametrize("kind", ["pickle", "cut", "empty", "other"])
def test_a_checkpoint_that_is_none_is_refused_in_a_sentence(kind, train, configure):
    stopped = train(stop_at=4)
    good = stopped.checkpoints()[-1]
    bad = good.with_name("step-000005.safetensors")
    if kind == "pickle":
        torch.save({"adapter": torch.ones(3)}, bad)
    elif kind == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, bad)
    else:
        bad.write_bytes(good.read_bytes()[: 5000 if kind == "cut" else 0])
    said = "is not a checkpoint of this trainer" if kind == "other" else "Checkpoints are safetensors files; pickles are not loaded"
    with pytest.raises(RunError, match=said) as refused:
        run.train(configure(), stopped.root, resume=True)
    assert str(bad) in str(refused.value)
    (failed,) = stopped.events("failed")
    assert failed["text"] == str(refused.value)
    bad.unlink()
    assert train(root=stopped.root, resume=True).outcome == "finished"


def test_a_full_disk_keeps_the_older_checkpoint(train, monkeypatch, tmp_path, same):
    sync = os.fsync

    def fill(event):
        if event["type"] == "checkpoint" and event["step"] == 2:
            monkeypatch.setattr(os, "fsync", full)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError) as refused:
        train({"output.checkpoint_every": 2}, root=tmp_path, show=fill)
    text = str(refused.value)
    assert text.startswith(
        f"The disk is full: the checkpoint could not be written to {tmp_path / 'checkpoints' / 'step-000004.safetensors'}"
    )
    assert "Free some space, then run again with --resume." in text
    *_, failed = events.read(tmp_path / "events.jsonl")
    assert (failed["type"], failed["text"], failed["step"]) == ("failed", text, 2)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000002.safetensors"}
    monkeypatch.setattr(os, "fsync", sync)
    resumed = train({"output.checkpoint_every": 2}, root=tmp_path, resume=True)
    assert same(resumed.lora(), train().lora())


def test_a_full_disk_at_the_end_says_so_and_leaves_no_part_of_a_lora(train, monkeypatch, tmp_path):
    sync = os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(event):
        if event["type"] == "checkpoint" and event["step"] == 8:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunError, match=r"The disk is full: lora\.safetensors could not be written"):
        train(root=tmp_path, show=fill)
    assert not [name for name in files(tmp_path) if "lora" in name]
    monkeypatch.setattr(os, "fsync", sync)
    assert train(root=tmp_path, resume=True).lora()


WILD = {"part.unet.learning_rate": 10.0, "train.max_grad_norm": None, "train.visits": 24, "schedule.warmup": 0.5, "output.save_every": 0}


def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy(train, configure, tmp_path):
    """Every checkpoint that is kept holds numbers alone, though the loss is looked at every 10 steps only."""
    with pytest.raises(RunError, match=r"not (a number|numbers) any more") as refused:
        train({**WILD, "output.checkpoint_every": 1, "output.keep_checkpoints": 100}, root=tmp_path)
    text = str(refused.value)
    assert "lower learning rate" in text
    assert "train.max_grad_norm" in text
    assert "Resume from" not in text  # with another rate that is refused
    *_, failed = events.read(tmp_path / "events.jsonl")
    assert (failed["type"], failed["text"]) == ("failed", text)
    assert failed["step"] > 0
    from safetensors.torch import load_file

    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert kept
    for path in kept:
        assert all(bool(t.isfinite().all()) for k, t in load_file(path).items() if k.startswith("adapter/")), path.name
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_poisoned_image_ends_the_run(train, monkeypatch):
    monkeypatch.setattr(trainer.loop, "EVENTS_EVERY", 2)
    encode = SD1.encode

    def poisoned(self, models, pixels):
        mean, std = encode(self, models, pixels)
        mean[0, 0, 0, 0] = torch.nan
        return mean, std

    monkeypatch.setattr(SD1, "encode", poisoned)
    with pytest.raises(RunError, match=r"not a number any more after step [12]"):
        train()


def test_a_base_that_is_not_there_is_said_in_the_run(train, tmp_path):
    with pytest.raises(RunError, match=r"model\.source is '/nowhere/x\.safetensors', and there is no such file or folder"):
        train({"model.source": "/nowhere/x.safetensors"}, root=tmp_path)
    assert [e["type"] for e in events.read(tmp_path / "events.jsonl")] == ["stage", "failed"]
    assert train(root=None).outcome == "finished"  # the lock and the signal handlers are free again


def test_targets_that_no_trained_part_has_are_refused(train):
    with pytest.raises(RunError, match=r"adapter\.targets is \['projections'\], which no part has that is trained to the end of the run"):
        train({"adapter.targets": ["projections"], "part.unet.train": False})


def test_a_run_folder_that_cannot_be_made_is_refused(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be made: .*Choose another with --run-dir"):
        run.train(configure(), tmp_path / "file" / "run")


def test_a_reader_leaves_a_torn_line_and_a_writer_cuts_it(tmp_path):
    path = tmp_path / "events.jsonl"
    writer = events.Writer(path)
    writer("stage", name="a ü")
    writer("stage", name="b")
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole + '{"v": 1, "name": "ü'.encode()[:-1])
    assert [e["name"] for e in events.read(path)] == ["a ü", "b"]
    writer = events.Writer(path)
    assert path.read_bytes() == whole
    assert writer("stage", name="c")["seq"] == 2
    writer.close()
    assert [(e["seq"], e["name"]) for e in events.read(path)] == [(0, "a ü"), (1, "b"), (2, "c")]


def test_the_command_line_says_errors_in_one_line(command, tmp_path):
    process = command(tmp_path / "run", {"adapter.alpha": 0})
    said = process.communicate(timeout=120)[0]
    assert (process.returncode, said) == (1, "Error: adapter.alpha is 0; it must be greater than 0.0.\n")
    assert not (tmp_path / "run").exists()
