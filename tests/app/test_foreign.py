"""Configurations of other trainers: what means the same is carried over, everything else is listed with a reason."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app import datasets, draft, foreign, forms, settings
from app.api import draft as routes
from app.context import Context
from app.errors import Problem
from app.paths import Home
from app.runner import Runner
from app.server import _answer_errors
from trainer.config.load import validate

# As kohya_ss's page saves it: every field of the form, numbers partly as text.
GUI = {
    "LoRA_type": "Standard", "adaptive_noise_scale": 0, "additional_parameters": "", "bucket_no_upscale": True, "bucket_reso_steps": 64.0,
    "cache_latents": True, "caption_dropout_every_n_epochs": 0.0, "caption_dropout_rate": 0.05, "caption_extension": ".txt", "clip_skip": 2,
    "color_aug": False, "conv_alpha": 1, "conv_dim": 1, "enable_bucket": True, "epoch": 10, "flip_aug": False, "full_fp16": False,
    "gradient_accumulation_steps": 2.0, "gradient_checkpointing": True, "keep_tokens": "1", "learning_rate": "0.0001",
    "lr_scheduler": "cosine", "lr_scheduler_num_cycles": "", "lr_warmup": "10", "max_data_loader_n_workers": "1", "max_resolution": "512,650",
    "max_token_length": "75", "max_train_epochs": "", "max_train_steps": "", "min_snr_gamma": 5, "mixed_precision": "bf16", "network_alpha": 16,
    "network_dim": 32, "noise_offset": "0.05", "num_cpu_threads_per_process": 2, "optimizer": "AdamW8bit", "optimizer_args": "weight_decay=0.1",
    "output_name": "my_cat", "pretrained_model_name_or_path": "/models/v1-5.safetensors", "prior_loss_weight": 1.0, "save_every_n_epochs": 1,
    "save_precision": "fp16", "scale_weight_norms": 1.0, "seed": "1234", "shuffle_caption": True, "stop_text_encoder_training": 0,
    "text_encoder_lr": "5e-05", "train_batch_size": 3, "train_data_dir": "/data/img", "unet_lr": "0.0002", "v2": False, "xformers": "xformers",
    "max_grad_norm": 0,
}  # fmt: skip


def read(raw, images=0, name="file.json"):
    return foreign.read(name, raw if isinstance(raw, str) else json.dumps(raw), images)


def reasons(found) -> dict[str, str]:
    return {entry["key"]: entry["why"] for entry in found.left_out}


def accepted(found) -> None:
    """Every change names a shown field and has a value that the configuration takes."""
    assert found.changes.keys() <= {*forms.shown(), *forms.KEPT} and set(found.carried) == set(found.changes) | set(found.fields)
    validate({"data": [{"folder": "."}]} | draft.nest(found.changes))


def test_kohyas_page():
    found = read(GUI)
    accepted(found)
    assert found.origin == "kohya_ss"
    assert found.changes == {
        "adapter.targets": ["attention", "feed_forward", "projections"], "adapter.rank": 32, "adapter.alpha": 16.0,
        "part.unet.learning_rate": 2e-4, "part.text_1.learning_rate": 5e-5, "part.text_1.train": True, "optimizer.kind": "adamw8bit", "optimizer.weight_decay": 0.1,
        "train.batch_size": 6, "train.accumulation": 2, "train.visits": 10, "schedule.kind": "cosine", "schedule.floor": 0.0,
        "schedule.warmup": 0.1, "loss.min_snr_gamma": 5.0, "loss.noise_offset": 0.05, "dataset.caption_dropout": 0.05, "dataset.keep_tags": 1,
        "dataset.shuffle_tags": True, "dataset.flip": False, "dataset.resolution": 576, "dataset.bucket_step": 64, "train.memory": "checkpointing",
        "train.seed": 1234, "train.dtype": "bf16", "output.dtype": "fp16", "train.max_grad_norm": "", "dataset.text_windows": 1, "model.clip_skip": 2,
    }  # fmt: skip
    assert found.fields == {"name": "my_cat", "model": "/models/v1-5.safetensors"}
    assert found.carried["adapter.rank"] == "network_dim = 32" and "gradient_accumulation_steps = 2" in found.carried["train.batch_size"]
    why = reasons(found)
    assert why["cache_latents"] == "always done here" and "clip_skip" not in why
    assert {"scale_weight_norms", "repeats", "train_data_dir", "xformers"} <= why.keys()
    assert not why.keys() & {"v2", "color_aug", "full_fp16", "max_data_loader_n_workers", "conv_dim", "stop_text_encoder_training"}


def test_repeats_are_read_from_the_folders_where_they_are_here(tmp_path):
    (tmp_path / "20_cat").mkdir()
    found = read(GUI | {"train_data_dir": str(tmp_path)})
    assert found.changes["train.visits"] == 200 and "20 repeats" in found.carried["train.visits"] and "repeats" not in reasons(found)
    (tmp_path / "5_dog").mkdir()
    assert "repeats" in reasons(read(GUI | {"train_data_dir": str(tmp_path)}))


def test_steps_become_visits_by_the_images():
    steps = GUI | {"max_train_steps": 1600, "epoch": 1}
    assert read(steps, images=16).changes["train.visits"] == 600  # 1600 steps of 3 x 2 images
    without = read(steps)
    assert "train.visits" not in without.changes and "no images yet" in reasons(without)["max_train_steps"]
    assert read(steps | {"max_train_epochs": "7"}).changes["train.visits"] == 7


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"text_encoder_lr": 0}, {"part.text_1.train": False, "part.unet.learning_rate": 2e-4}),
        ({"unet_lr": 0, "text_encoder_lr": 0}, {"part.unet.learning_rate": 1e-4, "part.text_1.learning_rate": 1e-4}),
        ({"text_encoder_lr": [1e-5, 2e-5]}, {"part.text_1.learning_rate": 1e-5}),
        ({"unet_lr": ""}, {"part.unet.learning_rate": 1e-4}),
        ({"network_alpha": 0}, {"adapter.alpha": 32}),
        ({"min_snr_gamma": 0}, {"loss.min_snr_gamma": ""}),
        ({"optimizer": "Prodigy", "optimizer_args": "betas=0.9, 0.999 d_coef=2"}, {"optimizer.kind": "prodigy", "optimizer.beta2": 0.999, "optimizer.d_coef": 2}),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": "4"}, {"schedule.kind": "cosine_restarts", "schedule.restarts": 4}),
        ({"lr_scheduler": "constant"}, {"schedule.kind": "constant", "schedule.warmup": 0.0}),
        ({"LoRA_type": "Kohya LoCon", "conv_dim": 32}, {"adapter.targets": ["attention", "feed_forward", "projections", "convolutions"]}),
        ({"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4}, {"adapter.conv_rank": 8, "adapter.conv_alpha": 4.0}),
        ({"v_parameterization": True}, {"model.prediction": "v_prediction"}),
        ({"v2": True, "v_parameterization": True}, {"model.family": "sd2", "model.prediction": "v_prediction", "model.clip_skip": None}),
        ({"sdxl": True, "zero_terminal_snr": True}, {"model.family": "sdxl", "model.zero_terminal_snr": True, "part.text_2.learning_rate": 5e-5}),
        ({"sdxl": True, "text_encoder_lr": [1e-5, 2e-5]}, {"part.text_1.learning_rate": 1e-5, "part.text_2.learning_rate": 1e-5}),
        ({"sdxl": True, "text_encoder_lr": 0}, {"part.text_1.train": False, "part.text_2.train": False}),
        ({"sdxl": True, "text_encoder_lr": "", "learning_rate_te1": 1e-5, "learning_rate_te2": 0}, {"part.text_1.learning_rate": 1e-5, "part.text_2.train": False}),
        ({"sdxl": True, "network_train_unet_only": True}, {"part.text_1.train": False, "part.text_2.train": False, "part.text_2.learning_rate": None}),
        ({"max_token_length": "225", "weighted_captions": True}, {"dataset.text_windows": 3, "dataset.prompt_weights": True}),
        ({"sd3_checkbox": True, "text_encoder_lr": [1e-5, 2e-5, 0]}, {"model.family": "sd3", "part.text_2.learning_rate": 2e-5}),
        ({"sd3_checkbox": True, "weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.5, "training_shift": 2, "clip_l": "/e/clip_l.safetensors", "clip_g": "/e/clip_g.safetensors"},
         {"loss.timesteps": "logit_normal", "loss.logit_mean": 0.0, "loss.logit_std": 1.5, "loss.shift": 2.0, "model.text_encoders": "/e"}),
        ({"mixed_precision": "no"}, {"train.dtype": "fp32"}),
        ({"sample_prompts": "a cat --n bad --w 512\n# no\nmycat --d 1"}, {"preview.prompts": ["a cat", "mycat"]}),
        ({"save_every_n_steps": 200}, {"output.save_every": 200}),
    ],
    ids=str,
)  # fmt: skip
def test_kohyas_values_mean_the_same_here(change, expected):
    found = read(GUI | change)
    assert {k: found.changes.get(k) for k in expected} == expected


@pytest.mark.parametrize(
    "change, key, why",
    [
        ({"LoRA_type": "LyCORIS/LoHa"}, "LoRA_type", "only plain LoRA"),
        ({"optimizer": "Lion"}, "optimizer", "is not there"),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler", "is not there"),
        ({"max_token_length": 300}, "max_token_length", "windows of 75"),
        ({"sdxl": True}, "clip_skip", "only SD 1.5"),
        ({"block_dims": "1,2,3"}, "block_dims", "no list of as many numbers"),
        ({"down_lr_weight": "cosine"}, "down_lr_weight", "no list of as many numbers"),
        ({"conv_block_dims": "1,2,3"}, "conv_block_dims", "one rank for all of its layers"),
        ({"flux1_checkbox": True}, "flux1_checkbox", "Flux"),
        ({"sd3_checkbox": True, "weighting_scheme": "mode"}, "weighting_scheme", "logit_normal and uniform"),
        ({"multires_noise_iterations": 6}, "multires_noise_iterations", "only noise offset"),
        ({"sample_prompts": "/x/prompts.txt"}, "sample_prompts", "is a file"),
        ({"lr_warmup_steps": 100}, "lr_warmup_steps", "share of the run"),
        ({"unheard_of": "yes"}, "unheard_of", "no such setting"),
        ({"network_dim": "many"}, "network_dim", "is no number"),
    ],
    ids=str,
)
def test_what_is_not_carried_over_is_listed_with_the_reason(change, key, why):
    assert why in reasons(read(GUI | change))[key]


def test_numbers_of_blocks_are_those_of_the_blocks_that_carry_a_lora():
    dims = ",".join(str(n) for n in range(25))
    blocks = read(GUI | {"block_dims": dims, "mid_lr_weight": "0.5", "up_lr_weight": ",".join(["1"] * 11 + ["0"])}).changes[
        "adapter.blocks"
    ]
    assert blocks["unet.down_blocks.0.attentions.0"] == {"rank": 1} and blocks["unet.down_blocks.2.attentions.1"] == {"rank": 8}
    assert blocks["unet.mid_block.attentions"] == {"rank": 12, "rate": 0.5}
    assert blocks["unet.up_blocks.1.attentions.0"] == {"rank": 16} and blocks["unet.up_blocks.3.attentions.2"] == {"rank": 0}
    assert len(blocks) == 16 and not any("resnets" in name for name in blocks)
    large = GUI | {"sdxl": True, "LoRA_type": "Kohya LoCon", "conv_dim": 4, "down_lr_weight": "1,1,1,1,0.5,1,1,1,1"}
    assert read(large).changes["adapter.blocks"] == {
        "unet.down_blocks.1.attentions.0": {"rate": 0.5},
        "unet.down_blocks.1.resnets.0": {"rate": 0.5},
    }


@pytest.mark.parametrize("change, family", [({}, "sd1"), ({"sdxl": True}, "sdxl")])
def test_every_block_that_is_named_is_one_of_the_model(change, family):
    """The names are held against the real UNet's modules: all of them carry layers, and together they are all that a LoCon changes."""
    from trainer.config.load import ROOT
    from trainer.families import get
    from trainer.families.common import targets
    from trainer.formats import single_file

    count = 23 if change else 25
    locon = GUI | change | {"LoRA_type": "Kohya LoCon", "conv_dim": 4, "block_dims": ",".join(["7"] * count)}
    found = read(locon)
    accepted(found)
    model = single_file.blank(ROOT / "assets" / "models" / family, ["unet"])["unet"]
    layers = targets(model, get(family).unet_targets, found.changes["adapter.targets"])
    for block in found.changes["adapter.blocks"]:
        assert any(f"unet.{layer}".startswith(f"{block}.") for layer in layers), block
    assert all(any(f"unet.{layer}".startswith(f"{block}.") for block in found.changes["adapter.blocks"]) for layer in layers)


