"""What a file says about itself, as the readers parse it."""

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.formats import FormatError, metadata
from trainer.formats.export import serialise

FACTS = metadata.Facts(
    base="/home/jane/models/dream.safetensors",
    rank=8,
    alpha=4.0,
    learning_rates={"unet": 1e-4, "text_1": 5e-5},
    steps=300,
    batch_size=2,
    seed=7,
    optimizer="adamw",
    scheduler="cosine",
    resolution=512,
    folders=(
        metadata.Folder("/home/jane/pictures/my_cat", 12, 50, ("ohwx cat, sitting", "ohwx cat, on a sofa", "ohwx cat, sitting")),
        metadata.Folder("C:\\Users\\jane\\my_cat\\", 3, 50),
    ),
    buckets={(512, 768): 12, (512, 512): 3},
    trigger_words=("ohwx cat", "größe"),
    title="My cat",
    author="J.",
    description="A cat.",
    license="CC0",
    started_at=1_764_000_000.5,
    finished_at=1_764_000_600.0,
)


def test_what_the_readers_need():
    entries = metadata.build("sd1", FACTS, "mycat")
    assert all(isinstance(v, str) and v for v in entries.values())
    expected = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "ss_output_name": "mycat",
        "ss_sd_model_name": "dream.safetensors",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "5e-05",
        "ss_resolution": "(512, 512)",
        "ss_num_train_images": "750",
        "modelspec.title": "My cat",
        "modelspec.resolution": "512x512",
        "modelspec.trigger_phrase": "ohwx cat, größe",
        "modelspec.date": "2025-11-24T16:10:00+00:00",
    }
    assert expected.items() <= entries.items()
    assert float(entries["ss_training_started_at"]) == 1_764_000_000.5  # A1111's card editor needs a float
    assert json.loads(entries["ss_tag_frequency"])["50_my_cat"] == {"ohwx cat": 3, "sitting": 2, "on a sofa": 1}
    dirs = json.loads(entries["ss_dataset_dirs"])
    assert sorted((d["n_repeats"], d["img_count"]) for d in dirs.values()) == [(50, 3), (50, 12)]
    assert json.loads(entries["ss_bucket_info"])["buckets"]["0"] == {"resolution": [512, 768], "count": 12}
    # JSON values are told by their first character
    assert all(entries[k].startswith("{") for k in ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info"))


VERSIONS = {  # ss_base_model_version, ss_v2, modelspec.architecture, modelspec.prediction_type
    ("sd2", "epsilon"): ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon"),
    ("sd2", "v_prediction"): ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
    ("sdxl", "epsilon"): ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ("sdxl", "v_prediction"): ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "v"),
    ("sd3", "flow"): ("sd3.5_large", "False", "stable-diffusion-3-5-large/lora", None),
}


@pytest.mark.parametrize(("family", "prediction"), VERSIONS)
def test_each_family_says_what_it_is(family, prediction):
    facts = dataclasses.replace(
        FACTS,
        prediction=prediction,
        learning_rates={"unet": 1e-4, "text_1": 1e-5, "text_2": 2e-5},
        zero_terminal_snr=True,
        conv_rank=4,
        conv_alpha=2.0,
    )
    entries = metadata.build(metadata.version_of(family, prediction, "sd3.5_large"), facts, "x")
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(map(entries.get, keys)) == VERSIONS[family, prediction]
    assert entries["ss_network_module"] == ("networks.lora_sd3" if family == "sd3" else "networks.lora")
    assert entries["modelspec.implementation"].startswith("https://" if family == "sdxl" else "diffusers")
    assert (entries["ss_zero_terminal_snr"], entries["ss_text_encoder_lr"]) == ("True", "[1e-05, 2e-05]")
    assert json.loads(entries["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2.0"}


def test_which_family_the_web_uis_take_a_file_for():
    """As their own functions answered for files with ss_* entries, modelspec entries, both and none."""
    for version, both, ss, spec in (
        ("sd1", ("sd1", "sd1"), ("sd1", "unknown"), ("sd1", "sd1")),
        ("sd2", ("sd2", "sd2"), ("sd2", "sd2"), ("sd1", "unknown")),
        ("sdxl", ("sdxl", "sdxl"), ("sdxl", "sdxl"), ("sd1", "sdxl")),
    ):
        entries = metadata.VERSIONS[version]
        for start, expected in (("", both), ("ss_", ss), ("modelspec.", spec)):
            said = metadata.shown_as({k: v for k, v in entries.items() if k.startswith(start)})
            assert tuple(said.values()) == expected, (version, start)
    assert set(metadata.shown_as({}).values()) == {"unknown"}


def test_no_path_and_no_user_name_leaks():
    said = json.dumps(metadata.build("sd1", FACTS, "mycat"))
    assert not any(word in said for word in ("jane", "/home", "Users", "pictures"))


@pytest.mark.parametrize(
    "base, name",
    [
        ("/home/me/.cache/huggingface/hub/models--stabilityai--sdxl-base/snapshots/462165984030d82259a1", "sdxl-base"),
        (r"C:\hub\models--a--b--c\snapshots\0f1e", "b--c"),
        ("owner/name", "name"),
    ],
)
def test_a_base_of_the_hubs_cache_is_named_by_its_repository(base, name):
    assert metadata.build("sdxl", metadata.Facts(base=base, rank=4, alpha=4.0), "x")["ss_sd_model_name"] == name


def test_what_is_unknown_is_left_out():
    entries = metadata.build("sd1", metadata.Facts(base="b", rank=1, alpha=1.0, prediction="v_prediction"), "x")
    assert entries["modelspec.prediction_type"] == "v"
    assert not {"ss_dataset_dirs", "ss_tag_frequency", "ss_bucket_info", "ss_training_started_at", "ss_resolution"} & entries.keys()
    assert "None" not in entries.values() and "" not in entries.values()


def test_header_and_hashes_without_torch(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"b": torch.randn(600_000), "a": torch.zeros(2, 3, dtype=torch.float16), "s": torch.tensor(1.0)}
    entries = metadata.build("sd1", FACTS, "mycat")
    path.write_bytes(serialise(state, entries))
    read, tensors = metadata.read_header(path)
    assert {k: v for k, v in read.items() if "hash" not in k} == entries
    assert tensors == {"b": ("F32", (600_000,)), "a": ("F16", (2, 3)), "s": ("F32", ())}
    # A1111's addnet_hash_safetensors: everything after the header
    blob = path.read_bytes()
    expected = hashlib.sha256(blob[8 + struct.unpack("<Q", blob[:8])[0] :]).hexdigest()
    assert read["sshs_model_hash"] == metadata.tensor_hash(path) == expected
    assert read["modelspec.hash_sha256"] == "0x" + expected
    # sd-scripts: 64 KiB at 1 MiB of a file with the ss_ entries alone
    save_file(state, tmp_path / "plain", {k: v for k, v in entries.items() if k.startswith("ss_")})
    assert read["sshs_legacy_hash"] == hashlib.sha256((tmp_path / "plain").read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert load_file(path).keys() == state.keys()


def test_metadata_and_probe_leave_torch_alone():
    code = "import sys, trainer.formats.metadata, trainer.formats.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(metadata.__file__).parents[2]).returncode == 0


def test_pickles_are_refused_with_a_way_out(tmp_path):
    for name, new_format in (("model.ckpt", True), ("old.pt", False), ("disguised.safetensors", True)):
        torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / name, _use_new_zipfile_serialization=new_format)
        with pytest.raises(FormatError, match=f"{name} is a pickle, which can run any program.*convert it"):
            metadata.read_header(tmp_path / name)


@pytest.mark.parametrize("length", [0x0280, 0x0380])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    raw = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + raw + b"\0\0\0\0")
    assert metadata.read_header(tmp_path / "x.safetensors") == ({}, {"a": ("F32", (1,))})


def test_damaged_files_get_a_sentence(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    cases = {
        "cut off in its tensors": (whole[:-50], "cut off or damaged"),
        "cut off in its header": (whole[:40], "was cut off"),
        "empty": (b"", "not a .safetensors file"),
        "a web page": (b"<!DOCTYPE html><html>not found</html>", "not a .safetensors file"),
        "a broken header": (whole[:8] + b"{" + b"\xff" * (length - 1) + whole[8 + length :], "header cannot be read"),
        "a list as header": (struct.pack("<Q", 2) + b"[]", "header cannot be read"),
    }
    for content, said in cases.values():
        path.write_bytes(content)
        with pytest.raises(FormatError, match=said):
            metadata.read_header(path)
    with pytest.raises(FormatError, match="does not exist"):
        metadata.read_header(tmp_path / "none.safetensors")


def test_sidecar():
    card = json.loads(metadata.sidecar("sd1", ("ohwx cat", "größe"), "A cat."))
    assert card["activation text"] == "ohwx cat, größe"
    assert card["sd version"] == "SD1"
    assert card["description"] == "A cat."
    assert {"preferred weight", "negative text", "notes"} <= card.keys()