def test_sd_scripts_toml():
    text = """
    [model_arguments]
    pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
    [network_arguments]
    network_module = "networks.lora"
    network_dim = 8
    network_alpha = 4
    network_args = ["conv_dim=8", "loraplus_lr_ratio=16"]
    network_train_unet_only = true
    [optimizer_arguments]
    optimizer_type = "AdamW"
    learning_rate = 1e-4
    unet_lr = 3e-4
    lr_warmup_steps = 0.05
    optimizer_args = ["weight_decay=0.02", "betas=(0.9,0.95)"]
    [dataset_arguments]
    resolution = "768,768"
    [training_arguments]
    max_train_epochs = 4
    train_batch_size = 2
    """
    found = read(text, name="config.toml")
    accepted(found)
    assert found.origin == "sd-scripts" and found.fields["model"] == "runwayml/stable-diffusion-v1-5"
    c = found.changes
    assert (c["adapter.rank"], c["adapter.alpha"], c["part.unet.learning_rate"], c["part.text_1.train"]) == (8, 4.0, 3e-4, False)
    assert (c["adapter.conv_rank"], c["adapter.conv_alpha"]) == (8, 1.0)  # alpha's default there
    assert "convolutions" in c["adapter.targets"] and "part.text_1.learning_rate" not in c
    assert (c["optimizer.beta2"], c["optimizer.weight_decay"], c["schedule.warmup"]) == (0.95, 0.02, 0.05)
    assert (c["dataset.resolution"], c["train.visits"], c["train.batch_size"]) == (768, 4, 2)
    assert reasons(found)["network_args loraplus_lr_ratio"] == "there is no such setting here"


def test_a_dataset_toml():
    text = """
    [general]
    shuffle_caption = true
    keep_tokens = 2
    [[datasets]]
    resolution = 512
    batch_size = 4
    [[datasets.subsets]]
    image_dir = "/data/cat"
    class_tokens = "mycat cat"
    num_repeats = 10
    [[datasets.subsets]]
    image_dir = "/data/more"
    """
    found = read(text, name="dataset.toml")
    accepted(found)
    assert found.changes == {"train.batch_size": 4, "dataset.keep_tags": 2, "dataset.shuffle_tags": True, "dataset.resolution": 512}
    assert found.fields == {"class_word": "mycat cat"}
    assert {"image_dir", "subsets[2...]"} <= reasons(found).keys()


NEW = {
    "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "C:\\models\\v1-5.safetensors", "peft_type": "LORA",
    "output_model_destination": "models/my cat.safetensors", "learning_rate": 3e-4, "learning_rate_scheduler": "COSINE", "epochs": 50,
    "learning_rate_warmup_steps": 100, "learning_rate_min_factor": 0.1, "batch_size": 4, "gradient_accumulation_steps": 1, "resolution": "512",
    "unet": {"train": True, "learning_rate": None, "stop_training_after": 0, "stop_training_after_unit": "NEVER", "gradient_checkpointing": True},
    "text_encoder": {"train": True, "learning_rate": 5e-5, "stop_training_after": 30, "stop_training_after_unit": "EPOCH"},
    "optimizer": {"optimizer": "ADAMW", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "fused": True},
    "lora_rank": 16, "lora_alpha": 1.0, "dropout_probability": 0.0, "layer_filter_preset": "attn-mlp", "train_dtype": "BFLOAT_16",
    "output_dtype": "FLOAT_16", "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0, "offset_noise_weight": 0.0,
    "clip_grad_norm": 1.0, "ema": "GPU", "masked_training": True, "vae": {"train": True}, "concepts": [{"path": "/x"}], "save_every": 100,
    "save_every_unit": "STEP", "unheard_of": 7,
}  # fmt: skip
OLD = {
    "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "runwayml/stable-diffusion-v1-5", "optimizer": "ADAMW_8BIT",
    "learning_rate": 0.0003, "learning_rate_scheduler": "CONSTANT", "learning_rate_warmup_steps": 200, "weight_decay": 0.01, "epochs": 100,
    "batch_size": 4, "train_text_encoder": False, "train_text_encoder_epochs": 30, "train_unet": True, "unet_learning_rate": 0.0002,
    "lora_rank": 16, "lora_alpha": 1.0, "resolution": 512, "train_dtype": "FLOAT_16", "offset_noise_weight": 0.05,
}  # fmt: skip


def test_one_trainer():
    found = read(NEW, images=20)
    accepted(found)
    c = found.changes
    assert found.origin == "OneTrainer" and found.fields == {"model": "C:\\models\\v1-5.safetensors", "name": "my cat"}
    assert (c["adapter.rank"], c["adapter.alpha"], c["adapter.targets"]) == (16, 1.0, ["attention", "feed_forward"])
    assert (c["part.unet.learning_rate"], c["part.text_1.learning_rate"], c["part.text_1.stop"]) == (3e-4, 5e-5, 0.6)
    assert (c["train.visits"], c["train.batch_size"], c["schedule.warmup"], c["schedule.floor"]) == (50, 4, 0.4, 0.1)
    assert (c["optimizer.beta2"], c["loss.min_snr_gamma"], c["train.dtype"], c["output.dtype"]) == (0.999, 5.0, "bf16", "fp16")
    assert (c["train.memory"], c["output.save_every"], c["dataset.resolution"]) == ("checkpointing", 100, 512)
    why = reasons(found)
    assert {"ema", "masked_training", "concepts", "unheard_of"} <= why.keys() and not why.keys() & {"vae", "lora_rank", "peft_type"}


def test_one_trainers_large_families():
    table = {"train": True, "learning_rate": 1e-5, "stop_training_after": 10, "stop_training_after_unit": "EPOCH"}
    found = read(NEW | {"model_type": "STABLE_DIFFUSION_XL_10_BASE", "text_encoder_2": table, "rescale_noise_scheduler_to_zero_terminal_snr": True,
                        "force_v_prediction": True})  # fmt: skip
    accepted(found)
    c = found.changes
    assert (c["model.family"], c["part.text_2.learning_rate"], c["part.text_2.stop"]) == ("sdxl", 1e-5, 0.2)
    assert (
        c["model.zero_terminal_snr"] is True
        and c["model.prediction"] == "v_prediction"
        and "part.text_2.learning_rate" not in read(NEW).changes
    )
    flow = {"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5, "noising_weight": 0.2, "timestep_shift": 3.0}
    found = read(NEW | flow | {"model_type": "STABLE_DIFFUSION_35", "transformer": {"train": True, "learning_rate": 2e-4}, "text_encoder": {"train": False},
                               "text_encoder_2": {"train": False}})  # fmt: skip
    accepted(found)
    c = found.changes
    assert (c["model.family"], c["part.unet.learning_rate"], c["part.text_1.train"], c["part.text_2.train"]) == ("sd3", 2e-4, False, False)
    assert (c["loss.timesteps"], c["loss.logit_mean"], c["loss.logit_std"], c["loss.shift"]) == ("logit_normal", 0.5, 1.2, 3.0)
    assert read(NEW | {"text_encoder_layer_skip": 1}).changes["model.clip_skip"] == 2
    assert "is not there" in reasons(read(NEW | {"model_type": "FLUX_DEV_1"}))["model_type"]


def test_one_trainers_old_files():
    found = read(OLD)
    accepted(found)
    c = found.changes
    assert (c["part.text_1.train"], c["part.unet.learning_rate"], c["optimizer.kind"]) == (False, 2e-4, "adamw8bit")
    assert "part.text_1.learning_rate" not in c and c["loss.noise_offset"] == 0.05
    assert "share of the run" in reasons(found)["learning_rate_warmup_steps"]


@pytest.mark.parametrize("text", ["{", "[1]", "a = = 1", '{"a": 1}', "", "\x00"])
def test_what_is_no_configuration_is_refused(text):
    with pytest.raises(Problem) as caught:
        read(text, name="x.json" if text.startswith(("{", "[1")) else "x.toml")
    assert "x." in caught.value.text


# ---- by the route


@pytest.fixture
def client(tmp_path, draw_pictures):
    home = Home(tmp_path / "home")
    home.create()
    settings.save(home, {"run_folders": []})
    now = draft.update(home, preset="quick")
    datasets.open(home, now["dataset"]).add_folder(draw_pictures(tmp_path / "pictures", [(64, 64)] * 4))
    app = FastAPI()
    app.include_router(routes.router, prefix="/api")
    _answer_errors(app)
    app.state.context = Context(home, Runner(home))
    with TestClient(app) as client:
        yield client


def test_an_import_lands_in_the_draft(client):
    answer = client.post("/api/draft/import", json={"name": "cat.json", "text": json.dumps(GUI | {"max_train_steps": 100})}).json()
    assert answer["imported"]["from"] == "kohya_ss" and answer["errors"] == {}
    assert answer["draft"]["name"] == "my_cat" and answer["values"]["train.visits"] == 150
    assert answer["draft"]["changes"]["adapter.rank"] == 32 and "loss.min_snr_gamma" not in answer["draft"]["changes"]  # as in the preset
    assert answer["draft"]["model"] == "" and any(e["key"] == "model" for e in answer["imported"]["left_out"])
    answer = client.post(
        "/api/draft/import", json={"name": "x.json", "text": json.dumps(GUI | {"network_dim": 5000, "output_name": "other"})}
    ).json()
    assert "adapter.rank" in answer["errors"] and answer["draft"]["name"] == "my_cat"


def test_settings_of_another_family_are_compared_with_its_own_preset(client):
    """Of kohya's SDXL values those that equal the SD1 preset's, as both text encoders on, must not be lost."""
    answer = client.post(
        "/api/draft/import", json={"name": "x.json", "text": json.dumps(GUI | {"sdxl": True, "network_dim": 8, "network_alpha": 8})}
    ).json()
    assert answer["errors"] == {} and answer["family"] == "sdxl"
    assert (
        answer["values"]["part.text_1.train"] is True
        and answer["values"]["part.text_2.train"] is True
        and answer["values"]["adapter.rank"] == 8
    )
    text = client.get("/api/draft/toml").json()["text"]
    assert (
        'preset = "sdxl/quick"' in text
        and client.put("/api/draft/toml", json={"text": text}).json()["draft"]["changes"] == answer["draft"]["changes"]
    )


def test_our_own_configuration_comes_back_without_its_folder(client):
    text = 'preset = "sd1/thorough"\n[[data]]\nfolder = "/somewhere"\ntrigger = "zorp"\n[adapter]\nrank = 64\n[output]\nname = "cat"\n'
    answer = client.post("/api/draft/import", json={"name": "cat.toml", "text": text}).json()
    assert answer["imported"]["from"] == "LoRA Atelier" and answer["imported"]["left_out"][0]["key"] == "data.1.folder"
    assert answer["draft"]["changes"] == {"adapter.rank": 64} and answer["draft"]["preset"] == "thorough"
    assert (answer["draft"]["trigger"], answer["draft"]["name"], answer["images"]) == ("zorp", "cat", 4)
    answer = client.post("/api/draft/import", json={"name": "cat.toml", "text": "[adapter]\nrnk = 1"})
    assert answer.status_code == 400 and "Did you mean rank?" in answer.json()["error"]
